"""The optional extras: a test that needs one is skipped with the command that installs it.

``python tests/extras.py EXTRA REPORT`` prints the tests that a run without extras has skipped for
want of that one, by its JUnit report.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

MODULES = {
    "peers": ("loralib", "peft", "torch", "transformers"),
    "libraries": ("bitsandbytes", "jsonschema", "lycoris", "mlx", "mlx_lm"),
    "servers": ("fastapi", "openai", "uvicorn"),
    "adapters": ("adapters",),
    "axolotl": ("axolotl",),
    "unsloth": ("unsloth",),
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


def skipped_without(extra: str, report: Path) -> Iterator[str]:
    """The tests, or whole files, that were skipped because a module of the extra is absent.

    Errors: ValueError if none was.
    """
    found = False
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None and skip.get("message", "").endswith(f"'minilora[{extra}]'"):
            module, name = case.get("classname", ""), case.get("name", "")
            path = (module or name).replace(".", "/") + ".py"
            found = True
            yield f"{path}::{name}" if module else path
    if not found:
        raise ValueError(f"{report}: expected a test that was skipped without the extra {extra}")


if __name__ == "__main__":
    print(*skipped_without(sys.argv[1], Path(sys.argv[2])), sep="\n")
