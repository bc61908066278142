"""Folders of adapters, misread: names, tensors and settings lost, changed or not heeded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minilora.io.files import pack_json, read_json, read_tensors, write_files, write_tensors
from minilora.io.formats.peft import CONFIG, WEIGHTS
from minilora.verify.implementation.minilora_impl import Own
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import Array, digits
from minilora.verify.mutants.transition import equivalents, family

Tensors = dict[str, Array]
Settings = dict[str, Any]
Change = Callable[[Tensors, Settings], Any]


def _folder(path: str | Path, tensors: Mapping[str, Array], settings: Settings) -> None:
    write_tensors(Path(path) / WEIGHTS, dict(tensors), {"format": "pt"})
    write_files(Path(path), {CONFIG: partial(pack_json, settings)})


class Filer(Own):
    """Files right as they are: what is given is written, what is there is read."""

    def save(self, model_dir: Any, adapter_arrays: Any, settings: Any, out_dir: Any) -> None:
        """Both files."""
        tensors, told = self.saved({**adapter_arrays}, {**settings})
        _folder(out_dir, tensors, told)

    def load(self, model_dir: Any, adapter_dir: Any) -> Tensors:
        """The tensors."""
        settings = read_json(Path(adapter_dir) / CONFIG)
        tensors, _ = self.loaded(read_tensors(Path(adapter_dir) / WEIGHTS), settings)
        return tensors

    def model_loss(self, model_dir: Any, adapter_dir: Any, batch: Any) -> dict[str, Any]:
        """The specification's, of the folder as it is read."""
        settings = read_json(Path(adapter_dir) / CONFIG)
        tensors = read_tensors(Path(adapter_dir) / WEIGHTS)
        with TemporaryDirectory(prefix="minilora-") as name:
            _folder(name, *self.heeded(tensors, settings))
            return super().model_loss(model_dir, name, batch)

    def saved(self, tensors: Tensors, settings: Settings) -> tuple[Tensors, Settings]:
        """What is written."""
        return tensors, settings

    def loaded(self, tensors: Tensors, settings: Settings) -> tuple[Tensors, Settings]:
        """What is given back."""
        return tensors, settings

    def heeded(self, tensors: Tensors, settings: Settings) -> tuple[Tensors, Settings]:
        """What the function is made of."""
        return tensors, settings


def files(**changes: Change) -> Callable[[], Filer]:
    """`Filer` whose ``saved``, ``loaded`` or ``heeded`` are functions of tensors and settings."""

    def method(change: Change) -> Any:
        return lambda my, tensors, settings: change(tensors, settings)

    return type("Wrong", (Filer,), {name: method(change) for name, change in changes.items()})


def _values(change: Callable[[str, Array], Array]) -> Change:
    """Each tensor as a function of its name and values."""
    return lambda t, c: ({name: change(name, v) for name, v in t.items()}, c)


def _names(change: Callable[[str], str]) -> Change:
    return lambda t, c: ({change(name): v for name, v in t.items()}, c)


def _without(part: str) -> Change:
    return lambda t, c: ({name: v for name, v in t.items() if part not in name}, c)


def _settings(**changes: Callable[[Settings], Any]) -> Change:
    """Settings replaced by functions of all of them."""
    return lambda t, c: (t, {**c, **{name: change(c) for name, change in changes.items()}})


def _both(first: Change, second: Change) -> Change:
    return lambda t, c: second(*first(t, c))


def _exchanged(t: Tensors, c: Settings) -> Any:
    """Each layer's tensors under the next one's name, where they fit."""

    def other(name: str) -> str:
        swapped = re.sub(r"layers\.(\d)", lambda m: f"layers.{1 - int(m[1])}", name)
        return swapped if swapped in t and t[swapped].shape == t[name].shape else name

    return {name: t[other(name)] for name in t}, c


def _pairs_exchanged(first: str, second: str) -> Change:
    """Tensors of two projections under each other's name, where they fit."""

    def change(t: Tensors, c: Settings) -> Any:
        def other(name: str) -> str:
            swap = {first: second, second: first}
            swapped = re.sub(f"{first}|{second}", lambda m: swap[m[0]], name)
            return swapped if swapped in t and t[swapped].shape == t[name].shape else name

        return {name: t[other(name)] for name in t}, c

    return change


