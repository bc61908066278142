"""What a target's own process costs: `minilora verify` with it and with ``--in-process``.

``python -m minilora.studies.apart TARGET … --output FILE`` records it: the processor time of all
processes of a run, by turns of both. What else runs on the machine changes it less than the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from minilora import __version__

PAIRS = 5
OWN = "minilora"
"""What minilora itself is called among the targets."""


def processor_seconds(command: Sequence[str]) -> float:
    """The processor time of a command and of all that it waited for.

    A library may deviate. Raises RuntimeError where it was not checked.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        shown = " ".join(command)
        raise RuntimeError(f"{shown} ended with exit status {process.returncode}, expected 0 or 1")
    return usage.ru_utime + usage.ru_stime


def pairs(command: Sequence[str], number: int) -> list[tuple[float, float]]:
    """Seconds with a process of its own and without, side by side, so many times."""
    return [
        (
            processor_seconds([*command, "--jobs", "1"]),
            processor_seconds([*command, "--in-process"]),
        )
        for _ in range(number)
    ]


def measured(target: str, profile: str, number: int) -> dict[str, Any]:
    """The pairs of a target in a profile."""
    command = [sys.executable, "-m", "minilora", "verify", *([] if target == OWN else [target])]
    command += ["--profile", profile]
    found = [[round(seconds, 2) for seconds in pair] for pair in pairs(command, number)]
    return {"target": target, "profile": profile, "pairs": found}


def table(entries: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of what was measured."""
    rows = [
        "| target | profile | pairs | own process | in process | more |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        apart, inside = (median(column) for column in zip(*entry["pairs"], strict=True))
        more = sorted(100 * (a / b - 1) for a, b in entry["pairs"])
        rows.append(
            f"| {entry['target']} | {entry['profile']} | {len(more)} | {apart:.1f} s | "
            f"{inside:.1f} s | {median(more):.0f} % ({more[0]:.0f} to {more[-1]:.0f}) |"
        )
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the targets in the profiles, and writes what was measured so far after each."""
    parser = argparse.ArgumentParser(prog="python -m minilora.studies.apart")
    parser.add_argument("targets", nargs="+", metavar="TARGET", help=f"a peer, or {OWN}")
    parser.add_argument("--profile", action="append", help="quick or ci (default: both)")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args(arguments)
    entries: list[dict[str, Any]] = []
    for target in asked.targets:
        for profile in asked.profile or ("quick", "ci"):
            entries.append(measured(target, profile, asked.pairs))
            about = {
                "minilora": __version__,
                "machine": f"{platform.machine()}, {platform.system()}",
            }
            text = json.dumps(about | {"measured": entries}, indent=1)
            asked.output.write_text(f"{text}\n", encoding="utf-8")
    print(table(entries), end="")


if __name__ == "__main__":
    main()
