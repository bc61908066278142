"""MLX adapter folders: ``adapter_config.json`` and ``adapters.safetensors``, as mlx-lm 0.32.

There a factor lies transposed, a = Aᵀ and b = Bᵀ, all have one rank, and ``scale`` is the whole
factor s: no alpha, no rank divides it. Each tensor's place follows from the settings as mlx-lm
resolves them when it loads the folder; the tensors must agree with that, and none is ignored.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import ARCHITECTURES, architecture_of, module_paths, to_file_layout
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError, listed
from minilora.io.files import (
    check_settings,
    pack,
    pack_json,
    read_json,
    read_tensors,
    to_narrow_dtype,
)
from minilora.io.formats.factors import check_factors, file_name, parameter_shapes
from minilora.io.formats.format import AdapterWeights, Base, Format
from minilora.io.formats.rules import Rule, check
from minilora.io.formats.tensors import to_internal
from minilora.io.formats.values import Fits, is_integer, is_list, is_number, is_text
from minilora.spec.lora import (
    LORA,
    TABLES,
    Params,
    TrainableSpec,
    Variant,
    Weights,
    adapted_in,
    twin,
)
from minilora.spec.models import Config
from minilora.spec.target_modules import ties_head
from minilora.spec.variants import DORA

_READER = "MLX reads"
"""Who computes with the weights, for error messages."""

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"

VARIANTS = (LORA, DORA)
"""What mlx-lm computes."""

KINDS: Mapping[str, Variant | None] = {"lora": LORA, "dora": DORA, "full": None}
"""The values of ``fine_tune_type`` and the adapters' variant; None is full fine-tuning."""

PARTS = {"A": ("lora_a", True), "B": ("lora_b", True), "magnitude": ("m", False)}
"""Each parameter's name in the file, and whether it lies transposed there."""

FIXED: dict[str, tuple[Any, ...]] = {"use_dora": (False, None)}
"""``use_dora`` was mlx-lm's setting before fine_tune_type "dora"; 0.32 ignores it."""

INERT = """
model train optimizer optimizer_config data hf_dataset seed batch_size iters val_batches
learning_rate steps_per_report steps_per_eval resume_adapter_file adapter_path save_every test
test_batches max_seq_length config grad_checkpoint grad_accumulation_steps clear_cache_threshold
lr_schedule mask_prompt report_to project_name trust_remote_code wandb prompt
"""
"""Settings of a training run, which mlx-lm writes too; they change no function."""


@dataclass(frozen=True)
class Settings:
    """What ``adapter_config.json`` says.

    ``adapted`` has the modules' internal names. Full fine-tuning has only the ``kind``: the tensors
    tell what is trained.
    """

    kind: str
    rank: int = 0
    scale: float = 0.0
    dropout: float = 0.0
    adapted: tuple[str, ...] = ()


def paths(path: Path | str, c: Config) -> dict[str, str]:
    """Internal module name -> the module's path in mlx-lm. Its GPT-2 has ``model``, not
    ``transformer``, and plain projections, not transposed ones.

    Errors: FormatError for a BERT, which mlx-lm does not have.
    """
    a = architecture_of(c)
    if a.mlx_prefix is None:
        known = listed(a.model_type for a in ARCHITECTURES.values() if a.mlx_prefix is not None)
        remedy = "mlx-lm has no such model: write it for PEFT"
        raise FormatError(path, "architecture", a.model_type, f"one of {known}", remedy)
    prefix = re.compile(f"^{re.escape(a.prefix)}")
    return {at: prefix.sub(a.mlx_prefix, there) for at, there in module_paths(c).items()}


def _in_layer(at: str, path: str) -> tuple[int, str] | None:
    """The number of the layer that the module lies in, and its path there."""
    if not at.startswith("layers."):
        return None
    number = at.split(".")[1]
    return int(number), path.partition(f".{number}.")[2]


def _outer(path: str) -> Iterator[str]:
    """The modules that this one lies in."""
    return accumulate(path.split(".")[:-1], "{}.{}".format)


