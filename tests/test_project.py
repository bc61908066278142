"""The project around the code: what lies where, what imports what, how complex a function is."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from extras import optional

import minilora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minilora"

TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "docs",
    "minilora",
    "pyproject.toml",
    "reference_models",
    "tests",
}

ROOMS = {
    "spec": set(),
    "io": {"spec"},
    "training": {"spec", "io"},
    "forms": set(),
    "verify": {"spec", "io", "findings", "forms"},
    "findings": set(),
    "audit": {"spec", "io", "training", "findings", "forms"},
    "testing": {"spec"},
    "pytest_plugin": {"verify"},
    "studies": {"spec", "io", "training", "verify", "findings", "forms"},
    "cli": {"spec", "io", "training", "verify", "audit", "findings", "forms", "studies"},
    "__main__": {"cli"},
}
"""What each package may import of the others: one way, and verify never imports training."""

RUN_TIME = {
    "hypothesis",
    "ml_dtypes",
    "numpy",
    "safetensors",
    "scipy",
    "threadpoolctl",
    "tqdm",
}
PEERS = {"loralib", "lycoris", "peft", "torch", "transformers"}
"""What a peer's file may import."""

ALONE = {"adapters", "axolotl", "bitsandbytes", "jax", "mlx", "mlx_lm", "sglang", "unsloth", "vllm"}
FRAMEWORKS = {"flax", "keras", "litgpt"}
"""And one peer's file each, which comes with an extra of its own or with `libraries`."""

PYTEST = {
    "minilora/pytest_plugin.py",
    "minilora/verify/__init__.py",
    "minilora/verify/pytest_suite.py",
    "minilora/verify/test_implementation.py",
}
"""What only pytest imports, or who has it: the extra `pytest`."""

OPTIONAL = {
    "minilora/io/": {"gguf", "jinja2", "tokenizers"},
    "minilora/training/": {"matplotlib", "mpi4py", "pyarrow", "rouge_score"},
    "minilora/cli/": {"distributed", "mpi4py"},
    "minilora/verify/skeletons/": {"jax", "torch"},
}
"""What comes with an extra, or with the library looked at, by the package that imports it."""


@functools.cache
def imported(source):
    """Every module that the source imports, at its top or inside a function; none is relative."""
    modules, waiting = set(), [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.expr):  # which holds no statement
            waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import in full"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def rooms_of(source):
    """The packages of minilora that the source imports; names of minilora itself lie in spec."""
    own = [name.split(".") for name in imported(source) if name.startswith("minilora.")]
    return {part[1] for part in own if part[1] != "__version__"}


def forbidden(room, source):
    """The packages that ``room`` imports and may not."""
    return sorted(rooms_of(source) - ROOMS[room] - {room})


def foreign(source):
    """The packages that the source imports and that come neither with Python nor from here."""
    packages = {name.split(".")[0] for name in imported(source)}
    return packages - set(sys.stdlib_module_names) - {"minilora"}


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


SCRIPTS = PACKAGE / "findings" / "scripts"
"""Each for itself: what shows a finding, and imports its library alone."""

FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py" and SCRIPTS not in path.parents
]


def is_peer(path):
    return "peers" in path.parts or "libraries" in path.parts


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def test_every_file_lies_in_a_room():
    assert {module_of(path) for path in FILES} == set(ROOMS)


def test_packages_import_one_way():
    wrong = {name_of(path): forbidden(module_of(path), path.read_text()) for path in FILES}
    assert {name: rooms for name, rooms in wrong.items() if rooms} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import minilora.training.data",
        "from minilora.training import data",
        "def f():\n from minilora.training.data import batch",
    ],
)
def test_an_import_the_wrong_way_is_seen(line):
    assert forbidden("studies", line) == []
    assert forbidden("verify", line) == ["training"]
    assert forbidden("spec", line) == ["training"]


def allowed(path):
    """The packages that a file of minilora may import."""
    name = name_of(path)
    more = [PEERS | ALONE | FRAMEWORKS] * is_peer(path) + [{"pytest"}] * (name in PYTEST)
    more += [libraries for package, libraries in OPTIONAL.items() if name.startswith(package)]
    return RUN_TIME.union(*more)


def test_only_run_time_dependencies_and_in_a_peer_its_library_are_imported():
    wrong = {name_of(path): foreign(path.read_text()) - allowed(path) for path in FILES}
    assert {name: packages for name, packages in wrong.items() if packages} == {}


def at_the_top(source):
    """The packages that are imported whenever the module is."""
    body = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return foreign("\n".join(map(ast.unparse, body)))


@pytest.mark.slow
def test_an_optional_library_is_imported_where_it_is_used():
    sources = {name_of(path): path.read_text() for path in FILES if not is_peer(path)}
    libraries = set().union(*OPTIONAL.values())
    assert set().union(*map(foreign, sources.values())) >= libraries
    assert [name for name, source in sources.items() if at_the_top(source) & libraries] == []
    assert at_the_top("import gguf\ndef f():\n import jinja2") == {"gguf"}


def test_a_foreign_import_is_seen():
    assert foreign("import os, numpy\ndef f():\n from torch import nn") == {"numpy", "torch"}


def top_level():
    """What git has or would add; without git, what is there and is no dot-file."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    files = done.stdout.splitlines() if done.returncode == 0 else [p.name for p in ROOT.iterdir()]
    return {file.split("/")[0] for file in files if not file.startswith(".")}


def test_the_top_level_holds_what_it_should_and_no_more():
    assert top_level() == TOP_LEVEL


def modules_after(code):
    """The packages and modules that a fresh interpreter has loaded after the code."""
    code = f"import json, sys\n{code}\nprint(json.dumps(list(sys.modules)))"
    run = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    return modules, {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_importing_minilora_loads_nothing_else():
    for module in ("minilora", "minilora.pytest_plugin"):
        modules, packages = modules_after(
            f"import pytest; before = set(sys.modules)\nimport {module}"
        )
        assert "numpy" not in packages
        assert {name for name in modules if name.startswith("minilora")} <= {"minilora", module}


@pytest.mark.slow
def test_the_first_name_of_minilora_loads_the_specification_and_no_more_packages():
    _, before = modules_after("import numpy, scipy.special")
    modules, after = modules_after("import minilora; minilora.lora_linear")
    assert "minilora.spec.lora" in modules
    assert after - before == {"minilora"}


@pytest.mark.parametrize("name", minilora.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(minilora)
    assert getattr(minilora, name) is not None


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lora_linaer"):
        minilora.lora_linaer  # noqa: B018


COMPLEX = 20
"""The greatest cyclomatic complexity of a function."""


def too_complex(source):
    """Names and complexities of the functions above the greatest."""
    visit = optional("radon.complexity").cc_visit
    blocks = [block for block in visit(source) if block.complexity > COMPLEX]
    return {block.fullname: block.complexity for block in blocks if block.letter != "C"}


def test_no_function_is_too_complex():
    found = {name_of(path): too_complex(path.read_text()) for path in FILES}
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_a_function_that_is_too_complex_is_seen():
    branches = "".join(f"    if x == {i}:\n        return {i}\n" for i in range(COMPLEX))
    assert too_complex(f"def f(x):\n{branches}") == {"f": COMPLEX + 1}
    method = "class C:\n" + "".join(
        f"    {line}\n" for line in f"def f(x):\n{branches}".split("\n")
    )
    assert too_complex(method) == {"C.f": COMPLEX + 1}