def _rank_unscaled(t: Tensors, c: Settings) -> Any:
    """α / r with the r of all, where a module has one of its own."""
    alpha = dict(c["alpha_pattern"])
    for end, rank in c["rank_pattern"].items():
        alpha[end] = alpha.get(end, c["lora_alpha"]) * rank / c["r"]
    return t, {**c, "alpha_pattern": alpha}


def _scale_in_B(t: Tensors, c: Settings) -> Any:
    s = c["lora_alpha"] / c["r"]
    return {name: v * v.dtype.type(s) if "lora_B" in name else v for name, v in t.items()}, c


def _first_ranks(t: Tensors, c: Settings) -> Any:
    """Rows of A and columns of B beyond r are cut off, and those that lack are 0."""

    def cut(name: str, v: Array) -> Array:
        axis = {"lora_A": 0, "lora_B": 1}.get(name.rsplit(".", 2)[-2], -1)
        if axis < 0 or v.shape[axis] <= c["r"]:
            return v
        kept = np.arange(v.shape[axis]) < c["r"]
        left: Array = np.where(kept[:, None] if axis == 0 else kept, v, 0)
        return left

    return {name: cut(name, v) for name, v in t.items()}, c


def _base_of(part: str) -> Change:
    """What was trained is 0 again, as if the base's had been kept."""
    return _values(lambda name, v: 0 * v if part in name else v)


def _grown(t: Tensors, c: Settings) -> Any:
    return {f"base_model.model.{name}": v for name, v in t.items()}, c


HEAD, BIAS = "classifier.", "base_layer.bias"

