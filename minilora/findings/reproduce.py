"""The scripts that show findings without minilora, and what they printed.

``scripts/LIBRARY/NAME.py`` is the script of the finding LIBRARY.NAME: the algebra in its first
lines, then about ten lines that print ``got`` and ``expected``. ``python -m
minilora.findings.reproduce`` runs all whose libraries are installed and records what they print in
``scripts/printed.json``; with ids, those alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
PRINTED = SCRIPTS / "printed.json"
BESIDE = ("torch", "transformers", "mlx")
"""Distributions whose release has a part in what is printed, errors above all."""


@dataclass(frozen=True)
class Printed:
    """What a script printed: what it got, what is right, and with which releases."""

    got: str
    expected: str
    releases: Mapping[str, str] = field(default_factory=dict)

    @property
    def shows(self) -> bool:
        """Whether the library deviates."""
        return self.got != self.expected

    @property
    def text(self) -> str:
        """As it was printed."""
        return f"got      {self.got}\nexpected {self.expected}\n"


def path_of(id: str) -> Path:
    """Where the script of a finding is, if it has one."""
    library, _, name = id.rpartition(".")
    return SCRIPTS / library / f"{name}.py"


def script(id: str) -> str:
    """The script of a finding; "" for one that was read and not run."""
    path = path_of(id)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def algebra(text: str) -> str:
    """What is right: the comment that a script begins with, in one line."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def run(text: str, distribution: str = "") -> Printed:
    """Run a script here, without its warnings. Errors: ValueError unless it prints both lines."""
    out = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        exec(compile(text, "script", "exec"), {"__name__": "__main__"})
    lines = out.getvalue().splitlines()
    said = {
        word: line.removeprefix(word).strip()
        for line in lines
        for word in ("got", "expected")
        if line.startswith(f"{word} ")
    }
    if said.keys() != {"got", "expected"}:
        raise ValueError(f"printed {lines}, expected a line with got and one with expected")
    return Printed(**said, releases=releases(distribution, text))


def releases(distribution: str, text: str) -> dict[str, str]:
    """The installed releases of a library, and of what its script uses beside it."""
    beside = [each for each in BESIDE if re.search(rf"^(import|from) {each}\b", text, re.M)]
    found = {}
    for name in filter(None, [distribution, *beside]):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def printed() -> dict[str, Printed]:
    """What is recorded, by the ids of findings."""
    found: dict[str, Any] = json.loads(PRINTED.read_text()) if PRINTED.is_file() else {}
    return {id: Printed(**each) for id, each in found.items()}


def record(ids: list[str]) -> None:
    """Run the scripts of these findings, or of all, and record what they print."""
    from minilora.findings import FINDINGS, LIBRARIES

    found = dict(printed())
    for id, finding in FINDINGS.items():
        text = script(id)
        if not text or (ids and id not in ids):
            continue
        try:
            found[id] = run(text, LIBRARIES[finding.library].distribution)
        except ModuleNotFoundError as error:
            print(f"{id}: not run: {error}")
            continue
        print(f"{id}: {found[id].got} for {found[id].expected}", flush=True)
    known = {id: asdict(found[id]) for id in FINDINGS if id in found}
    PRINTED.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
