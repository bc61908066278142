"""What is declared, built and installed."""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from extras import EXTRA
from test_project import ALONE, FRAMEWORKS, OPTIONAL, PEERS, PYTEST, RUN_TIME

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    """The modules of what is required: gt-peft[cpu]>=1.0 is gt_peft."""
    return {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in requirements}


def test_the_declared_dependencies_are_those_that_are_imported():
    assert names(PROJECT["dependencies"]) == RUN_TIME
    assert names(EXTRAS["peers"]) == PEERS - {"lycoris"}
    assert PYTEST
    assert names(EXTRAS["pytest"]) == {"pytest"}
    used_as_they_are = ("text", "gguf", "plot", "parquet", "mpi", "dask")
    optional = names(line for extra in used_as_they_are for line in EXTRAS[extra])
    assert optional - {"mpich"} == set().union(*OPTIONAL.values()) - PEERS - ALONE
    alone = ("libraries", "jax", "adapters", "axolotl", "unsloth", "vllm", "sglang")
    assert {"lycoris_lora", *ALONE} <= names(line for extra in alone for line in EXTRAS[extra])
    assert names(EXTRAS["frameworks"]) == FRAMEWORKS


def test_what_users_install_has_an_oldest_version():
    users = {name: lines for name, lines in EXTRAS.items() if name not in ("dev", "docs")}
    lines = [*PROJECT["dependencies"], *(line for lines in users.values() for line in lines)]
    assert [line for line in lines if ">=" not in line] == []


def test_every_extra_of_a_skipped_test_is_declared():
    assert set(EXTRA.values()) <= EXTRAS.keys()
    for module, extra in EXTRA.items():
        assert any(module.split("_")[0] in name for name in names(EXTRAS[extra])), module


def test_what_the_entry_points_name_is_there():
    for target in PROJECT["scripts"].values():
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
    for module in PROJECT["entry-points"]["pytest11"].values():
        assert callable(importlib.import_module(module).pytest_addoption)


def test_the_versions_of_python_are_declared():
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    assert versions == [f"3.{minor}" for minor in range(11, 11 + len(versions))]
    assert PROJECT["requires-python"] == f">={versions[0]}"


GENERATED = re.compile(r"^docs/(_build|api|downloads|findings)/|\.hypothesis/")
"""What building the documentation and running the tests leave behind; git ignores it."""


def build(kind, source, target):
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = Path(target).glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def held_by(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    return held


def files_below(folder):
    """Every file, without what Python and this project's tools leave there."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    kept = (path.relative_to(ROOT) for path in files)
    return {path.as_posix() for path in kept if "__pycache__" not in path.parts}


def test_a_wheel_holds_the_package_with_its_reference_models_and_nothing_else(tmp_path):
    models = {f"minilora/{name}" for name in files_below("reference_models")}
    assert held_by(build("wheel", ROOT, tmp_path)) == files_below("minilora") | models
    assert any(name.endswith(".safetensors") for name in models)


@pytest.mark.slow
def test_a_source_distribution_holds_the_tests_and_makes_the_same_wheel(tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for folder in ("docs", "minilora", "reference_models", "tests"):
        absent = [name for name in files_below(folder) if not (source / name).is_file()]
        assert [name for name in absent if not GENERATED.search(name)] == []
    again, first = (build("wheel", at, tmp_path / to) for at, to in ((source, "a"), (ROOT, "b")))
    assert held_by(again) == held_by(first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_a_build_has_the_same_bytes_twice(kind, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    first = build(kind, source, tmp_path / "first").read_bytes()
    (source / "README.md").touch()
    assert build(kind, source, tmp_path / "second").read_bytes() == first
    (source / "README.md").write_text("# another\n")
    assert build(kind, source, tmp_path / "third").read_bytes() != first


def test_a_release_fills_in_its_links(tmp_path):
    """By the commands of the checklist, in a copy: no link is left that an index cannot follow."""
    for name in ("README.md", "pyproject.toml", "docs/how-to-verify.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    script = re.search(r"```sh\n(.*?)```", (ROOT / "docs/releasing.md").read_text(), re.S)[1]
    wanted = {"REPOSITORY": "someone/minilora", "TAG": "v1"}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=os.environ | wanted, check=True)
    readme = (tmp_path / "README.md").read_text()
    links = re.findall(r"\]\(([^)]*)\)", readme)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    for link in links:
        assert (ROOT / link.partition("/blob/v1/")[2]).exists(), link
    assert "OWNER" not in (tmp_path / "pyproject.toml").read_text().replace("# OWNER", "")
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert all("//github.com/someone/minilora" in url for url in urls.values())