LOAD = (
    *family(
        "STORE",
        "files.load.patterns",
        ("load-adapter-in-name", "the adapter's name in every key",
         files(loaded=_names(lambda n: n.replace(".weight", ".default.weight")))),
        ("load-prefix-lost", "names without base_model.model.",
         files(loaded=_names(lambda n: n.removeprefix("base_model.model.")))),
        ("load-rounded", "tensors rounded to bfloat16", files(
            loaded=_values(lambda n, v: digits(v, 8)))),
        ("load-scaled", "s B for B", files(loaded=_scale_in_B)),
        ("load-layers-exchanged", "each layer's tensors in the next", files(loaded=_exchanged)),
        ("load-q-for-v", "the queries' factors for the values'", files(
            loaded=_pairs_exchanged("q_proj", "v_proj"))),
        ("load-A-alone", "B is not loaded, and starts at 0", files(
            loaded=_values(lambda n, v: 0 * v if "lora_B" in n else v))),
        ("load-ranks-cut", "rows beyond r are not loaded", files(loaded=_first_ranks)),
    ),
    *family(
        "STORE",
        "files.load.rslora",
        ("load-rslora-scaled", "√r B for B", files(loaded=lambda t, c: (
            {n: v * v.dtype.type(v.shape[1] ** 0.5) if "lora_B" in n and c["use_rslora"] else v
             for n, v in t.items()}, c))),
        ("load-fused-thirds", "the fused projection's thirds in another order", files(
            loaded=_values(lambda n, v: np.roll(v, len(v) // 3, 0)
                           if "c_attn.lora_B" in n else v))),
    ),
    *family(
        "STORE",
        "files.load.modules-to-save",
        ("load-head-lost", "the head is not loaded", files(loaded=_without(HEAD))),
        ("load-head-of-base", "the head stays as it was", files(loaded=_base_of(HEAD))),
        ("load-bias-lost", "the biases are not loaded", files(loaded=_without(BIAS))),
        ("load-bias-of-base", "the biases stay as they were", files(loaded=_base_of(BIAS))),
    ),
    *family(
        "STORE",
        "files.load.dora",
        ("load-magnitude-lost", "the magnitude is not loaded", files(loaded=_without("magnitude"))),
        ("load-magnitude-1", "the magnitude is 1", files(
            loaded=_values(lambda n, v: 0 * v + 1 if "magnitude" in n else v))),
        ("load-magnitude-name", "the magnitude's name ends with .weight", files(
            loaded=_names(lambda n: n + ".weight" if n.endswith("magnitude_vector") else n))),
    ),
    *family(
        "STORE",
        "files.load.embedding",
        ("load-embedding-lost", "the embedding's factors are not loaded", files(
            loaded=_without("lora_embedding"))),
        ("load-embedding-turned", "the embedding's factors transposed", files(
            loaded=_values(lambda n, v: v.T if "lora_embedding" in n else v))),
        ("load-embedding-name", "the embedding's factors named as a projection's", files(
            loaded=_names(lambda n: re.sub(r"lora_embedding_(.)", r"lora_\1.weight", n)))),
    ),
)  # fmt: skip

FUNCTION = (
    *family(
        "STORE",
        "files.outputs.patterns",
        ("alpha-pattern-ignored", "one α for all modules", files(
            heeded=_settings(alpha_pattern=lambda c: {}))),
        ("rank-pattern-unscaled", "α / r with one r for all modules", files(
            heeded=_rank_unscaled)),
        ("alpha-default", "α = 8", files(heeded=_settings(lora_alpha=lambda c: 8))),
        ("alpha-is-scale", "s = α", files(
            heeded=_settings(lora_alpha=lambda c: c["lora_alpha"] * c["r"]))),
        ("pattern-full-names", "a pattern must be the whole name", files(
            heeded=_settings(alpha_pattern=lambda c: {
                n: v for n, v in c["alpha_pattern"].items() if n.startswith("model.")}))),
        ("pattern-by-last-name", "a pattern counts for every layer", files(
            heeded=_settings(alpha_pattern=lambda c: {
                n.rsplit(".", 1)[-1]: v for n, v in c["alpha_pattern"].items()}))),
        ("rslora-unasked", "α / √r unasked", files(
            heeded=_settings(use_rslora=lambda c: True))),
        ("store-layers-exchanged", "each layer's adapter in the next", files(heeded=_exchanged)),
    ),
    *family(
        "STORE",
        "files.outputs.rslora",
        ("rslora-ignored", "α / r where rsLoRA is asked for", files(
            heeded=_settings(use_rslora=lambda c: False))),
        ("rslora-one-rank", "α / √r with one r for all modules", files(
            heeded=_settings(alpha_pattern=lambda c: {
                n: c["lora_alpha"] * (v / c["r"]) ** 0.5 for n, v in c["rank_pattern"].items()}
                if c["use_rslora"] else c["alpha_pattern"]))),
    ),
    *family(
        "STORE",
        "files.outputs.modules-to-save",
        ("head-not-used", "the base's head", files(heeded=_both(
            _without(HEAD), _settings(modules_to_save=lambda c: None, task_type=lambda c: None)))),
        ("bias-not-used", "the base's biases", files(heeded=_both(
            _without(BIAS), _settings(bias=lambda c: "none")))),
        ("pattern-by-last-names", "a pattern counts for all that ends with its last two names",
         files(heeded=_settings(alpha_pattern=lambda c: {
             ".".join(n.split(".")[-2:]): v for n, v in c["alpha_pattern"].items()}))),
    ),
    *family(
        "STORE",
        "files.outputs.dora",
        ("dora-not-used", "LoRA where DoRA is asked for", files(heeded=_both(
            _without("magnitude"), _settings(use_dora=lambda c: False)))),
        ("magnitude-1", "m = 1", files(
            heeded=_values(lambda n, v: 0 * v + 1 if "magnitude" in n else v))),
    ),
    *family(
        "STORE",
        "files.outputs.embedding",
        ("embedding-not-used", "the base's embedding", files(
            heeded=_values(lambda n, v: 0 * v if "lora_embedding_B" in n else v))),
        ("embedding-unscaled", "B A for s B A of an embedding", files(
            heeded=lambda t, c: ({n: v / v.dtype.type(c["lora_alpha"] / c["r"])
                                  if "lora_embedding_B" in n else v for n, v in t.items()}, c))),
    ),
)  # fmt: skip

SAVE = (
    *family(
        "STORE",
        "files.save.patterns",
        ("save-alpha-lost", "α is not saved: 8 is read", files(
            saved=_settings(lora_alpha=lambda c: 8)), "mlx-examples 622"),
        ("save-scale-as-alpha", "s saved as α", files(
            saved=_settings(lora_alpha=lambda c: c["lora_alpha"] / c["r"]))),
        ("save-alpha-is-r", "r saved as α", files(saved=_settings(lora_alpha=lambda c: c["r"]))),
        ("save-alpha-whole", "⌊α⌋ saved as α", files(
            saved=_settings(lora_alpha=lambda c: int(c["lora_alpha"])))),
        ("save-square-turned", "tensors that are square saved as their transposes", files(
            saved=_values(lambda n, v: v.T if v.shape == v.T.shape else v))),
        ("save-alpha-pattern-lost", "the α of single modules is not saved", files(
            saved=_settings(alpha_pattern=lambda c: {}))),
        ("save-rank-pattern-lost", "the ranks of single modules are not saved", files(
            saved=_settings(rank_pattern=lambda c: {}))),
        ("save-settings-of-first", "α of the first pattern for all", files(
            saved=_settings(lora_alpha=lambda c: next(
                iter(c["alpha_pattern"].values()), c["lora_alpha"])))),
        ("save-adapter-in-name", "the adapter's name in every key", files(
            saved=_names(lambda n: n.replace(".weight", ".default.weight")))),
        ("save-prefix-lost", "names without base_model.model.", files(
            saved=_names(lambda n: n.removeprefix("base_model.model.")))),
        ("save-rounded", "tensors rounded to bfloat16", files(
            saved=_values(lambda n, v: digits(v, 8)))),
        ("save-scaled", "s B for B, and s again when it is read", files(saved=_scale_in_B)),
        ("save-merged-beside", "the merged weights are saved too", files(
            saved=lambda t, c: (t | {n.replace("lora_A", "base_layer"): v @ v.T
                                     for n, v in t.items() if "lora_A" in n}, c))),
        ("save-one-layer-lost", "the last layer is not saved", files(saved=_without("layers.1."))),
    ),
    *family(
        "STORE",
        "files.save.rslora",
        ("save-rslora-lost", "use_rslora is not saved", files(
            saved=_settings(use_rslora=lambda c: False))),
        ("save-rslora-in-alpha", "α √r saved beside use_rslora", files(
            saved=_settings(lora_alpha=lambda c: c["lora_alpha"] * (
                c["r"] ** 0.5 if c["use_rslora"] else 1)))),
        ("save-conv1d-turned", "A and B of a transposed weight exchanged", files(
            saved=lambda t, c: ({n: t[n.replace("lora_A", "lora_?").replace("lora_B", "lora_A")
                                      .replace("lora_?", "lora_B")].T
                                 if c["fan_in_fan_out"] else v for n, v in t.items()}, c))),
    ),
    *family(
        "STORE",
        "files.save.modules-to-save",
        ("save-head-lost", "the head trained in full is not saved", files(saved=_both(
            _without(HEAD), _settings(modules_to_save=lambda c: None)))),
        ("save-bias-lost", "the trained biases are not saved", files(saved=_both(
            _without(BIAS), _settings(bias=lambda c: "none")))),
        ("save-bias-unsaid", "the biases are saved, and the settings know of none", files(
            saved=_settings(bias=lambda c: "none"))),
        ("save-head-of-base", "the base's head is saved", files(saved=_base_of(HEAD))),
    ),
    *family(
        "STORE",
        "files.save.dora",
        ("save-dora-lost", "use_dora is not saved, nor the magnitude", files(saved=_both(
            _without("magnitude"), _settings(use_dora=lambda c: False)))),
        ("save-magnitude-lost", "the magnitude is not saved", files(saved=_without("magnitude"))),
        ("save-dora-unsaid", "the magnitude is saved, and use_dora is not", files(
            saved=_settings(use_dora=lambda c: False))),
    ),
    *family(
        "STORE",
        "files.save.embedding",
        ("save-embedding-lost", "the embedding's factors are not saved", files(
            saved=_without("lora_embedding"))),
        ("save-embedding-name", "the embedding's factors named as a projection's", files(
            saved=_names(lambda n: re.sub(r"lora_embedding_(.)", r"lora_\1.weight", n)))),
    ),
    *family(
        "STORE",
        "files.resave",
        ("again-alpha-grows", "α doubles whenever it is saved", files(
            saved=_settings(lora_alpha=lambda c: 2 * c["lora_alpha"]))),
        ("again-names-grow", "names get another prefix whenever they are saved", files(
            saved=_grown)),
        ("again-rounded", "a digit is lost whenever it is loaded", files(
            loaded=_values(lambda n, v: digits(v, 12)))),
    ),
)  # fmt: skip


def _patterns(change: Callable[[str], str]) -> Callable[[], Filer]:
    """Another expression for each that an α is given for."""
    return files(
        heeded=_settings(
            alpha_pattern=lambda c: {change(n): v for n, v in c["alpha_pattern"].items()}
        )
    )


def _adapter_kept(my: Any, model_dir: Any, adapter_dir: Any, batch: Any) -> Any:
    kept = vars(my).setdefault("kept", {})
    return Filer.model_loss(my, model_dir, kept.setdefault(model_dir, adapter_dir), batch)


def _gradients(change: Callable[[str, Array], Any]) -> Callable[[], Filer]:
    """Gradients as a function of their names and values."""

    def model_loss(my: Any, *given: Any) -> Any:
        answer = Filer.model_loss(my, *given)
        return answer | {"grads": {n: change(n, g) for n, g in answer["grads"].items()}}

    return type("Wrong", (Filer,), {"model_loss": model_loss})


def _zero(*parts: str) -> Callable[[], Filer]:
    return _gradients(lambda n, g: 0 * g if any(part in n for part in parts) else g)


GRADIENTS = (
    *family(
        "STORE",
        "files.outputs.regex",
        ("pattern-anywhere", "a pattern counts for every name that it stands in",
         _patterns(lambda n: f".*{n}.*")),
        ("pattern-end", "a pattern counts for every name that ends so, without a dot before it",
         _patterns(lambda n: f".*{n}")),
        ("pattern-no-expression", "a pattern is a name and no expression", _patterns(re.escape)),
    ),
    *family(
        "STORE",
        "files.second-adapter",
        ("adapter-kept", "the first adapter that a model was given", type(
            "Wrong", (Filer,), {"model_loss": _adapter_kept})),
    ),
    *family(
        "STORE",
        "files.gradients.patterns",
        ("gradients-of-others", "gradients of the last layer are 0", _zero("layers.1.")),
    ),
    *family(
        "STORE",
        "files.gradients.rslora",
        ("gradients-rslora", "gradients / √r", _gradients(
            lambda n, g: g / g.dtype.type(min(g.shape) ** 0.5))),
    ),
    *family(
        "STORE",
        "files.gradients.modules-to-save",
        ("gradients-of-head", "the gradients of a head trained in full are 0", _zero(HEAD)),
        ("gradients-of-biases", "the gradients of biases are 0", _zero(BIAS)),
    ),
    *family(
        "STORE",
        "files.gradients.dora",
        ("gradients-of-magnitude", "the gradients of magnitudes are 0", _zero("magnitude")),
    ),
    *family(
        "STORE",
        "files.gradients.embedding",
        ("gradients-of-embedding", "the gradients of an embedding's factors are 0",
         _zero("lora_embedding")),
    ),
)  # fmt: skip

SAME = equivalents(
    "files",
    ("plain", "both files written and read as they are", Filer),
    (
        "bookkeeping",
        "other settings that change no function",
        files(saved=_settings(inference_mode=lambda c: False, revision=lambda c: None)),
    ),
    (
        "order",
        "tensors in another order",
        files(
            saved=lambda t, c: (dict(reversed(t.items())), c),
            loaded=lambda t, c: (dict(reversed(t.items())), c),
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = LOAD + FUNCTION + SAVE + GRADIENTS + SAME
