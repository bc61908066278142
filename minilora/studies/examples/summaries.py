"""Summaries of papers: SmolLM2 before and after fine-tuning from a four-bit file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.loading import AdaptedModel, open_adapted, open_base
from minilora.spec.ops import Array
from minilora.studies.examples.result import (
    Settings,
    check_finished,
    fit_run,
    training_figures,
    write_result,
)
from minilora.studies.examples.texts import papers, smollm2, write_splits
from minilora.training import data
from minilora.training.batching import batches_of
from minilora.training.config import TrainConfig
from minilora.training.evaluate import answers, measure
from minilora.training.example import Example
from minilora.training.metrics import difference, perplexity, rouge
from minilora.training.run import prepare


@dataclass(frozen=True)
class Size:
    """How many papers are used, of which length, and how many summaries are written."""

    train: int = 64
    test: int = 20
    length: int = 512
    written: int = 20
    tokens: int = 48


WHOLE, QUICK = Size(), Size(train=4, test=2, length=160, written=1, tokens=8)
"""The example, and a part of it that shows that it works."""


def summaries(out: Path | str, settings: Settings | None = None) -> dict[str, Any]:
    """SmolLM2's summaries of papers before and after fine-tuning; writes `RESULT`.

    Training reads the matrices as the file stores them and recomputes activations; ``memory`` is
    the most that the process held by the end of training. Losses and texts are of papers that were
    not trained on. The interval of the loss's difference is drawn over papers.

    Errors: those of :func:`smollm2` and :func:`papers`, and of `fit.fit`.
    """
    out, settings = Path(out), settings or Settings()
    size = QUICK if settings.quick else WHOLE
    path, splits = smollm2(), papers()
    chosen = {"train": splits["train"][: size.train], "test": splits["test"][: size.test]}
    folder = write_splits(out / "data", chosen)
    config = TrainConfig(
        "summarize",
        learning_rate=1e-3,
        warmup_steps=5,
        max_length=size.length,
        batch_tokens=size.length,
        gradient_accumulation_steps=2,
        seed=settings.seed,
    )
    base = open_base(str(path), keep_quantized=True)
    examples = data.read(folder, config.task, base.tokenizer, config.max_length)
    plan = replace(settings.plan, gradient_checkpointing=True)
    run = prepare(base, examples, config, str(folder), plan)
    outcome = fit_run(out / "adapter", run, watch=settings.watch, tell=settings.tell)
    check_finished(outcome)
    figures: dict[str, Any] = {
        "papers": {split: len(run.examples(split)) for split in chosen},
        "cut": examples.truncated,
        "length": config.max_length,
    }
    figures |= training_figures(out / "adapter")
    # Dense weights: generating a token from four-bit ones would expand all of them again.
    dense, test = open_base(str(path)), run.examples("test")
    losses = {}
    for when, adapter in {"before": None, "after": str(out / "adapter")}.items():
        model = open_adapted(dense, adapter)
        losses[when], measured = _measured(model, test, size)
        figures |= {"wanted": measured.pop("wanted"), "written": measured.pop("written")}
        figures[when] = measured
        settings.tell(f"{when}: loss {measured['loss']:.4f}, {measured['text']!r}")
    change = losses["after"][:, 0] - losses["before"][:, 0]
    figures["difference"] = difference(change, losses["after"][:, 1])._asdict()
    return write_result(out, "summaries", settings, base, outcome, figures)


def _measured(
    model: AdaptedModel, test: Sequence[Example], size: Size
) -> tuple[Array, dict[str, Any]]:
    """Each paper's loss and number of labels; and the model's loss, ROUGE and first summary."""
    c = model.base.config
    losses = []
    for example in test:
        batches = batches_of([example], size.length, 0)
        paper = measure(batches, model.weights, c, model.tuning)
        losses.append([paper.nll, paper.count])
    counted = np.array(losses)
    loss = float(counted[:, 0].sum() / counted[:, 1].sum())
    written, expected = answers(
        test[: size.written],
        model.weights,
        c,
        model.tuning,
        model.base.tokenizer,
        size.tokens,
    )
    return counted, {
        "loss": loss,
        "perplexity": perplexity(loss),
        "rouge": rouge(written, expected),
        "text": written[0],
        "wanted": expected[0],
        "written": len(written),
    }
