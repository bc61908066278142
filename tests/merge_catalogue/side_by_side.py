"""`minilora audit merged` and deltalint on the same files: who finds what, who accuses falsely.

``python -m merge_catalogue.side_by_side PYTHON --output FILE``, where PYTHON has deltalint, records
it: every wrong merge of the plan, every right merge, and the time and memory on a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from merge_catalogue import WRONGS, right, trial, zoo
from merge_catalogue.worlds import BF16, adapt, smollm2, write_model

WORKER = """
import json, sys
from deltalint import check_merge
from deltalint.cli import _exit_code
out, sys.stdout = sys.stdout, sys.stderr  # it prints a line now and then
for line in sys.stdin:
    paths = json.loads(line)
    try:
        report = check_merge(**paths)
        status = _exit_code(report)
        words = sorted({x.diagnosis for x in report.layers if x.diagnosis})
    except Exception as error:
        status, words = 2, [type(error).__name__]
    print(json.dumps([status, words]), file=out, flush=True)
"""
MEASURE = """
import json, os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(json.dumps({"seconds": time.monotonic() - began, "cpu": usage.ru_utime + usage.ru_stime,
                  "peak": usage.ru_maxrss * 1024, "status": process.returncode}))
"""
OUTCOMES = {0: "right", 1: "wrong", 2: "unreadable", 3: "not decided"}
"""Of deltalint, by its exit status."""
VAGUE = {"UNEXPLAINED", "BIT_EXACT_MISMATCH", "SAVED_MODULE_MISMATCH"}
"""Its diagnoses that name no cause."""


class Deltalint:
    """deltalint in a process of its own, asked for one merge after the other."""

    def __init__(self, python):
        self.python = python
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [self.python, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, base, adapter, merged):
        """Its outcome and the causes that it names."""
        paths = {"base_dir": str(base), "adapter_dir": str(adapter), "merged_dir": str(merged)}
        self.process.stdin.write(json.dumps(paths) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("["):
                status, words = json.loads(line)
                return OUTCOMES[status], words
        self.close()
        self.start()
        return "unreadable", ["crashed"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def group_of(wrong):
    function = wrong.make or wrong.spoil
    return function.__module__.rsplit(".", 1)[-1]


def check_asked(peer):
    """Make sure that it is asked as it expects: it knows a plain right merge and a wrong one."""
    with tempfile.TemporaryDirectory() as folder:
        bench = trial.Bench(zoo.world("llama"), Path(folder))
        for tensors, outcome in ((None, "right"), (bench.world.base, "wrong")):
            bench.audit(tensors)
            said, words = peer.ask(bench.base, bench.adapter, Path(folder) / "merged")
            if said != outcome:
                raise RuntimeError(f"deltalint says {said} {words} of a merge that is {outcome}")


def wrong_merges(peer, share):
    """A row for each wrong merge of the plan; of two adapters deltalint takes none."""
    for name in zoo.SMALL:
        with tempfile.TemporaryDirectory() as folder:
            bench = trial.Bench(zoo.world(name), Path(folder))
            for mistake in trial.chosen(name, share):
                wrong = WRONGS[mistake]
                found = bench.trial(wrong)
                said, words = (
                    ("not asked", [])
                    if wrong.two
                    else peer.ask(bench.base, bench.adapter, Path(folder) / "merged")
                )
                yield {
                    "world": name, "wrong": mistake, "group": group_of(wrong),
                    "decidable": found.decidable, "found": found.found,
                    "missed": len(found.missed), "accused": len(found.accused),
                    "named": found.named, "deltalint": said,
                    "deltalint_named": bool(set(words) - VAGUE),
                }  # fmt: skip


def right_merges(peer):
    """A row for each right merge."""
    for name, make in right.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            made = make(Path(folder))
            report = trial.audit_merged(made.base, made.adapters, made.merged, made.weights)
            said, _ = (
                ("not asked", [])
                if len(made.adapters) > 1
                else peer.ask(made.base, made.adapters[0], made.merged)
            )
            status = {0: "right", 1: "wrong", 4: "not decided"}[report.exit_status]
            yield {"case": name, "minilora": status, "deltalint": said}


def measured(command):
    """The seconds and the peak of memory of a process, and its exit status."""
    # A process begins with the memory of the one that starts it: started by a small one.
    return json.loads(subprocess.check_output([sys.executable, "-c", MEASURE, *command], text=True))


def costs(python):
    """Time and memory of both on SmolLM2-135M, right and with one layer's change left out."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        world = adapt(smollm2(BF16), r=16, effect=0.02)
        base, adapter = world.write(place)
        last = max(t.layer for t in world.sites)
        merges = {
            "right": world.merge(),
            "a layer left out": world.merge(sites=[t for t in world.sites if t.layer < last]),
        }
        for label, tensors in merges.items():
            merged = write_model(place / "merged", tensors, world.config)
            paths = ["--base", str(base), "--adapter", str(adapter), "--merged", str(merged)]
            for tool, command in (
                ("minilora", [sys.executable, "-m", "minilora", "audit", "merged", *paths]),
                ("deltalint", [python, "-m", "deltalint.cli", "check", *paths]),
            ):
                yield {
                    "merge": label,
                    "tool": tool,
                    "bytes": 2 * (base / "model.safetensors").stat().st_size,
                    **measured(command),
                }


