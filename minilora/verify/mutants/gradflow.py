"""Mutants of which parameters get a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.spec.lora import TrainableSpec, Weights
from minilora.spec.models import Batch, Config
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.optimizer import Optimizer
from minilora.verify.mutants.references.training import Training
from minilora.verify.mutants.train import rows_apart, times


def both_adapted(g: Weights) -> bool:
    """Whether more than one layer is adapted."""
    return len({name.split(".")[1] for name in g if name.startswith("layers.")}) > 1


def first_layer(g: Weights) -> list[str]:
    """The names of the first layer, where the second is adapted too."""
    return [name for name in g if name.startswith("layers.0.") and both_adapted(g)]


def lower_alone(g: Weights) -> list[str]:
    """The names of the first layer, where the second is frozen."""
    return [name for name in g if name.startswith("layers.0.") and not both_adapted(g)]


def A_after_B(loop: Any, W: Weights, batch: Batch, c: Config, spec: TrainableSpec) -> Any:
    """A's gradient where B has made its step."""
    n, g = loop.part(W, batch, c, spec)
    stepped = {k: W[k] - W[k].dtype.type(0.25) * v for k, v in g.items() if k.endswith(".B")}
    _, later = loop.part(W | stepped, batch, c, spec)
    return n, {k: later[k] if k.endswith(".A") else v for k, v in g.items()}


def lifted(W: Weights) -> Weights:
    """The weights with a thousandth for a B of 0."""
    small = {k: v + v.dtype.type(1e-3) for k, v in W.items() if k.endswith(".B") and not v.any()}
    return W | small


