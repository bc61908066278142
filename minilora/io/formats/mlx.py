"""MLX adapter folders: ``adapter_config.json`` and ``adapters.safetensors``, as mlx-lm 0.32.

There a factor lies transposed, a = Aᵀ and b = Bᵀ, all have one rank, and ``scale`` is the whole
factor s: no alpha, no rank divides it. Each tensor's place follows from the settings as mlx-lm
resolves them when it loads the folder; the tensors must agree with that, and none is ignored.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import ARCHITECTURES, architecture_of, module_paths, to_file_layout
from minilora.io.files import (
    FormatError,
    check_settings,
    listed,
    pack,
    pack_json,
    read_json,
    read_tensors,
    to_narrow_dtype,
    write_files,
)
from minilora.io.formats.factors import check_factors, file_name, parameter_shapes
from minilora.io.formats.format import AdapterWeights, Base, Format
from minilora.io.formats.tensors import to_internal
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
"""Who computes with the weights of a file, in an error's words."""

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"

KINDS: Mapping[str, Variant | None] = {"lora": LORA, "dora": DORA, "full": None}
"""What ``fine_tune_type`` says: the variant of each adapter, or full fine-tuning."""

PARTS = {"A": ("lora_a", True), "B": ("lora_b", True), "magnitude": ("m", False)}
"""What a part is called in the file, and whether it lies transposed there."""

FIXED: dict[str, tuple[Any, ...]] = {"use_dora": (False, None)}
"""``use_dora`` is how mlx-lm said fine_tune_type "dora" once; 0.32 passes over it."""

INERT = """
model train optimizer optimizer_config data hf_dataset seed batch_size iters val_batches
learning_rate steps_per_report steps_per_eval resume_adapter_file adapter_path save_every test
test_batches max_seq_length config grad_checkpoint grad_accumulation_steps clear_cache_threshold
lr_schedule mask_prompt report_to project_name trust_remote_code wandb prompt
"""
"""Settings of a training run, which mlx-lm writes beside: they change no function."""


