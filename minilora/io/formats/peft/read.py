"""Reading an adapter folder: the tensors must be those of the settings, and none is ignored."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from minilora.io.architectures import architecture_of, tensor_names
from minilora.io.errors import FormatError
from minilora.io.files import read_tensors, to_dtype
from minilora.io.formats.peft.config import AdapterConfig, read_config, trained_biases
from minilora.io.formats.peft.names import (
    CONFIG,
    PREFIX,
    PROJECTIONS,
    WEIGHTS,
    adapter_names,
    paths,
    vectors,
)
from minilora.io.formats.peft.starts import INIT_FROM_BASE, changed_weights
from minilora.io.formats.peft.vera import shared_shape, split_projections, vera_projections
from minilora.io.formats.tensors import to_internal
from minilora.spec.lora import LORA, TrainableSpec, Weights
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.target_modules import scales, ties_head

_SAVE_AGAIN = "PEFT writes them as one: save the adapter again"


def read_adapter(
    path: Path | str, c: Config, dtype: Any = None, base: Mapping[str, Array] | None = None
) -> tuple[Weights, TrainableSpec]:
    """The adapter's arrays under internal names, in ``dtype`` or the file's, and its
    `TrainableSpec`.

    c is the configuration of the model that the adapter is for: of the deeper one, where
    ``layer_replication`` says so, and not its base's. Beside the adapters' parameters come the
    modules that were trained in full and the biases; put over the base's weights, ``W | adapter``,
    they give the adapted model. With a start that PEFT takes out of the base's weights when it
    loads the folder ("pissa", "olora"), and where rows of a table are trained alone, the adapter
    holds the changed weights too, and ``base``, those that it is put over, has to be given. Dropout
    and aLoRA's invocation are in :func:`read_lora_config`.

    Errors: FormatError as :func:`read_lora_config`, `files.read_tensors` and `tensors.to_internal`
    have it; without a ``base`` that is needed.
    """
    file = Path(path) / WEIGHTS
    config = read_config(Path(path) / CONFIG, c)
    _check_base(Path(path) / CONFIG, c, config, base)
    pruned = _pruned(config)
    stored = _read_stored(file, config, pruned)
    _name_base_weights(stored, {*config.targets.rank, *pruned})
    _drop_copies(stored)
    _check_tie(Path(path) / CONFIG, stored)
    W = _to_internal(stored, dtype)
    if base is not None:
        W |= changed_weights(Path(path) / CONFIG, base, W, config.lora, config.targets)
    rows = _row_shapes(config)
    W = {name: w for name, w in W.items() if not name.startswith("shared.") and name not in rows}
    s = scales(config.lora, config.targets)
    equation = config.lora.equation
    variant = {} if equation == LORA else dict.fromkeys(s, equation)
    trained = config.targets.trained() | stored.beside
    return W, TrainableSpec(scale=s, trained=trained, variant=variant)


def _check_base(
    path: Path, c: Config, config: AdapterConfig, base: Mapping[str, Array] | None
) -> None:
    if config.c.layers != c.layers:
        remedy = (
            "no command repeats a base's layers: merge it with PEFT and go on with that model, or "
            "in Python replicate the base by read_lora_config's layer_replication"
        )
        found = f"a model of {c.layers} layers"
        raise FormatError(path, "layer_replication", found, config.c.layers, remedy)
    lora = config.lora
    if base is None and (lora.trainable_token_indices or lora.init_lora_weights in INIT_FROM_BASE):
        field = "trainable_token_indices" if lora.trainable_token_indices else "init_lora_weights"
        remedy = "give base, the weights that the adapter is loaded on, which it changes"
        found = json.dumps(config.settings[field])
        raise FormatError(path, field, found, "a base beside it", remedy)


@dataclass
class _Stored:
    """The file's tensors, and where in it each parameter is; both are corrected step by step.

    ``beside``: the parameters that were trained beside the adapters'.
    """

    file: Path
    config: AdapterConfig
    tensors: Weights
    names: dict[str, str]
    beside: set[str]


def _read_stored(file: Path, config: AdapterConfig, pruned: Mapping[str, str]) -> _Stored:
    c, lora = config.c, config.lora
    beside = trained_biases(lora, config.targets, c) | set(lora.modules_to_save)
    if lora.bias == "lora_only":  # PEFT trains those of what it prunes, too
        beside |= {f"{at}.bias" for at in pruned} & c.shapes().keys()
    if not file.exists() and file.with_suffix(".bin").exists():
        remedy = "a pickle can run code: let PEFT load it and save it as safetensors"
        raise FormatError(file, "file", "none, but a .bin", "a safetensors file", remedy)
    tensors = read_tensors(file, _pruned_tensors(file, pruned))
    beside_in_order = [name for name in c.shapes() if name in beside]
    names = adapter_names(c, [*config.targets.parts(), *_row_shapes(config), *beside_in_order])
    if config.settings.get("save_projection"):
        names |= {f"shared.{part}": name for part, name in PROJECTIONS.items()}
    in_base = {f"{at}.bias": f"{PREFIX}{path}.base_layer.bias" for at, path in pruned.items()}
    names |= {name: place for name, place in in_base.items() if name in names}
    return _Stored(file, config, tensors, names, beside)


def _row_shapes(config: AdapterConfig) -> dict[str, tuple[int, int]]:
    """The rows of tables that are trained alone."""
    tokens = config.lora.trainable_token_indices
    return {f"{at}.tokens": (len(ids), config.c.d) for at, ids in tokens.items()}


def _pruned(config: AdapterConfig) -> dict[str, str]:
    """The modules of which AdaLoRA has left nothing, and their paths."""
    settings = config.settings
    pattern = settings["rank_pattern"] if settings["peft_type"] == "ADALORA" else {}
    pruned = {name.removesuffix(".lora_E") for name, row in pattern.items() if not any(row)}
    return {at: path for at, path in paths(config.c).items() if path in pruned}


def _pruned_tensors(file: Path, pruned: Mapping[str, str]) -> str | None:
    """An expression for the tensors of the modules of which nothing is left: they are empty.

    Errors: FormatError if one of them is not.
    """
    empty = {f"{PREFIX}{path}.lora_{part}" for path in pruned.values() for part in "ABE"}
    if not empty:
        return None
    try:
        with safe_open(file, framework="np") as tensors:
            for name in empty.intersection(tensors.keys()):
                shape = tensors.get_slice(name).get_shape()
                if 0 not in shape:
                    remedy = "rank_pattern says that nothing is left: is it another file's?"
                    raise FormatError(file, name, f"shape {shape}", "no entry", remedy)
    except (OSError, SafetensorError):
        pass  # read_tensors reports it
    return "|".join(rf"^{re.escape(name)}$" for name in sorted(empty))


def _name_base_weights(stored: _Stored, adapted: set[str]) -> None:
    """Give a name to the base's weight of an adapted embedding and head, which PEFT writes too.

    Errors: FormatError if it is written twice, and differs.
    """
    c, tensors, names = stored.config.c, stored.tensors, stored.names
    for at in ("embed", "head"):
        place = f"{PREFIX}{paths(c)[at]}.base_layer.weight"
        if at not in adapted or place not in tensors:
            continue
        name = "embed.weight" if ties_head(c) else f"{at}.weight"
        if name not in names:
            names[name] = place
            continue
        other = names[name]
        if not np.array_equal(tensors[place], tensors.get(other, place)):
            expected = f"those of {other}"
            raise FormatError(stored.file, place, "other entries", expected, _SAVE_AGAIN)
        del tensors[place]


def _drop_copies(stored: _Stored) -> None:
    """Take out of the tensors what PEFT writes twice.

    These are a tied head beside its embedding and, with bias "all", the biases of modules that are
    saved in full: once more as trained, and as the base has them, where nothing uses them.

    Errors: FormatError if what should be a copy differs.
    """
    tensors, known = stored.tensors, set(stored.names.values())
    for name in tensors.keys() - known:
        original = _original(stored, name)
        if original == name or original not in known or original not in tensors:
            continue
        of_base = ".original_module." in name
        if not of_base and not np.array_equal(tensors[name], tensors[original]):
            expected = f"those of {original}"
            raise FormatError(stored.file, name, "other entries", expected, _SAVE_AGAIN)
        del tensors[name]


def _original(stored: _Stored, name: str) -> str:
    """The tensor that this one would be a copy of, or its own name."""
    head = f"{PREFIX}{architecture_of(stored.config.c).outer['head']}.weight"
    if name == head and "embed.weight" in stored.names:
        return stored.names["embed.weight"]
    if stored.config.lora.bias == "all" and name.endswith(".bias"):
        # Below modules_to_save comes the adapter's name, if it comes at all.
        inner = r"\.(modules_to_save|original_module)(?=\.)", r"\.modules_to_save\.[^.]+(?=\.)"
        trained = set(stored.names.values()) & stored.tensors.keys()
        originals = (re.sub(part, "", name) for part in inner)
        return next((other for other in originals if other != name and other in trained), name)
    return name


def _check_tie(path: Path, stored: _Stored) -> None:
    head = f"{PREFIX}{paths(stored.config.c)['head']}.lora_"
    unknown = stored.tensors.keys() - set(stored.names.values())
    ensured = stored.config.settings.get("ensure_weight_tying")
    if ensured and any(name.startswith(head) for name in unknown):
        remedy = "PEFT does not load the head's factors unless it is named: add it"
        found = f"no head, whose factors are in {WEIGHTS}"
        raise FormatError(path, "target_modules", found, "both of the tie", remedy)


def _make_columns(stored: _Stored) -> None:
    """Make columns of the file's vectors, and take DoRA's name with ``.weight``, as PEFT does."""
    tensors, names, parts = stored.tensors, stored.names, stored.config.targets.parts()
    columns = vectors(stored.config.lora.equation)
    for name, place in names.items():
        if name.endswith(".magnitude") and f"{place}.weight" in tensors:
            names[name] = place = f"{place}.weight"
        if name.endswith(columns) and place in tensors:
            m, _ = parts[name]
            if tensors[place].shape != (m,):
                remedy = "it is a vector, with an entry for each row"
                found = f"shape {tensors[place].shape}"
                raise FormatError(stored.file, place, found, f"shape {(m,)}", remedy)
            tensors[place] = tensors[place][:, None]


def _to_internal(stored: _Stored, dtype: Any) -> Weights:
    """The parameters under internal names, each module with its part of VeRA's A and B."""
    config, lora = stored.config, stored.config.lora
    c, targets = config.c, config.targets
    _make_columns(stored)
    transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
    names = {name: (place, transposed.get(name, False)) for name, place in stored.names.items()}
    m, n = shared_shape(targets)
    shapes = c.shapes() | targets.parts() | _row_shapes(config)
    shapes |= {"shared.A": (lora.r, n), "shared.B": (m, lora.r)}
    W = to_internal(stored.file, stored.tensors, names, shapes, dtype)
    if config.settings.get("save_projection"):
        W |= split_projections(W["shared.A"], W["shared.B"], targets)
    elif "save_projection" in config.settings:
        drawn = vera_projections(config.settings["projection_prng_key"], lora.r, m, n)
        A, B = (to_dtype(stored.file, "vera", factor, dtype) for factor in drawn)
        W |= split_projections(A, B, targets)
    return W