def record(python, share):
    peer = Deltalint(python)
    try:
        check_asked(peer)
        return {
            "versions": {name: version(name) for name in ("minilora", "numpy", "peft", "torch")},
            "deltalint": subprocess.check_output(
                [python, "-c", "import deltalint; print(deltalint.__version__)"], text=True
            ).strip(),
            "machine": f"{os.cpu_count()} processors, {platform.machine()}",
            "wrong": list(wrong_merges(peer, share)),
            "right": list(right_merges(peer)),
            "costs": list(costs(python)),
        }
    finally:
        peer.close()


# --- tables ---

GROUPS = {
    "scales": "another factor", "places": "another place, part or order",
    "tables": "tables, heads, tokens, saved modules",
    "sources": "another base or adapter, roundings",
    "variants": "DoRA, PiSSA, AdaLoRA, VeRA", "several": "two adapters",
    "files": "files, names, settings",
}  # fmt: skip


def table(head, rows):
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def wrong_table(data):
    """How many of the wrong merges each finds, by what went wrong."""
    rows = []
    for group, label in [*GROUPS.items(), (None, "**all**")]:
        of = [r for r in data["wrong"] if group in (None, r["group"]) and r["decidable"]]
        said = Counter(r["deltalint"] for r in of)
        named = sum(r["deltalint_named"] and r["deltalint"] == "wrong" for r in of)
        rows.append(
            [
                label,
                len(of),
                sum(r["found"] and not r["missed"] for r in of),
                sum(r["named"] for r in of),
                said["wrong"] + said["unreadable"],
                named,
                said["right"],
                said["not decided"] + said["not asked"],
            ]
        )
    return table(
        [
            "what went wrong",
            "merges",
            "minilora finds",
            "and names",
            "deltalint finds",
            "and names",
            "says right",
            "does not decide",
        ],
        rows,
    )


def program_of(case):
    """The program, or the order of summation, of a right merge."""
    for start in ("peft two", "peft", "mlx-lm", "minilora"):
        if case.startswith(start):
            return start
    return "other orders"


def right_table(data):
    """How many of the right merges each takes for wrong."""
    rows = []
    for program in (*dict.fromkeys(program_of(r["case"]) for r in data["right"]), None):
        of = [r for r in data["right"] if program in (None, program_of(r["case"]))]
        ours, theirs = (Counter(r[tool] for r in of) for tool in ("minilora", "deltalint"))
        rows.append(
            [
                program or "**all**",
                len(of),
                ours["wrong"],
                ours["not decided"],
                theirs["wrong"],
                theirs["unreadable"] + theirs["not decided"] + theirs["not asked"],
            ]
        )
    return table(
        [
            "right merges by",
            "merges",
            "minilora accuses",
            "does not decide",
            "deltalint accuses",
            "does not decide",
        ],
        rows,
    )


def cost_table(data):
    """Seconds, processor seconds and megabytes of each."""
    return table(
        ["SmolLM2-135M in bfloat16", "program", "seconds", "processor", "peak memory", "status"],
        [
            [
                r["merge"],
                r["tool"],
                f"{r['seconds']:.1f}",
                f"{r['cpu']:.1f}",
                f"{r['peak'] / 1e6:.0f} MB",
                r["status"],
            ]
            for r in data["costs"]
        ],
    )


def accused(data):
    """The right merges that deltalint takes for wrong."""
    return [r["case"] for r in data["right"] if r["deltalint"] == "wrong"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="a Python that has deltalint")
    parser.add_argument(
        "--share", type=int, default=2, help="in how many worlds each mistake is tried"
    )
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    data = record(options.python, options.share)
    Path(options.output).write_text(json.dumps(data, indent=1) + "\n")
    print(wrong_table(data), right_table(data), cost_table(data), sep="\n\n")


if __name__ == "__main__":
    main()