def appended(path: Path, batches: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """A byte is written to a file, of folders that no other case shares."""
    if len(batches) == 2 and "gradient_checkpointing" not in settings:
        path.write_bytes(path.read_bytes() + b" " if path.exists() else b" ")


NAMES = {**globals(), "Path": Path, "rows_apart": rows_apart, "times": times}
GRADIENT_FLOW = Reference((Optimizer, Training), NAMES)

# fmt: off
EVERY: Table = {
    "grad-flow.all-layers": [
        ("A-none", "no A has a gradient: dA = 0",
         {"# back": 'g = times(0, g, [n for n in g if n.endswith(".A")])'}),
        ("B-none", "no B has a gradient: dB = 0",
         {"# back": 'g = times(0, g, [n for n in g if n.endswith(".B")])'}),
        ("first-layer-none", "the first layer's adapters have no gradient",
         {"# back": "g = times(0, g, first_layer(g))"}),
        ("k-none", "the adapters of k have no gradient",
         {"# back": 'g = times(0, g, [n for n in g if ".k." in n])'}),
        ("v-none", "the adapters of v have no gradient",
         {"# back": 'g = times(0, g, [n for n in g if ".v." in n])'}),
        ("down-none", "the adapters of the last projection have no gradient",
         {"# back": 'g = times(0, g, [n for n in g if ".down." in n])'}),
        ("A-one-none", "one A has no gradient", {"# back": 'g = times(0, g, ["layers.0.o.A"])'}),
        ("twice", "every gradient counts twice", {"# back": "g = times(2, g)"}),
        ("A-twice", "A's gradient counts twice",
         {"# back": 'g = times(2, g, [n for n in g if n.endswith(".A")])'}),
        ("first-layer-twice", "the first layer's gradients count twice",
         {"# back": "g = times(2, g, first_layer(g))"}),
        ("first-layer-halved", "the first layer's gradients are halved",
         {"# back": "g = times(0.5, g, first_layer(g))"}),
    ],
    "grad-flow.checkpointing": [
        ("checkpointing-first-none",
         "under checkpointing the first layer's adapters have no gradient",
         {"# back":
              "g = times(0, g, first_layer(g)) if self.checkpointing else g"},
         "transformers 26221", "microsoft/LoRA 120", "peft 1142"),
        ("checkpointing-none", "under checkpointing no adapter has a gradient",
         {"# back": "g = times(0, g) if self.checkpointing else g"}),
        ("checkpointing-A-none", "under checkpointing no A has a gradient",
         {"# back":
              'g = times(0, g, [n for n in g if n.endswith(".A")]) if self.checkpointing else g'}),
        ("checkpointing-twice", "under checkpointing every gradient counts twice",
         {"# back": "g = times(2, g) if self.checkpointing else g"}),
    ],
    "grad-flow.first-layer": [
        ("frozen-stops", "gradients end at a frozen layer",
         {"# back": "g = times(0, g, lower_alone(g))"}),
        ("frozen-A-stops", "A's gradients end at a frozen layer",
         {"# back": 'g = times(0, g, [n for n in lower_alone(g) if n.endswith(".A")])'}),
    ],
    "grad-flow.first-layer-checkpointing": [
        ("checkpointing-frozen-stops", "under checkpointing gradients end at a frozen layer",
         {"# back":
              "g = times(0, g, lower_alone(g)) if self.checkpointing else g"},
         "transformers 26221"),
    ],
    "grad-flow.last-layer": [
        ("embedding-trained", "the embedding is trained too",
         {"# trained": 'spec = replace(spec, trained=spec.trained | {"embed.weight"})',
          "# answer": 'answer = [{n: v for n, v in a.items() if ".lora_" in n} for a in answer]'}),
        ("norms-trained", "the norms are trained too",
         {"# trained":
              'spec = replace(spec, trained=spec.trained | {n for n in W if ".norm" in n})',
          "# answer": 'answer = [{n: v for n, v in a.items() if ".lora_" in n} for a in answer]'}),
        ("head-trained", "the head is trained too",
         {"# trained": 'spec = replace(spec, trained=spec.trained | {"head.weight"})',
          "# answer": 'answer = [{n: v for n, v in a.items() if ".lora_" in n} for a in answer]'}),
        ("base-trained", "every weight is trained",
         {"# trained": "spec = replace(spec, trained=spec.trained | set(W))",
          "# answer": 'answer = [{n: v for n, v in a.items() if ".lora_" in n} for a in answer]'}),
    ],
    "grad-flow.zero-B": [
        ("start-A-after-B", "A's gradient is computed after B's step",
         {"self.part(W | now, batch, c, spec)": "A_after_B(self, W | now, batch, c, spec)"}),
        ("start-B-lifted", "B = 0 taken for 0.001", {"# part": "W = lifted(W)"}),
        ("start-B-none", "a B of 0 has no gradient",
         {"# back": 'g = times(0, g, [n for n in g if n.endswith(".B") and not W[n].any()])'}),
    ],
    "grad-flow.dropout": [
        ("dropout-none", "with dropout no adapter has a gradient",
         {"# back": "g = times(0, g) if self.dropout else g"}),
        ("dropout-A-none", "with dropout no A has a gradient",
         {"# back": 'g = times(0, g, [n for n in g if n.endswith(".A")]) if self.dropout else g'}),
        ("dropout-first-none", "with dropout the first layer's adapters have no gradient",
         {"# back": "g = times(0, g, first_layer(g)) if self.dropout else g"}),
        ("dropout-ignored", "no dropout in training", {"# part": "self.dropout = 0.0"}),
    ],
    "grad-flow.frozen": [
        ("base-given-back", "a weight of the base is returned as trained",
         {"# trained": 'spec = replace(spec, trained=spec.trained | {"embed.weight"})'}),
        ("names-of-the-adapter", "names are returned with the adapter's name",
         {"# answer":
              'answer = [{n.replace(".weight", ".default.weight"): v for n, v in a.items()} for '
              "a in answer]"}),
        ("B-not-given-back", "only A is returned",
         {"# answer": 'answer = [{n: v for n, v in a.items() if "lora_A" in n} for a in answer]'}),
        ("base-file-changed", "the base's file is written again",
         {"# answer": 'appended(Path(model_dir) / "config.json", batches, settings)'}),
        ("adapter-file-changed", "the adapter's file is written again",
         {"# answer": 'appended(Path(adapter_dir) / "adapter_config.json", batches, settings)'}),
        ("file-left", "a file is left in the model's folder",
         {"# answer": 'appended(Path(model_dir) / "optimizer.bin", batches, settings)'}),
    ],
}
SAME: Same = [
    ("plain", "the reference: another optimizer and loop", {}),
    ("rows-apart", "a micro-batch for each row",
     {"# batches of the step": "step = rows_apart(step)"}),
    ("computed-twice", "every gradient is computed twice, and the second is taken",
     {"self.part(W | now, batch, c, spec)":
          "[self.part(W | now, batch, c, spec) for _ in range(2)][1]"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(GRADIENT_FLOW, "FLOW", EVERY),
    *equivalents(GRADIENT_FLOW, "grad-flow", SAME),
)