@dataclass(frozen=True)
class _Keys:
    """The keys of ``lora_parameters`` beside a model: names in the last layers, or whole names."""

    c: Config
    path_of: Mapping[str, str]
    num_layers: int
    keys: Sequence[str] | None

    @property
    def adapted(self) -> list[str]:
        """The modules that the keys name; without keys all projections of the last layers."""
        if self.keys is None:
            linears = self.c.linears()
            return [at for at in self.path_of if at in linears and self._name_in_layer(at)]
        names = {*self.keys}
        return [at for at, path in self.path_of.items() if {path, self._name_in_layer(at)} & names]

    def _name_in_layer(self, at: str) -> str | None:
        """The module's name in its layer, if that is one of the last ``num_layers``."""
        first = max(0, self.c.layers - self.num_layers) if self.num_layers > 0 else 0
        inside = _in_layer(at, self.path_of[at])
        return inside[1] if inside is not None and inside[0] >= first else None

    def twice(self) -> str:
        """A module that is named in its layer and whole."""
        for at, path in self.path_of.items():
            name = self._name_in_layer(at)
            if {path, name} <= {*(self.keys or ())}:
                return f"{path} and {name}"
        return ""

    def not_adaptable(self) -> list[str]:
        """What the keys name that has no adapter: norms, or modules that hold others."""
        wrong = [self.path_of[at] for at in self.adapted if at not in self.c.matrices()]
        outer = {""}
        for at, path in self.path_of.items():
            inside = _in_layer(at, path)
            outer |= {*_outer(path), *(_outer(inside[1]) if inside else ())}
        return wrong or sorted(outer & {*(self.keys or ())})

    @property
    def linears(self) -> str:
        return listed(self.path_of[at] for at in self.c.linears())


_KEY_RULES = (
    Rule("keys", _Keys.twice, "one of them", "mlx-lm would adapt the adapter: name it once"),
    Rule(
        "keys",
        _Keys.not_adaptable,
        "what can be adapted",
        "mlx-lm refuses it too: name projections and embeddings",
    ),
    Rule(
        "keys",
        lambda x: not x.adapted and f"{x.keys}, which match no module",
        "some of {x.linears}",
        "is it another model's?",
    ),
)


