"""``minilora doctor``: what is installed, and what can be run with it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from minilora.cli.console import FAILED, OK, say
from minilora.cli.options import add_command, processors


def add(commands: Any) -> None:
    """Add the command."""
    add_command(
        commands,
        "doctor",
        "show what is installed, and what can be run with it",
        "Print the versions of minilora, Python, NumPy and its linear algebra, the libraries that "
        "are installed and can be verified, and what is missing or too old, with the command that "
        "installs it. Paste it into a bug report.",
        _run,
        "0 all that minilora requires is there, 1 something is missing or too old",
    )


FOR = {
    "dask": "--executor dask: work on other machines",
    "dev": "the linters of this repository",
    "docs": "building the documentation",
    "gguf": "reading and writing GGUF files",
    "llama-cpp": "tests that compare with llama.cpp",
    "mpi": "mpiexec minilora train: one run in several processes",
    "parquet": "training data in parquet files",
    "plot": "pictures of a training run",
    "pytest": "the checks as tests of pytest",
    "servers": "tests that audit a server",
    "test": "the tests of this repository",
    "text": "tokenizers, chat templates and ROUGE",
}
"""What the extras are for that install no library to verify."""


class Requirement(NamedTuple):
    """A distribution that an extra ("" for minilora itself) requires, and its least release."""

    distribution: str
    least: str
    extra: str

    @property
    def lack(self) -> str:
        """What is wrong with what is installed, or ""."""
        installed = version_of(self.distribution)
        if installed is None:
            return f"{self.distribution} is missing"
        if _key(installed) < _key(self.least):
            return f"{self.distribution} is {installed}, expected {self.least} or newer"
        return ""


def _run(arguments: argparse.Namespace) -> int:
    needed = requirements(required())
    lacks = [lack for each in needed[""] if (lack := each.lack)]
    lines = [*_machine(), "", *_required(needed[""], lacks), "", *_peers()]
    if extras := [*_extras(needed)]:
        lines += ["", "for other uses:", *extras]
    say("\n".join(lines) + "\n")
    return FAILED if lacks else OK


def required() -> list[str]:
    """What the installed package requires, a line each; nothing of a checkout that is none."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        return requires("minilora") or []
    except PackageNotFoundError:
        return []


def requirements(lines: list[str]) -> dict[str, list[Requirement]]:
    """What each extra requires, by the lines of the installed package's metadata."""
    import re

    needed: dict[str, list[Requirement]] = {"": []}
    for line in lines:
        name, _, rest = line.partition(";")
        if not _is_for_here(rest):
            continue
        found = re.match(r"([\w.-]+)(?:\[[^]]*\])?(?:>=([\w.]+))?", name.replace(" ", ""))
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", rest)
        assert found is not None
        requirement = Requirement(found[1], found[2] or "0", extra[1] if extra else "")
        needed.setdefault(requirement.extra, []).append(requirement)
    return needed


def version_of(distribution: str) -> str | None:
    """The installed version; None without the distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _is_for_here(conditions: str) -> bool:
    """Whether a requirement is for this system: of its conditions only sys_platform is known."""
    import re
    import sys

    told = re.search(r"sys_platform\s*([!=]=)\s*['\"](\w+)", conditions)
    return told is None or (told[1] == "==") == (sys.platform == told[2])


def _key(version: str) -> tuple[int, ...]:
    import re

    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:4])


def _machine() -> Iterator[str]:
    import platform
    import sys
    from pathlib import Path

    import numpy  # noqa: F401 - loads the library that is asked for below
    from threadpoolctl import threadpool_info

    import minilora

    yield f"minilora {minilora.__version__}, {Path(minilora.__file__).parent}"
    yield f"Python {platform.python_version()}, {sys.executable}"
    yield f"{platform.system()} {platform.machine()}, {processors()} processors"
    for pool in threadpool_info():
        kernels = f", kernels {pool['architecture']}" if pool.get("architecture") else ""
        yield (
            f"{pool['user_api']}: {pool['internal_api']} {pool['version'] or ''}".rstrip()
            + f", {pool['num_threads']} threads{kernels}"
        )


def _required(needed: list[Requirement], lacks: list[str]) -> Iterator[str]:
    listed = ", ".join(f"{each.distribution} {version_of(each.distribution)}" for each in needed)
    if not needed:
        yield "minilora is not installed, and run from a checkout: what it requires is not known"
        yield "install it: python -m pip install -e CHECKOUT"
        return
    yield from (f"required: {lack}" for lack in lacks) if lacks else [f"required: {listed}"]
    if lacks:
        yield "install it: python -m pip install --upgrade minilora"


def _peers() -> Iterator[str]:
    """The libraries that are installed, and those that are not, with what installs them."""
    from minilora.verify.peers import PEERS

    width = max(map(len, PEERS))
    there, absent = [], []
    for name, peer in sorted(PEERS.items()):
        missing = [package for package in peer.packages if version_of(package) is None]
        if missing:
            absent.append(f"  {name:{width}}  {_missing(missing)}: {_install(peer.extra)}")
        else:
            there.append(f"  {name:{width}}  {peer.version}")
    yield "installed, for minilora verify NAME:" if there else "no library to verify is installed"
    yield from there
    if absent:
        yield "not installed:"
        yield from absent


def _extras(needed: Mapping[str, list[Requirement]]) -> Iterator[str]:
    """The extras that are not for one library alone, and what each lacks."""
    width = max(map(len, FOR))
    for extra, purpose in FOR.items():
        if extra not in needed:
            continue
        lacks = [each for each in needed[extra] if each.lack]
        absent = [each.distribution for each in lacks if version_of(each.distribution) is None]
        told = [_missing(absent)] if absent else []
        told += [each.lack for each in lacks if each.distribution not in absent]
        state = f"{'; '.join(told)}: {_install(extra)}" if told else "all there"
        yield f"  {extra:{width}}  {purpose}; {state}"


def _missing(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _install(extra: str) -> str:
    return f"python -m pip install 'minilora[{extra}]'"
