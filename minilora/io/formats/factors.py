"""Adapters as factors and scales, which formats without a `LoraConfig` read and write.

A `TrainableSpec` has the scale and the variant of each adapted module; before they are written, it
is checked that they and the weights belong together.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.errors import FormatError, listed
from minilora.spec.lora import (
    LORA,
    Params,
    TrainableSpec,
    Variant,
    Weights,
    adapted_in,
    is_base,
    scale,
)
from minilora.spec.models import Config
from minilora.spec.target_modules import LoraConfig
from minilora.spec.variants import DORA, DORA_FULL, REGISTRY, part_shapes


def parameter_shapes(
    c: Config, at: str, r: int, variant: Variant = LORA
) -> dict[str, tuple[int, int]]:
    """The names and shapes of the parameters that the module's adapter of rank r has."""
    shapes = part_shapes(variant, r, *c.matrices()[at])
    return {f"{at}.{part}": shape for part, shape in shapes.items()}


def file_name(path_of: Mapping[str, str], name: str) -> str:
    """The parameter's name in a file that calls the modules by ``path_of``."""
    at, _, part = name.rpartition(".")
    return f"{path_of[at]}.{part}"


def variant_name(variant: Variant) -> str:
    """The variant's first name in the registry."""
    names = (name for name, entry in REGISTRY.items() if entry.equation == variant)
    return next(names, repr(variant))


def check_factors(
    path: Path | str, c: Config, W: Params, tuning: TrainableSpec, known: Collection[Variant]
) -> dict[str, int]:
    """The rank of each adapted module, if W and ``tuning`` agree and a format can hold them.

    W is the whole model's, or the adapters' parameters alone.

    Errors: FormatError without adapters; for a module that cannot be adapted, or with a variant
    that is not ``known``, without a scale, with parameters missing or of another shape; unless just
    the adapters' parameters are trained; and for changed weights of the base beside them.
    """
    modules = adapted_in(W)
    if not modules or tuning.scale.keys() != set(modules):
        found = listed(tuning.scale.keys() ^ set(modules)) or "no adapter"
        remedy = "give the weights and the TrainableSpec that belong together"
        raise FormatError(path, "adapters", found, "a scale for each adapter", remedy)
    ranks, names = {}, set()
    for at in modules:
        variant = tuning.variant.get(at, LORA)
        if variant not in known:
            expected = " or ".join(map(variant_name, known))
            remedy = "the format cannot hold it: keep PEFT's, or merge the adapter"
            raise FormatError(path, f"variant of {at}", variant_name(variant), expected, remedy)
        ranks[at] = len(W[f"{at}.A"])
        names |= _check_shapes(path, c, W, at, variant)
    _check_others(path, c, W, tuning, names)
    return ranks


def _check_shapes(path: Path | str, c: Config, W: Params, at: str, variant: Variant) -> set[str]:
    """The names of the module's parameters, once all are there."""
    if at not in c.matrices():
        remedy = "is it another model's?"
        raise FormatError(path, f"{at}.A", f"no module {at}", f"one of {c}", remedy)
    shapes = parameter_shapes(c, at, len(W[f"{at}.A"]), variant)
    for name, shape in shapes.items():
        found = f"shape {W[name].shape}" if name in W else "none"
        if found != f"shape {shape}":
            raise FormatError(path, name, found, f"shape {shape}", "check W against c")
    return set(shapes)


def _check_others(
    path: Path | str, c: Config, W: Params, tuning: TrainableSpec, names: set[str]
) -> None:
    """Refuse what is trained beside the adapters' parameters, or changed in the base."""
    if extra := {name for name in W if not is_base(name)} - names:
        remedy = "the TrainableSpec names no variant that has them"
        raise FormatError(path, "parameters", listed(extra), "those of the variants", remedy)
    if wrong := tuning.trained ^ names:
        found = f"{listed(wrong)} {'beside them' if wrong - names else 'frozen'}"
        remedy = "the format holds factors and nothing else: keep PEFT's"
        raise FormatError(path, "trained", found, "the adapters' parameters, all of them", remedy)
    base = {name for name in W if is_base(name)}
    if base and not base >= c.shapes().keys():
        remedy = "the format holds factors and nothing else: keep PEFT's, or merge it"
        expected = "the adapters' parameters alone, or the whole model's"
        raise FormatError(path, "weights", f"{listed(base)} beside them", expected, remedy)


def alpha_of(s: Any, r: int, rslora: bool = False) -> int | float | None:
    """An alpha with scale(alpha, r) == s exactly, or None where no float64 is one.

    If s = α/r rounded, then α lies within two of the floats beside the rounded s r.
    """
    exact = float(s)  # beside a float32, NumPy would compare in float32
    if exact != s:
        return None
    near = exact * (r**0.5 if rslora else r)
    below, above = (np.nextafter(near, to) for to in (-np.inf, np.inf))
    candidates = [near, below, above, np.nextafter(below, -np.inf), np.nextafter(above, np.inf)]
    for alpha in map(float, candidates):
        if np.isfinite(alpha) and scale(alpha, r, rslora) == exact:
            return int(alpha) if alpha.is_integer() else alpha
    return None


def config_from_factors(
    path: Path | str, c: Config, W: Weights, tuning: TrainableSpec, dropout: float = 0.0
) -> LoraConfig:
    """A `LoraConfig` that makes these adapters, for a format that is written with one.

    Modules are named in full, ranks and alphas one by one.

    Errors: FormatError as :func:`check_factors` has it, for LoRA and DoRA; for two variants; for
    scales that are neither alpha / r nor alpha / √r of any float64 alphas.
    """
    ranks = check_factors(path, c, W, tuning, (LORA, DORA, DORA_FULL))
    variants = {variant_name(tuning.variant.get(at, LORA)) for at in ranks}
    if len(variants) > 1:
        found = listed(variants)
        raise FormatError(path, "variant", found, "one for all adapters", "write two files")
    for rslora in (False, True):
        alphas = {at: alpha_of(tuning.scale[at], r, rslora) for at, r in ranks.items()}
        if None not in alphas.values():
            break
    else:
        at = next(at for at, r in ranks.items() if alpha_of(tuning.scale[at], r) is None)
        found = f"{tuning.scale[at]!r} of {at} at rank {ranks[at]}"
        remedy = "no alpha gives it exactly: put the factor into B"
        raise FormatError(path, "scale", found, "alpha / r of a float64 alpha", remedy)
    first = next(iter(ranks))
    return LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        use_rslora=rslora,
        variant=variants.pop(),
        lora_dropout=dropout,
        target_modules=list(ranks),
        rank_pattern={at: r for at, r in ranks.items() if r != ranks[first]},
        alpha_pattern={at: alpha for at, alpha in alphas.items() if alpha != alphas[first]},
    )
