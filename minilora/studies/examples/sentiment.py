"""Sentiment of tweets and reviews: MiniLM with adapters against a head alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.loading import open_base
from minilora.spec.ops import Array
from minilora.studies.examples.probe import best_probe, features, row_order
from minilora.studies.examples.result import Settings, check_finished, fit_run, write_result
from minilora.studies.examples.texts import (
    ARCHIVE,
    DEAD_ZONE,
    SHARES,
    Rated,
    divided,
    minilm,
    rated,
    write_splits,
)
from minilora.training import data
from minilora.training.batching import batches_of
from minilora.training.config import TrainConfig
from minilora.training.evaluate import measure
from minilora.training.metrics import accuracy, paired
from minilora.training.run import Run, prepare


@dataclass(frozen=True)
class Size:
    """How much of the texts is used, and how long."""

    train: int | None = None
    test: int | None = None
    epochs: int = 3
    length: int = 128


WHOLE, QUICK = Size(), Size(train=256, test=128, epochs=1, length=64)
"""The example, and a part of it that shows that it works."""


def sentiment(
    out: Path | str, archive: Path | str = ARCHIVE, settings: Settings | None = None
) -> dict[str, Any]:
    """MiniLM's adapters and a head, against the best head on frozen MiniLM; writes `RESULT`.

    Both heads stand in the same place and learn from the same texts. Train, validation and test
    texts come from different sources. The interval of the difference is drawn over sources.

    Errors: those of :func:`minilm` and :func:`rated`, and of `fit.fit`.
    """
    out, settings = Path(out), settings or Settings()
    size = QUICK if settings.quick else WHOLE
    base = open_base(str(minilm()))
    splits = _splits(archive, size, settings.seed)
    rows = {
        split: [{"text": text.text, "label": str(text.label)} for text in texts]
        for split, texts in splits.items()
    }
    folder = write_splits(out / "data", rows)
    config = TrainConfig(
        "classify",
        learning_rate=1e-3,
        dropout=0.1,
        warmup_steps=10,
        num_train_epochs=size.epochs,
        max_length=size.length,
        seed=settings.seed,
    )
    examples = data.read(folder, config.task, base.tokenizer, config.max_length)
    settings.tell(", ".join(f"{len(texts)} texts to {split}" for split, texts in splits.items()))
    run = prepare(base, examples, config, str(folder), settings.plan)

    labels = {split: np.array([e.label for e in run.examples(split)]) for split in SHARES}
    decay, probed = _probed(run, labels)
    settings.tell(f"a head alone: {_share(probed)}")
    outcome = fit_run(out / "adapter", run, watch=settings.watch, tell=settings.tell)
    check_finished(outcome)
    adapted = _right(run, run.weights(outcome.state.params))
    settings.tell(f"with adapters: {_share(adapted)}")
    figures = {
        "texts": {split: len(texts) for split, texts in splits.items()},
        "sources": {split: len({t.source for t in texts}) for split, texts in splits.items()},
        "dead_zone": DEAD_ZONE,
        "most_frequent": max(np.bincount(labels["test"])) / len(labels["test"]),
        "probe": accuracy(probed)._asdict() | {"decay": decay},
        "adapted": accuracy(adapted)._asdict(),
        "paired": paired(adapted, probed, [t.source for t in splits["test"]])._asdict(),
    }
    return write_result(out, "sentiment", settings, base, outcome, figures, archive)


def _splits(archive: Path | str, size: Size, seed: int) -> dict[str, list[Rated]]:
    most = {"train": size.train, "valid": size.test, "test": size.test}
    return {split: texts[: most[split]] for split, texts in divided(rated(archive), seed).items()}


def _probed(run: Run, labels: Mapping[str, Array]) -> tuple[float, Array]:
    """The best probe's decay, and which test labels it gets right."""
    tokens = run.config.batch_tokens
    x = {split: features(run.examples(split), run.base.weights, run.c, tokens) for split in SHARES}
    return best_probe(x, labels, len(run.data.classes))


def _right(run: Run, W: Any) -> Array:
    """Which test labels the adapted model gets right, in the order of the examples."""
    test, tokens = run.examples("test"), run.config.batch_tokens
    measured = measure(batches_of(test, tokens, run.pad), W, run.c, run.spec)
    assert measured.right is not None
    right: Array = measured.right[np.argsort(row_order(test, tokens))]
    return right


def _share(right: Sequence[bool] | Array) -> str:
    share, low, high, n = accuracy(np.asarray(right))
    return f"{share:.4f} right, {low:.4f} to {high:.4f} at 95%, of {n}"
