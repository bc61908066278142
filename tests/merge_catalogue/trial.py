"""Make the catalogue's merges on a world, audit them, and count what was found.

``python -m merge_catalogue.trial [WORLD …]`` prints what was missed, misnamed or accused falsely.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from merge_catalogue import WRONGS, Wrong, zoo
from merge_catalogue.decidable import Right
from merge_catalogue.several import merged_with_both
from merge_catalogue.worlds import World, adapt, write_adapter, write_model
from minilora.audit.merged import merged as audit_merged
from minilora.audit.result import Report
from minilora.io.errors import FormatError

WEIGHTS = (0.7, 0.4)


@dataclass(frozen=True)
class Trial:
    """One wrong merge of a world: what is decidable, and what the audit said.

    ``decidable``: the tensors that no right merge has; ``missed``: those of them without a
    deviation; ``accused``: tensors as in a right merge that have one; ``named``: whether the
    mistake is named; ``words``: what the audit said first.
    """

    world: str
    wrong: str
    decidable: bool
    found: bool
    named: bool
    missed: tuple[str, ...] = ()
    accused: tuple[str, ...] = ()
    words: str = ""

    @property
    def good(self):
        """All that is decidable is found, and nothing else."""
        return (self.found or not self.decidable) and not self.missed and not self.accused

    def __str__(self):
        what = (
            ("" if self.found or not self.decidable else "NOT FOUND ")
            + (f"MISSED {len(self.missed)} {self.missed[:2]} " if self.missed else "")
            + (f"ACCUSED {len(self.accused)} {self.accused[:2]} " if self.accused else "")
            + ("" if self.named or not self.decidable else "unnamed ")
        )
        return f"{self.world}: {self.wrong}: {what}| {self.words}"


class Bench:
    """A world's files, and the trials of the catalogue's mistakes on it."""

    def __init__(self, world: World, folder: Path):
        self.world, self.folder = world, folder
        self.base, self.adapter = world.write(folder)
        self.right = Right(world)

    def audit(self, tensors=None, spoil=None, second=None) -> Report | FormatError:
        """The audit of the tensors as a merged model, or of a spoiled right merge."""
        place = self.folder / "merged"
        shutil.rmtree(place, ignore_errors=True)
        tensors = self.world.merge() if tensors is None else tensors
        untied = "lm_head.weight" in tensors
        config = self.world.merged_config if untied else self.world.config
        write_model(place, tensors, config)
        if spoil:
            spoil(place, self.world)
        adapters, weights = [self.adapter], None
        if second is not None:
            adapters, weights = [*adapters, second], WEIGHTS
        try:
            return audit_merged(self.base, adapters, place, weights)
        except FormatError as error:
            return error

    def trials(self, only=WRONGS) -> Iterator[Trial]:
        """A trial of each mistake that can happen in this world."""
        for name in only:
            if WRONGS[name].where(self.world):
                yield self.trial(WRONGS[name])

    def trial(self, wrong: Wrong) -> Trial:
        """What the audit makes of one mistake."""
        if wrong.spoil is not None:
            return self._of_files(wrong)
        right, path = self.right, None
        if wrong.two:
            second = self.second()
            path = write_adapter(self.folder / "second", second.adapter, second.settings)
            right = Right(weighted(self.world, WEIGHTS[0]), weighted(second, WEIGHTS[1]))
            tensors = wrong.make(self.world, second, WEIGHTS)
            whole = merged_with_both(self.world, second, WEIGHTS)
        else:
            tensors, whole = wrong.make(self.world), self.world.merge()
        innocent = {n for n, a in whole.items() if n in tensors and same(a, tensors[n])}
        report = self.audit(tensors, second=path)
        return judged(wrong, self.world, right.outside(tensors), innocent, report)

    def second(self) -> World:
        """Another adapter of the same modules, of another rank and scale."""
        world, settings = self.world, self.world.settings
        kinds = "|".join(rf"{kind}$" for kind in settings["target_modules"])
        table = any(kind in ("embed_tokens", "wte") for kind in settings["target_modules"])
        return adapt(world, r=3, alpha=4, effect=0.05, seed=21, targets=kinds, table=table)

    def _of_files(self, wrong: Wrong) -> Trial:
        report = self.audit(spoil=wrong.spoil)
        if isinstance(report, FormatError):
            return Trial(
                self.world.name, wrong.name, True, wrong.unreadable, True, words=str(report)
            )
        told = [e for e in report.entries if e.verdict in wrong.verdicts]
        named = [e for e in told if says(wrong, e, report.cause)]
        words = first_words(report)
        found = report.exit_status == 1 or any(e.severity != "ok" for e in told)
        return Trial(self.world.name, wrong.name, True, found, bool(named), words=words)


def weighted(world: World, weight: float) -> World:
    """The adapter times a weight, as one with another lora_alpha."""
    settings = dict(world.settings)
    settings["lora_alpha"] *= weight
    if settings.get("alpha_pattern"):
        settings["alpha_pattern"] = {k: v * weight for k, v in settings["alpha_pattern"].items()}
    return replace(world, settings=settings)


def says(wrong, entry, cause=""):
    """Whether the entry, or the report's cause, names the mistake."""
    text = " ".join(
        (entry.subject, entry.verdict.replace("-", " "), entry.mistake, entry.text, cause)
    )
    return entry.verdict in wrong.verdicts and re.search(wrong.says, text, re.I)


