"""The way of gradients to the adapters, misread: cut off, doubled, or gone further than asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import Array
from minilora.verify.mutants.train import Trainer, trains
from minilora.verify.mutants.transition import equivalents, family


def _cut(which: Callable[[str, Weights], bool], factor: float = 0.0) -> Callable[[], Trainer]:
    """The gradients of these parameters are 0, or another multiple."""
    return trains(flown=lambda my, g, W: _changed(g, which, factor))


def _cut_where(
    when: Callable[[Trainer], bool], which: Callable[[str, Weights], bool], factor: float = 0.0
) -> Callable[[], Trainer]:
    """The same under a condition."""
    return trains(flown=lambda my, g, W: _changed(g, which, factor) if when(my) else g)


def _changed(g: Weights, which: Callable[[str, Weights], bool], factor: float) -> Weights:
    return {n: v * v.dtype.type(factor) if which(n, g) else v for n, v in g.items()}


def _recomputing(my: Trainer) -> bool:
    return bool(my.checkpointed)


def _dropping(my: Trainer) -> bool:
    return bool(my.dropout)


def _first(name: str, g: Weights) -> bool:
    """Of the first layer, where the second is adapted too."""
    return name.startswith("layers.0.") and _both(g)


def _both(g: Weights) -> bool:
    return len({name.split(".")[1] for name in g if name.startswith("layers.")}) > 1


def _lower_alone(name: str, g: Weights) -> bool:
    return name.startswith("layers.0.") and not _both(g)


def _factor(letter: str) -> Callable[[str, Weights], bool]:
    return lambda name, g: name.endswith(letter)


def _one_after_another(
    my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec
) -> Any:
    """A's gradient where B has made its step."""
    n, g = Trainer.part(my, W, batch, c, tuning)
    stepped = {k: W[k] - W[k].dtype.type(0.25) * v for k, v in g.items() if k.endswith(".B")}
    _, later = Trainer.part(my, W | stepped, batch, c, tuning)
    return n, {k: later[k] if k.endswith(".A") else v for k, v in g.items()}


