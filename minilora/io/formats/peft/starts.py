"""Initializations that are taken out of the base's weights: PiSSA, OLoRA, LoftQ.

PEFT takes the first two out of whatever base it loads the folder on, and so changes its weights.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.errors import FormatError
from minilora.spec.initialization import INITIALIZATIONS, convert_to_lora, converted_alpha
from minilora.spec.layers import with_tokens
from minilora.spec.lora import TABLES, Weights, weight_of
from minilora.spec.ops import Array
from minilora.spec.target_modules import LoraConfig, ResolvedTargets, scales

INIT_FROM_BASE = tuple(
    name for name, init in INITIALIZATIONS.items() if init.base != "kept" and init.in_peft
)
"""The initializations that PEFT takes out of the base whenever it loads it."""


def _take_out(
    path: Path, base: Mapping[str, Array], lora: LoraConfig, at: str, r: int, s: Any
) -> tuple[Array, Array, Array]:
    """The residual of the base's weight, and the A and B that are taken out of it."""
    start = INITIALIZATIONS[lora.init_lora_weights].start
    try:
        return start(np.random.default_rng(0), base[f"{at}.weight"], r, s)
    except ValueError as error:
        remedy, expected = "is it another model's?", f"a start of {at}"
        raise FormatError(path, lora.init_lora_weights, error, expected, remedy) from None


def changed_weights(
    path: Path, base: Mapping[str, Array], W: Weights, lora: LoraConfig, targets: ResolvedTargets
) -> Weights:
    """The base's weights that the adapter changes: residuals, and tables with trained rows."""
    changed: Weights = {}
    s = scales(lora, targets)
    for at, r in targets.rank.items() if lora.init_lora_weights in INIT_FROM_BASE else ():
        if at not in TABLES:
            changed[f"{at}.weight"] = _take_out(path, base, lora, at, r, s[at])[0]
    for at, ids in lora.trainable_token_indices.items():
        table = base[f"{at}.weight"]
        changed[f"{at}.weight"], _ = with_tokens(table, np.array(ids), W[f"{at}.tokens"])
    return changed


def put_back(
    folder: Path,
    W: Weights,
    lora: LoraConfig,
    targets: ResolvedTargets,
    base: Mapping[str, Array] | None,
) -> tuple[LoraConfig, ResolvedTargets, Weights]:
    """The adapter as one on ``base``, where the start changed the weights that it was made for.

    On W's own base nothing but the initialization changes. On the one from before the start, what
    was taken out is written too: at the doubled rank, V = R + s B A.

    Errors: FormatError without ``base``, and for another one than these two.
    """
    changes = INITIALIZATIONS[lora.init_lora_weights].base
    if changes == "kept":
        return lora, targets, W
    variant = "lora" if lora.variant in INITIALIZATIONS else lora.variant
    plain = replace(lora, init_lora_weights="kaiming", variant=variant)
    if base is None:
        remedy = "give base, the weights that the folder will be loaded on"
        expected = f"one, as {lora.init_lora_weights} changed W's"
        raise FormatError(folder, "base", "none", expected, remedy)
    weights = {at: weight_of(at, W) for at in targets.rank if at not in TABLES}
    before = {at: base[weight_of(at, {**base})] for at in weights}
    if all(np.array_equal(W[name], before[at]) for at, name in weights.items()):
        return plain, targets, W
    s = scales(lora, targets)
    sum_is_kept = lora.entry.injected is None and changes == "residual"
    factors: Weights = {}
    for at, name in weights.items():
        original = {f"{at}.weight": before[at]}
        residual, A0, B0 = _take_out(folder, original, lora, at, targets.rank[at], s[at])
        if not sum_is_kept or not np.array_equal(W[name], residual):
            remedy = "write the base of W beside it, with write_model, and give that"
            expected = f"W's, or one of which {lora.init_lora_weights} made W's"
            raise FormatError(folder, "base", f"another {at}.weight", expected, remedy)
        factors[f"{at}.A"], factors[f"{at}.B"] = convert_to_lora(W[f"{at}.A"], W[f"{at}.B"], A0, B0)
    plain, targets = _doubled(plain, targets)
    return plain, targets, {**W, **factors}


def _doubled(lora: LoraConfig, targets: ResolvedTargets) -> tuple[LoraConfig, ResolvedTargets]:
    """The same at twice the rank, with the same scales; tables stay as they are."""
    ranks = {at: r if at in TABLES else 2 * r for at, r in targets.rank.items()}
    alphas = {
        at: alpha if at in TABLES else converted_alpha(alpha, lora.use_rslora)
        for at, alpha in targets.alpha.items()
    }
    lora = replace(
        lora, r=2 * lora.r, lora_alpha=converted_alpha(lora.lora_alpha, lora.use_rslora),
        rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip
    return lora, replace(targets, rank=ranks, alpha=alphas, variant=lora.variant)
