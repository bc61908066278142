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
        "Print the versions of minilora, Python, NumPy and its linear algebra, what is missing or "
        "too old for each extra, and the libraries that can be verified. Paste it into a bug "
        "report.",
        _run,
        "0 all that minilora requires is there, 1 something is missing or too old",
    )


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
    lines = [*_machine(), "", *_required(needed[""], lacks), "", *_extras(needed), "", *_peers()]
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
        return
    yield from (f"required: {lack}" for lack in lacks) if lacks else [f"required: {listed}"]
    if lacks:
        yield "install it: python -m pip install --upgrade minilora"


def _extras(needed: Mapping[str, list[Requirement]]) -> Iterator[str]:
    width = max(map(len, needed))
    for extra in sorted(needed.keys() - {""}):
        lacks = "; ".join(lack for each in needed[extra] if (lack := each.lack))
        remedy = f"{lacks}: python -m pip install 'minilora[{extra}]'"
        yield f"extra {extra:{width}}  {remedy if lacks else 'complete'}"


def _peers() -> Iterator[str]:
    from minilora.verify.peers import PEERS

    width = max(map(len, PEERS))
    for name, peer in sorted(PEERS.items()):
        missing = [package for package in peer.packages if version_of(package) is None]
        remedy = f"{', '.join(missing)} missing: python -m pip install 'minilora[{peer.extra}]'"
        yield f"verify {name:{width}}  {remedy if missing else peer.version}"