def _lifted(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
    """A B of 0 taken for a small number."""
    small = {k: v + v.dtype.type(1e-3) for k, v in W.items() if k.endswith(".B") and not v.any()}
    return Trainer.part(my, W | small, batch, c, tuning)


def _evaluating(my: Trainer, W: Weights, batch: Batch, c: Config, tuning: TrainableSpec) -> Any:
    my.dropout = 0.0
    return Trainer.part(my, W, batch, c, tuning)


def _trained_too(names: Callable[[Weights], set[str]]) -> Callable[[], Trainer]:
    """Parameters of the base are trained with the adapters, and not given back."""

    def tuned(my: Trainer, c: Config, W: Weights, tuning: TrainableSpec) -> TrainableSpec:
        my.memory["asked"] = len(tuning.trained)
        return replace(tuning, trained=tuning.trained | names(W))

    def told(my: Trainer, adapter: dict[str, Array]) -> dict[str, Array]:
        return {name: v for name, v in adapter.items() if ".lora_" in name}

    return trains(tuned=tuned, told=told)


def _told(change: Callable[[dict[str, Array]], dict[str, Array]]) -> Callable[[], Trainer]:
    return trains(told=lambda my, adapter: change(adapter))


def _writes(which: str, name: str) -> Callable[[], Trainer]:
    """A file of one of the two folders is changed, of folders that are nobody else's."""

    def train(
        my: Trainer, model: str, adapter: str, batches: Sequence[Any], settings: Mapping[str, Any]
    ) -> Any:
        answer = Trainer.train(my, model, adapter, batches, settings)
        path = Path(model if which == "base" else adapter) / name
        if len(batches) == 2 and "gradient_checkpointing" not in settings:
            path.write_bytes(path.read_bytes() + b" " if path.exists() else b" ")
        return answer

    return trains(train=train)


EVERY = (
    *family(
        "FLOW",
        "grad-flow.all-layers",
        ("A-none", "no A has a gradient: dA = 0", _cut(_factor(".A"))),
        ("B-none", "no B has a gradient: dB = 0", _cut(_factor(".B"))),
        ("first-layer-none", "the first layer's adapters have none", _cut(_first)),
        ("k-none", "the keys' adapters have none", _cut(lambda n, g: ".k." in n)),
        ("v-none", "the values' adapters have none", _cut(lambda n, g: ".v." in n)),
        ("down-none", "the adapters of the last projection have none",
         _cut(lambda n, g: ".down." in n)),
        ("A-one-none", "one A has none", _cut(lambda n, g: n == "layers.0.o.A")),
        ("twice", "every gradient counts twice", _cut(lambda n, g: True, 2.0)),
        ("A-twice", "A's gradient counts twice", _cut(_factor(".A"), 2.0)),
        ("first-layer-twice", "the first layer's gradients count twice", _cut(_first, 2.0)),
        ("first-layer-halved", "the first layer's gradients are halved", _cut(_first, 0.5)),
    ),
    *family(
        "FLOW",
        "grad-flow.checkpointing",
        (
            "checkpointing-first-none",
            "under checkpointing the first layer's adapters have no gradient",
            _cut_where(_recomputing, _first),
            "transformers 26221",
            "microsoft/LoRA 120",
            "peft 1142",
        ),
        ("checkpointing-none", "under checkpointing no adapter has a gradient",
         _cut_where(_recomputing, lambda n, g: True)),
        ("checkpointing-A-none", "under checkpointing no A has a gradient",
         _cut_where(_recomputing, _factor(".A"))),
        ("checkpointing-twice", "what is computed again counts again",
         _cut_where(_recomputing, lambda n, g: True, 2.0)),
    ),
    *family(
        "FLOW",
        "grad-flow.first-layer",
        ("frozen-stops", "gradients end at a frozen layer", _cut(_lower_alone)),
        ("frozen-A-stops", "A's gradients end at a frozen layer",
         _cut(lambda n, g: _lower_alone(n, g) and n.endswith(".A"))),
    ),
    *family(
        "FLOW",
        "grad-flow.first-layer-checkpointing",
        ("checkpointing-frozen-stops", "under checkpointing gradients end at a frozen layer",
         _cut_where(_recomputing, _lower_alone), "transformers 26221"),
    ),
    *family(
        "FLOW",
        "grad-flow.last-layer",
        ("embedding-trained", "the embedding is trained too",
         _trained_too(lambda W: {"embed.weight"})),
        ("norms-trained", "the norms are trained too",
         _trained_too(lambda W: {n for n in W if ".norm" in n})),
        ("head-trained", "the head is trained too", _trained_too(lambda W: {"head.weight"})),
        ("base-trained", "every weight is trained", _trained_too(set)),
    ),
    *family(
        "FLOW",
        "grad-flow.zero-B",
        ("start-A-after-B", "A's gradient where B has made its step",
         trains(part=_one_after_another)),
        ("start-B-lifted", "B = 0 taken for a thousandth", trains(part=_lifted)),
        ("start-B-none", "a B of 0 has no gradient", trains(
            flown=lambda my, g, W: _changed(
                g, lambda n, g: n.endswith(".B") and not W[n].any(), 0.0))),
    ),
    *family(
        "FLOW",
        "grad-flow.dropout",
        ("dropout-none", "with dropout no adapter has a gradient",
         _cut_where(_dropping, lambda n, g: True)),
        ("dropout-A-none", "with dropout no A has a gradient",
         _cut_where(_dropping, _factor(".A"))),
        ("dropout-first-none", "with dropout the first layer has none",
         _cut_where(_dropping, _first)),
        ("dropout-ignored", "trained in evaluation mode: nothing is dropped",
         trains(part=_evaluating)),
    ),
    *family(
        "FLOW",
        "grad-flow.frozen",
        ("base-given-back", "the base's weights are among what is given back",
         trains(tuned=lambda my, c, W, t: replace(t, trained=t.trained | {"embed.weight"}))),
        ("names-of-the-adapter", "the adapter's name in every key",
         _told(lambda a: {n.replace(".weight", ".default.weight"): v for n, v in a.items()})),
        ("B-not-given-back", "A alone is given back",
         _told(lambda a: {n: v for n, v in a.items() if "lora_A" in n})),
        ("base-file-changed", "the base's file is written again", _writes("base", "config.json")),
        ("adapter-file-changed", "the adapter's file is written over",
         _writes("adapter", "adapter_config.json")),
        ("file-left", "a file is left in the model's folder", _writes("base", "optimizer.bin")),
    ),
)  # fmt: skip

SAME = equivalents(
    "grad-flow",
    ("plain", "the specification's loss, another optimizer", Trainer),
    (
        "rows-apart",
        "a micro-batch for each row",
        trains(
            micro=lambda my, step: [
                {name: array[i : i + 1] for name, array in batch.items()}
                for batch in step
                for i in range(len(batch["labels"]))
            ]
        ),
    ),
    (
        "computed-twice",
        "every gradient is computed again, and the second is taken",
        trains(part=lambda my, *given: [Trainer.part(my, *given) for _ in range(2)][1]),
    ),
)

MUTANTS: tuple[Mutant, ...] = EVERY + SAME