@dataclass(frozen=True)
class Settings:
    """What ``adapter_config.json`` says; ``adapted``: the modules hit, under internal names.

    Of full fine-tuning only ``kind`` is said: what is trained, the tensors tell.
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


def _within(at: str, there: str) -> tuple[int, str] | None:
    """The number of the layer that the module lies in, and its path there."""
    if not at.startswith("layers."):
        return None
    number = at.split(".")[1]
    return int(number), there.partition(f".{number}.")[2]


def _outer(there: str) -> Iterator[str]:
    """The modules that this one lies in."""
    return accumulate(there.split(".")[:-1], "{}.{}".format)


def _hit(path: Path, c: Config, num_layers: int, keys: list[str] | None) -> tuple[str, ...]:
    """The adapted modules: keys name them from the last layers on, or from the model on."""
    there = paths(path, c)
    first = max(0, c.layers - num_layers) if num_layers > 0 else 0
    hit, forbidden = [], {""}
    for at, name in there.items():
        inside = _within(at, name)
        forbidden |= {*_outer(name), *(_outer(inside[1]) if inside else ())}
        near = inside is not None and inside[0] >= first
        if keys is None:
            found = near and at in c.linears()
        else:
            local = near and inside is not None and inside[1] in keys
            found = local or name in keys
            if inside is not None and local and name in keys:
                remedy = "mlx-lm would adapt the adapter: name it once"
                raise FormatError(path, "keys", f"{name} and {inside[1]}", "one of them", remedy)
        if found:
            hit.append(at)
    wrong = [there[at] for at in hit if at not in c.matrices()]
    if wrong := wrong or sorted(forbidden & {*(keys or ())}):
        remedy = "mlx-lm refuses it too: name projections and embeddings"
        raise FormatError(path, "keys", listed(wrong), "what can be adapted", remedy)
    if not hit:
        expected = f"some of {listed(there[at] for at in c.linears())}"
        raise FormatError(path, "keys", f"{keys}, which hit nothing", expected, "another model's?")
    return tuple(hit)


def read_settings(path: Path | str, c: Config) -> Settings:
    """What the folder's ``adapter_config.json`` says, with the modules that mlx-lm would adapt.

    ``keys`` are names within a layer, for the last ``num_layers`` layers (all of them for 0 or
    less), or whole names, which know no layers. Without keys it is all projections of these layers.
    A key that hits nothing is passed over, as there.

    Errors: FormatError for a damaged file; for an unknown setting, or one that changes the
    function: ``alpha``, by which older releases multiplied ``scale`` and 0.32 does not; for a DoRA
    of an embedding, whose magnitudes are the tokens' there and the features' here.
    """
    path = Path(path) / CONFIG
    given = read_json(path)
    read = ("fine_tune_type", "num_layers", "lora_parameters")
    check_settings(path, given, read, FIXED, INERT)
    kind = "lora" if given.get("fine_tune_type") is None else given["fine_tune_type"]
    if not isinstance(kind, str) or kind not in KINDS:
        raise FormatError(path, "fine_tune_type", kind, ", ".join(KINDS), "is it MLX's?")
    if kind == "full":
        paths(path, c)
        return Settings(kind)
    parameters = given.get("lora_parameters")
    if not isinstance(parameters, dict):
        remedy = "is it an adapter of mlx-lm's?"
        raise FormatError(path, "lora_parameters", parameters, "an object", remedy)
    check_settings(
        f"{path}: lora_parameters", parameters, ("rank", "scale", "dropout", "keys"), {}, ""
    )
    whole, real = (int,), (int, float)
    for name, value, kinds, fits, expected in (
        ("num_layers", given.get("num_layers"), whole, lambda v: True, "a whole number"),
        ("rank", parameters.get("rank"), whole, lambda v: v >= 1, "a whole number from 1"),
        (
            "scale",
            parameters.get("scale"),
            real,
            lambda v: abs(v) <= sys.float_info.max,
            "a number",
        ),
        (
            "dropout",
            parameters.get("dropout"),
            real,
            lambda v: 0 <= v < 1,
            "a number from 0 and below 1",
        ),
    ):
        if type(value) not in kinds or not fits(value):
            remedy = "mlx-lm takes no default for it: write what it was trained with"
            raise FormatError(path, name, json.dumps(value), expected, remedy)
    keys = parameters.get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(k, str) for k in keys)):
        raise FormatError(path, "keys", json.dumps(keys), "a list of names", "write it as one")
    hit = _hit(path, c, given["num_layers"], keys)
    _check_tables(path, kind, hit)
    return Settings(
        kind, parameters["rank"], float(parameters["scale"]), float(parameters["dropout"]), hit
    )


def _check_tables(path: Path, kind: str, hit: tuple[str, ...]) -> None:
    if kind == "dora" and (tables := [at for at in hit if at in TABLES]):
        remedy = "MLX rescales each token's row, the equation here each feature's"
        raise FormatError(path, "DoRA", f"it of {listed(tables)}", "it of projections only", remedy)


def _places(path: Path, c: Config, settings: Settings) -> dict[str, tuple[str, bool]]:
    """Internal parameter name -> (the file's tensor name, whether it lies transposed there)."""
    there, variant = paths(path, c), KINDS[settings.kind]
    parts = variant.parts if variant else ()
    return {
        f"{at}.{part}": (f"{there[at]}.{PARTS[part][0]}", PARTS[part][1])
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

    Errors: FormatError as :func:`read_settings`, `files.read_tensors` and
    `huggingface.collect` have it.
    """
    file, settings = Path(path) / WEIGHTS, read_settings(path, c)
    found = read_tensors(file)
    variant = KINDS[settings.kind]
    if variant is None:
        there = paths(file, c)
        every = {name: file_name(there, name) for name in c.shapes()}
        held = {name: (place, False) for name, place in every.items() if place in found}
        W = to_internal(file, found, held, c.shapes(), dtype)
        return W, TrainableSpec(trained=frozenset(W))

    places = _places(file, c, settings)
    shapes: dict[str, tuple[int, int]] = {}
    for at in settings.adapted:
        shapes |= parameter_shapes(c, at, settings.rank, variant)
    for name, (place, _) in places.items():
        if name.endswith(".magnitude") and place in found:
            if found[place].ndim != 1:
                found_, expected = f"shape {found[place].shape}", f"shape {shapes[name][:1]}"
                raise FormatError(file, place, found_, expected, "write it as mlx-lm does")
            found[place] = found[place][:, None]
    W = to_internal(file, found, places, shapes, dtype)
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
    there = paths(folder, c)
    tensors: Weights = {}
    if adapted_in(W):
        settings, num_layers, keys = _said(folder, c, W, tuning, dropout)
        for name, (place, transposed) in _places(folder, c, settings).items():
            array = W[name].T if transposed else W[name][:, 0]
            tensors[place] = to_narrow_dtype(folder, name, array, dtype, _READER)
        parameters = {
            "rank": settings.rank,
            "scale": settings.scale,
            "dropout": dropout,
            "keys": keys,
        }
        said = {
            "fine_tune_type": settings.kind,
            "num_layers": num_layers,
            "lora_parameters": parameters,
        }
    else:
        shapes = c.shapes()
        for name in sorted(tuning.trained):
            if name not in W or shapes.get(name) != W[name].shape:
                found = f"shape {W[name].shape}" if name in W else "none"
                raise FormatError(folder, name, found, f"shape {shapes.get(name)}", "check c")
            array = to_file_layout(name, W[name], False)
            tensors[file_name(there, name)] = to_narrow_dtype(folder, name, array, dtype, _READER)
        if not tensors:
            remedy = "adapt the weights, or say what is trained"
            raise FormatError(folder, "trained", "nothing", "adapters, or weights", remedy)
        said = {"fine_tune_type": "full", "num_layers": c.layers, "lora_parameters": None}
    write_files(
        folder,
        {
            WEIGHTS: partial(pack, folder / WEIGHTS, tensors, {"format": "mlx"}),
            CONFIG: partial(pack_json, said),
        },
        stale=r"adapter_model\..*",
    )


def _said(
    path: Path, c: Config, W: Weights, tuning: TrainableSpec, dropout: float
) -> tuple[Settings, int, list[str]]:
    """The settings that say these adapters, and how many layers and which keys name them."""
    ranks = check_factors(path, c, W, tuning, (LORA, DORA))
    if ties_head(c) and "head" in ranks:
        both = {"embed", "head"} <= ranks.keys()
        alike = both and all(
            np.array_equal(W[f"head.{part}"], array)
            for part, array in zip("AB", twin(W["embed.A"], W["embed.B"]), strict=True)
        )
        if not alike or tuning.scale["head"] != tuning.scale["embed"]:
            remedy = "MLX has one adapter for the two: adapt both, as twins"
            raise FormatError(path, "adapter of head", "another change", "embed's twin", remedy)
    elif ties_head(c) and "embed" in ranks:
        remedy = "in MLX it changes the tied head too: adapt the head, as its twin"
        raise FormatError(path, "adapter of embed", "no twin at the head", "one", remedy)
    hit = tuple(at for at in ranks if at != "head" or not ties_head(c))
    variants = {tuning.variant.get(at, LORA) for at in ranks}
    scales = {tuning.scale[at] for at in ranks}
    for what, values in (("rank", {*ranks.values()}), ("scale", scales), ("variant", variants)):
        if len(values) > 1:
            remedy = "MLX has one for all: put a factor into B, or write it for PEFT"
            found = f"{len(values)} of them"
            if what != "variant":
                found = f"{found}: {listed(values)}"
            raise FormatError(path, what, found, "one for all adapters", remedy)
    [s], [variant] = scales, variants
    if float(s) != s:
        raise FormatError(path, "scale", repr(s), "a float64", "put the factor into B")
    kind = "dora" if variant == DORA else "lora"
    _check_tables(path, kind, hit)
    settings = Settings(kind, next(iter(ranks.values())), float(s), dropout, hit)
    return settings, *_named(path, c, hit)


def _named(path: Path, c: Config, hit: tuple[str, ...]) -> tuple[int, list[str]]:
    """The names within the last layers if each of these has the same; whole names otherwise."""
    there = paths(path, c)
    inside: dict[int, set[str]] = {}
    for at in hit:
        if within := _within(at, there[at]):
            inside.setdefault(within[0], set()).add(within[1])
    first = min(inside, default=c.layers)
    if len(inside) == c.layers - first > 0 and all(v == inside[first] for v in inside.values()):
        outer = {there[at] for at in hit if _within(at, there[at]) is None}
        return c.layers - first, sorted(inside[first] | outer)
    return c.layers, sorted(there[at] for at in hit)


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
    scaling="scale as it stands in the file: {scales}",
)