def first_words(report):
    worst = [e for e in report.worst_first if e.severity != "ok"][:1]
    return " // ".join(f"{e.verdict}[{e.mistake}] {e.subject}: {e.text}" for e in worst)[:300]


def told_of(entry):
    """Whether the entry says that the tensor is not as a right merge leaves it."""
    return entry.severity == "deviation" or entry.verdict == "coarser"


def same(one, two):
    """Whether two tensors have the same shape and bits."""
    return one.shape == two.shape and one.tobytes() == two.tobytes()


def judged(wrong: Wrong, world: World, decidable: set[str], innocent: set[str], report) -> Trial:
    """The trial, by the tensors that are decidable and those that the mistake left right."""
    if isinstance(report, FormatError):
        return Trial(world.name, wrong.name, True, wrong.unreadable, True, words=str(report))
    tensors = set(world.base) | {"lm_head.weight"}
    deviant = {e.subject for e in report.entries if told_of(e)} & tensors
    if "model.embed_tokens.weight" in decidable and world.config.get("tie_word_embeddings"):
        deviant -= {"lm_head.weight"} - decidable  # tied to what is wrong
    told = [e for e in report.entries if e.subject in decidable and told_of(e)]
    named = [e for e in told if says(wrong, e, report.cause)]
    return Trial(
        world.name,
        wrong.name,
        bool(decidable),
        bool(told),
        bool(named),
        tuple(sorted(decidable - deviant)),
        tuple(sorted((deviant & innocent) - decidable)),
        first_words(report),
    )


def right_merge(bench: Bench) -> str:
    """What the audit says against a right merge, of one adapter and of two; "" if nothing."""
    reports = [bench.audit()]
    if {t.variant for t in bench.world.sites} == {"lora"} and not bench.world.saved:
        second = bench.second()
        path = write_adapter(bench.folder / "second", second.adapter, second.settings)
        reports.append(bench.audit(merged_with_both(bench.world, second, WEIGHTS), second=path))
    return "; ".join(
        str(r) if isinstance(r, FormatError) else first_words(r)
        for r in reports
        if isinstance(r, FormatError) or r.exit_status != 0
    )


def counts_table(rows):
    """The recorded counts of each world."""
    lines = ["| model | merges | decidable | found | named | accused falsely |"]
    lines.append("| --- " + "| --: " * 5 + "|")
    for name, row in rows.items():
        accused = row["trials"] - row["good"] + row["alarms"]
        cells = [name, *(row[key] for key in ("trials", "decidable", "found", "named")), accused]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@cache
def plan(share: int, real: bool = False) -> dict[str, list[str]]:
    """World -> mistakes, so that each mistake is tried in ``share`` worlds, of those it fits."""
    worlds = [*(zoo.REAL if real else zoo.SMALL)]
    found: dict[str, list[str]] = {name: [] for name in worlds}
    for i, (name, mistake) in enumerate(WRONGS.items()):
        fits = [world for world in worlds if mistake.where(zoo.world(world))]
        step = max(1, len(fits) // share)
        for k in range(min(share, len(fits))):
            found[fits[(7 * i + k * step) % len(fits)]].append(name)
    return found


def chosen(world: str, share: int) -> list[str]:
    """The mistakes that the plan tries in this world."""
    return plan(share, world in zoo.REAL)[world]


def main(arguments):
    """Print what was not found, misnamed or falsely accused.

    ``arguments``: names of worlds, or "real", or the drawn ones; in how many worlds each mistake is
    tried, all of these unless given; and ``--output FILE``, to record the counts of each world.
    """
    output = None
    if "--output" in arguments:
        at = arguments.index("--output")
        output, arguments = Path(arguments[at + 1]), arguments[:at] + arguments[at + 2 :]
    rows = json.loads(output.read_text()) if output and output.exists() else {}
    every = zoo.SMALL | zoo.PEFT_MADE | zoo.REAL
    worlds = [name for name in arguments if name in every]
    worlds = worlds or [*(zoo.REAL if "real" in arguments else zoo.SMALL)]
    share = next((int(n) for n in arguments if n.isdigit()), 0)
    for name in worlds:
        began, alarm = time.monotonic(), ""
        total = named = decidable = found = good = 0
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(zoo.world(name), Path(folder))
            if alarm := right_merge(bench):
                print(f"FALSE ALARM {name}: {alarm}")
            mistakes = chosen(name, share) if share and name not in zoo.PEFT_MADE else WRONGS
            for trial in bench.trials(mistakes):
                total, good = total + 1, good + trial.good
                decidable += trial.decidable
                found += trial.found and trial.decidable
                named += trial.named and trial.decidable
                if not trial.good or (trial.decidable and not trial.named):
                    print(trial, flush=True)
        rows[name] = {
            "trials": total, "decidable": decidable, "found": found, "named": named,
            "good": good, "alarms": int(bool(alarm)),
        }  # fmt: skip
        print(f"--- {name}: {rows[name]}, {time.monotonic() - began:.1f} s", flush=True)
        if output:
            output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
