"""The optional extras: a test that needs one is skipped with the command that installs it.

``python tests/extras.py EXTRA`` prints the files of the tests that name a module of that extra.
"""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

MODULES = {
    "peers": ("loralib", "peft", "torch", "transformers"),
    "libraries": ("bitsandbytes", "jsonschema", "lycoris", "mlx", "mlx_lm"),
    "servers": ("fastapi", "openai", "uvicorn"),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "frameworks": ("flax", "keras", "litgpt"),
    "gguf": ("gguf",),
    "llama-cpp": ("llama_cpp",),
    "jax": ("jax",),
    "text": ("jinja2", "rouge_score", "tokenizers"),
    "plot": ("matplotlib",),
    "parquet": ("pyarrow",),
    "mpi": ("mpi4py",),
    "dask": ("distributed",),
    "test": ("mpmath", "xdist", "yaml"),
    "dev": ("radon",),
}
EXTRA = {module: extra for extra, modules in MODULES.items() for module in modules}


def absent(module):
    """The reason why a test is skipped."""
    return f"{module} is not installed: pip install 'minilora[{EXTRA[module.split('.')[0]]}]'"


def optional(module):
    """The module; without it the test is skipped, and the file if this is at its top."""
    return pytest.importorskip(module, reason=absent(module))


def needs(*modules):
    """The mark of a test, or of a parameter, that is skipped without these modules."""
    missing = [module for module in modules if not importlib.util.find_spec(module)]
    return pytest.mark.skipif(bool(missing), reason=absent(missing[0]) if missing else "")


def names(source):
    """The extras whose modules the source names in a string."""
    strings = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)]
    return {EXTRA.get(s.split(".")[0]) for s in strings if isinstance(s, str)} - {None}


def files_that_name(extra):
    """The test files that call `optional` or `needs` for a module of the extra."""
    for path in sorted(Path(__file__).parent.rglob("test_*.py")):
        source = path.read_text()
        if "from extras import" in source and extra in names(source):
            yield path


if __name__ == "__main__":
    print(*files_that_name(sys.argv[1]), sep="\n")