def read_settings(path: Path | str, c: Config) -> Settings:
    """What the folder's ``adapter_config.json`` says, with the modules that mlx-lm would adapt.

    ``keys`` are names within a layer, for the last ``num_layers`` layers (all of them for 0 or
    less), or whole names, which know no layers. Without keys it is all projections of these layers.
    A key that matches no module is passed over, as there.

    Errors: FormatError for a damaged file; for an unknown setting, or one that changes the
    function: ``alpha``, by which older releases multiplied ``scale`` and 0.32 does not; for a DoRA
    of an embedding, whose magnitudes are the tokens' there and the features' here.
    """
    path = Path(path) / CONFIG
    stored = read_json(path)
    read = ("fine_tune_type", "num_layers", "lora_parameters")
    check_settings(path, stored, read, FIXED, INERT)
    kind = "lora" if stored.get("fine_tune_type") is None else stored["fine_tune_type"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(path, "fine_tune_type", kind, ", ".join(KINDS), "is it MLX's?")
    if kind == "full":
        paths(path, c)
        return Settings(kind)
    parameters = stored.get("lora_parameters")
    if not isinstance(parameters, dict):
        remedy = "is it an adapter of mlx-lm's?"
        raise FormatError(path, "lora_parameters", parameters, "an object", remedy)
    check_settings(
        f"{path}: lora_parameters", parameters, ("rank", "scale", "dropout", "keys"), {}, ""
    )
    values: dict[str, Any] = {"num_layers": stored.get("num_layers")}
    values |= {name: parameters.get(name) for name in ("rank", "scale", "dropout", "keys")}
    for name, (fits, expected) in _VALUES.items():
        if not fits(values[name]):
            remedy = "mlx-lm takes no default for it: write what it was trained with"
            raise FormatError(path, name, json.dumps(values[name]), expected, remedy)
    selected = _Keys(c, paths(path, c), values["num_layers"], values["keys"])
    check(path, _KEY_RULES, selected)
    adapted = tuple(selected.adapted)
    _check_tables(path, kind, adapted)
    scale, dropout = float(values["scale"]), float(values["dropout"])
    return Settings(kind, values["rank"], scale, dropout, adapted)


_VALUES: Mapping[str, tuple[Fits, str]] = {
    "num_layers": (is_integer(-math.inf, math.inf), "a whole number"),
    "rank": (is_integer(1, math.inf), "a whole number from 1"),
    "scale": (is_number, "a number"),
    "dropout": (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 and below 1"),
    "keys": (lambda v: v is None or is_list(is_text)(v), "a list of names"),
}
"""The settings that say what is adapted: whether a value fits, and what fits, in words."""


def _check_tables(path: Path, kind: str, adapted: Iterable[str]) -> None:
    if kind == "dora" and (tables := [at for at in adapted if at in TABLES]):
        remedy = "MLX rescales each token's row, the equation here each feature's"
        raise FormatError(path, "DoRA", f"it of {listed(tables)}", "it of projections only", remedy)


def _tensor_names(path: Path, c: Config, settings: Settings) -> dict[str, tuple[str, bool]]:
    """Internal parameter name -> (the file's tensor name, whether it lies transposed there)."""
    path_of, variant = paths(path, c), KINDS[settings.kind]
    parts = variant.parts if variant else ()
    return {
        f"{at}.{part}": (f"{path_of[at]}.{PARTS[part][0]}", PARTS[part][1])
        for at in settings.adapted
        for part in parts
    }


def read_adapter(path: Path | str, c: Config, dtype: Any = None) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    An adapted embedding whose head is tied to it changes both, so that the head's adapter comes
    too, as the embedding's twin. Of full fine-tuning the trained weights come. Dropout acts in
    training only; it is in :func:`read_settings`. There it acts on the input of B A, with DoRA too,
    where the equation here drops all that is not W x.

    Errors: FormatError as :func:`read_settings`, `files.read_tensors` and `tensors.to_internal`
    have it.
    """
    file, settings = Path(path) / WEIGHTS, read_settings(path, c)
    tensors = read_tensors(file)
    variant = KINDS[settings.kind]
    if variant is None:
        path_of = paths(file, c)
        places = {name: file_name(path_of, name) for name in c.shapes()}
        stored = {name: (place, False) for name, place in places.items() if place in tensors}
        W = to_internal(file, tensors, stored, c.shapes(), dtype)
        return W, TrainableSpec(trained=frozenset(W))

    names = _tensor_names(file, c, settings)
    shapes: dict[str, tuple[int, int]] = {}
    for at in settings.adapted:
        shapes |= parameter_shapes(c, at, settings.rank, variant)
    for name, (place, _) in names.items():
        if name.endswith(".magnitude") and place in tensors:
            if tensors[place].ndim != 1:
                found, expected = f"shape {tensors[place].shape}", f"shape {shapes[name][:1]}"
                raise FormatError(file, place, found, expected, "write it as mlx-lm does")
            tensors[place] = tensors[place][:, None]
    W = to_internal(file, tensors, names, shapes, dtype)
    adapted = list(settings.adapted)
    if ties_head(c) and "embed" in adapted:
        W["head.A"], W["head.B"] = map(np.ascontiguousarray, twin(W["embed.A"], W["embed.B"]))
        adapted.append("head")
    variants = {} if variant == LORA else dict.fromkeys(adapted, variant)
    return W, TrainableSpec(dict.fromkeys(adapted, settings.scale), {}, frozenset(W), variants)


def write_adapter(
    path: Path | str,
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    *,
    dropout: float = 0.0,
    dtype: Any = None,
) -> None:
    """Write the adapter of W, in ``dtype`` or its own, to the folder ``path``.

    Without adapters it is full fine-tuning: what ``tuning`` trains is written. ``dropout`` is said
    for a training that goes on. The same input gives the same bytes.

    Errors: FormatError for what the format cannot say: two ranks, scales or variants; what else is
    trained beside adapters; a tied head whose adapter is not the embedding's twin; float64, which
    MLX does not read; and as `factors.check_factors` has it.
    """
    folder = Path(path)
    if adapted_in(W):
        settings, tensors = _of_adapters(folder, c, W, tuning, dropout, dtype)
    else:
        settings = {"fine_tune_type": "full", "num_layers": c.layers, "lora_parameters": None}
        tensors = _of_full_tuning(folder, c, W, tuning, dtype)
    files = {
        WEIGHTS: partial(pack, folder / WEIGHTS, tensors, {"format": "mlx"}),
        CONFIG: partial(pack_json, settings),
    }
    write_files(folder, files, stale=r"adapter_model\..*")


def _of_adapters(
    folder: Path, c: Config, W: Weights, tuning: TrainableSpec, dropout: float, dtype: Any
) -> tuple[dict[str, Any], Weights]:
    """The settings and the tensors of adapters."""
    settings = _settings(folder, c, W, tuning, dropout)
    tensors = {}
    for name, (place, transposed) in _tensor_names(folder, c, settings).items():
        array = W[name].T if transposed else W[name][:, 0]
        tensors[place] = to_narrow_dtype(folder, name, array, dtype, _READER)
    num_layers, keys = _keys_of(folder, c, settings.adapted)
    parameters = {"rank": settings.rank, "scale": settings.scale, "dropout": dropout, "keys": keys}
    stored = {"fine_tune_type": settings.kind, "num_layers": num_layers}
    return {**stored, "lora_parameters": parameters}, tensors


def _of_full_tuning(
    folder: Path, c: Config, W: Weights, tuning: TrainableSpec, dtype: Any
) -> Weights:
    """The trained tensors."""
    path_of, shapes, tensors = paths(folder, c), c.shapes(), {}
    for name in sorted(tuning.trained):
        if name not in W or shapes.get(name) != W[name].shape:
            found = f"shape {W[name].shape}" if name in W else "none"
            raise FormatError(folder, name, found, f"shape {shapes.get(name)}", "check c")
        array = to_file_layout(name, W[name], False)
        tensors[file_name(path_of, name)] = to_narrow_dtype(folder, name, array, dtype, _READER)
    if not tensors:
        remedy = "adapt the weights, or say what is trained"
        raise FormatError(folder, "trained", "nothing", "adapters, or weights", remedy)
    return tensors


def _settings(path: Path, c: Config, W: Weights, tuning: TrainableSpec, dropout: float) -> Settings:
    """The settings that say these adapters: one rank, one scale, one variant."""
    paths(path, c)
    ranks = check_factors(path, c, W, tuning, VARIANTS)
    _check_tie(path, c, W, tuning, ranks)
    variants = {tuning.variant.get(at, LORA) for at in ranks}
    scales = {tuning.scale[at] for at in ranks}
    for field, values in (("rank", {*ranks.values()}), ("scale", scales), ("variant", variants)):
        if len(values) > 1:
            remedy = "MLX has one for all: put a factor into B, or write it for PEFT"
            found = f"{len(values)} of them"
            found += "" if field == "variant" else f": {listed(values)}"
            raise FormatError(path, field, found, "one for all adapters", remedy)
    [s], [variant] = scales, variants
    if float(s) != s:
        raise FormatError(path, "scale", repr(s), "a float64", "put the factor into B")
    adapted = tuple(at for at in ranks if at != "head" or not ties_head(c))
    kind = "dora" if variant == DORA else "lora"
    _check_tables(path, kind, adapted)
    return Settings(kind, next(iter(ranks.values())), float(s), dropout, adapted)


def _check_tie(
    path: Path, c: Config, W: Weights, tuning: TrainableSpec, adapted: Collection[str]
) -> None:
    """Refuse an embedding or a tied head that is adapted otherwise than the other."""
    if not ties_head(c) or not {"embed", "head"} & set(adapted):
        return
    if "head" not in adapted:
        remedy = "in MLX it changes the tied head too: adapt the head, as its twin"
        raise FormatError(path, "adapter of embed", "no twin at the head", "one", remedy)
    alike = "embed" in adapted and tuning.scale["head"] == tuning.scale["embed"]
    shared = twin(W["embed.A"], W["embed.B"]) if alike else ()
    alike = alike and all(
        np.array_equal(W[f"head.{part}"], array) for part, array in zip("AB", shared, strict=True)
    )
    if not alike:
        remedy = "MLX has one adapter for the two: adapt both, as twins"
        raise FormatError(path, "adapter of head", "another change", "embed's twin", remedy)


def _keys_of(path: Path, c: Config, adapted: Iterable[str]) -> tuple[int, list[str]]:
    """The number of layers, and the keys that name these modules.

    Names within the last layers if each of these has the same; whole names otherwise.
    """
    path_of = paths(path, c)
    in_layers: dict[int, set[str]] = {}
    outside = set()
    for at in adapted:
        if inside := _in_layer(at, path_of[at]):
            in_layers.setdefault(inside[0], set()).add(inside[1])
        else:
            outside.add(path_of[at])
    first = min(in_layers, default=c.layers)
    contiguous = len(in_layers) == c.layers - first > 0
    if contiguous and all(names == in_layers[first] for names in in_layers.values()):
        return c.layers - first, sorted(in_layers[first] | outside)
    return c.layers, sorted(path_of[at] for at in adapted)


def _read(path: Path, c: Config, dtype: Any, base: Params) -> AdapterWeights:
    return AdapterWeights(*read_adapter(path, c, dtype))


def _write(path: Path, c: Config, adapter: AdapterWeights, base: Base) -> list[str]:
    dropout = 0.0 if adapter.config is None else adapter.config.lora_dropout
    write_adapter(path, c, adapter.weights, adapter.tuning, dropout=dropout)
    return []


FORMAT = Format(
    name="mlx",
    library="MLX",
    adapter_file=WEIGHTS,
    read_adapter=_read,
    write_adapter=_write,
    variants=VARIANTS,
    scaling="scale as it stands in the file: {scales}",
)
