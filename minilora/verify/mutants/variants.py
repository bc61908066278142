"""Mutants of DoRA and of the bias of B (lora_bias)."""

from __future__ import annotations

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.linear import Linear


def columns(V: Array) -> Array:
    """The norms of V's columns, as many as V has rows."""
    norms: Array = (V**2).sum(0) ** 0.5
    return norms if len(norms) == len(V) else np.resize(norms, len(V))


def through_norm(dy: Array, turned: Array, norm: Array, V: Array) -> Array:
    """dV through the norm, ∂L/∂norm ∘ V / norm."""
    dV: Array = (-(dy * turned).sum(0) / norm / norm)[:, None] * V
    return dV


VARIANTS = Reference((Linear,), globals())

BRANCH = {'name = "reference"': 'name, conventions = "reference", {"dora_dropout": "branch"}'}
"""Declares the other convention of dropout."""

WHOLE_BASE = {
    "turned = (h @ W.T + branch) * g": "turned = (x @ W.T + branch) * g",
    "branch = turned - h @ W.T": "branch = turned - x @ W.T",
}
"""The forward and dm under it."""

# fmt: off
DORA: Table = {
    "variants.dora.forward": [
        ("norm-of-W", "m ∘ V / ‖W‖",
         {"(V**2).sum(1) ** 0.5": "(W**2).sum(1) ** 0.5"}, "ComfyUI 15458"),
        ("norm-unscaled", "‖W + B A‖",
         {"(V**2).sum(1) ** 0.5": "((W + B @ A) ** 2).sum(1) ** 0.5"}),
        ("norm-columns", "the norms of V's columns instead of its rows",
         {"(V**2).sum(1) ** 0.5": "columns(V)"}, "catid/dora 4", "LyCORIS 216"),
        ("norm-frobenius", "one norm of V for all rows",
         {"(V**2).sum(1) ** 0.5": "np.full(len(V), (V**2).sum() ** 0.5)"}),
        ("norm-l1", "the L1 norm, Σ |V|", {"(V**2).sum(1) ** 0.5": "abs(V).sum(1)"}),
        ("norm-greatest", "the maximum norm, max |V|", {"(V**2).sum(1) ** 0.5": "abs(V).max(1)"}),
        ("norm-squared", "‖V‖²", {"(V**2).sum(1) ** 0.5": "(V**2).sum(1)"}),
        ("norm-rms", "the root mean square of V's rows for ‖V‖",
         {"(V**2).sum(1) ** 0.5": "(V**2).mean(1) ** 0.5"}),
        ("norm-coarse", "‖V‖ rounded to half of the dtype's digits",
         {"(V**2).sum(1) ** 0.5": "coarse((V**2).sum(1) ** 0.5, dtype)"}),
        ("magnitude-ignored", "V / ‖V‖: m = 1", {"m / norm": "1 / norm"}),
        ("not-normalised", "m ∘ V: not divided by ‖V‖", {"m / norm": "m"}),
        ("plain", "V: plain LoRA", {"m / norm": "np.ones_like(m)"}),
        ("one-more", "(1 + m / ‖V‖) V", {"m / norm": "1 + m / norm"}),
        ("first-magnitude", "m₁ for all rows", {"m / norm": "m[0] / norm"}),
        ("base-alone", "g W + s B A", {"(h @ W.T + branch) * g": "h @ W.T * g + branch"}),
        ("branch-alone", "W + g s B A", {"(h @ W.T + branch) * g": "h @ W.T + branch * g"}),
        ("bias-scaled", "g (V x + b)", {"# output": "y = y + (g - 1) * b if dora else y"}),
        ("s-twice", "V = W + s² B A", {"W + delta": "W + (s if dora else 1) * delta"}),
    ],
    "variants.dora.forward.dropout": [
        ("dropout-on-base", "m ∘ V h / ‖V‖ + b: the base's input is dropped too",
         {"base + branch": "turned + b if dora else base + branch"}),
        ("dropout-on-B-A",
         "g (W x + s B A h): the rescaled base is not dropped: a convention, to be declared as "
         "{'dora_dropout': 'branch'}",
         {"base + branch": "(x @ W.T + s * (H @ B.T)) * g + b if dora else base + branch"}),
    ],
    "variants.dora.forward.rslora": [
        ("rslora-in-branch-alone", "‖V‖ with α/r where rsLoRA was asked",
         {"(V**2).sum(1) ** 0.5": "((W + alpha / r * (B @ A)) ** 2).sum(1) ** 0.5"}),
    ],
    "variants.dora.vjp": [
        ("norm-differentiated",
         "dA and dB through the norm too: a convention, to be declared as {'dora_norm': "
         "'differentiated'}",
         {"# gradients":
              "dV = through_norm(dy, turned, norm, V) if dora else 0 * W; dA, dB = dA + ds * "
              "(B.T @ dV), dB + ds * (dV @ A.T)"}),
        ("dA-through-norm", "dA alone through the norm",
         {"# gradients":
              "dV = through_norm(dy, turned, norm, V) if dora else 0 * W; dA = dA + ds * (B.T @ "
              "dV)"}),
        ("dB-through-norm", "dB alone through the norm",
         {"# gradients":
              "dV = through_norm(dy, turned, norm, V) if dora else 0 * W; dB = dB + ds * (dV @ "
              "A.T)"}),
        ("dz-unscaled", "dA, dB, dx without m / ‖V‖", {"dy * g if dora else dy": "dy"}),
        ("dm-zero", "dm = 0", {"(dy * turned).sum(0) / m": "0 * m"}),
        ("dm-undivided", "dm without 1 / ‖V‖",
         {"(dy * turned).sum(0) / m": "(dy * turned).sum(0) / m * norm"}),
        ("dm-of-branch", "dm from s B A x alone",
         {"(dy * turned).sum(0) / m": "(dy * (s * (H @ B.T))).sum(0) / norm"}),
        ("dm-of-y", "dm from y, with the bias b",
         {"(dy * turned).sum(0) / m": "(dy * (turned + b)).sum(0) / m"}),
        ("dbias-scaled", "db times m / ‖V‖", {"# gradients": "dbias = dz.sum(0)"}),
        ("dm-mean", "dm / t", {"(dy * turned).sum(0) / m": "(dy * turned).sum(0) / m / len(x)"}),
        ("dx-of-base", "dx without the base's (m / ‖V‖ - 1) W",
         {"dx_branch = dx_branch + (dz - dy) @ W": "pass"}),
    ],
    "variants.dora.bias-gradient": [
        ("dbias-in-parts", "db = Σ (dy + (m / ‖V‖ - 1) dy) - Σ (m / ‖V‖ - 1) dy, each rounded",
         {"# gradients":
              "part = (dy * (g - 1)).astype(dtype).astype(dy.dtype) if dora else 0 * dy; dbias = "
              "(dy + part).astype(dtype).astype(dy.dtype).sum(0) - part.sum(0)"},
         "peft 0.21.2"),
    ],
    "variants.dora.bias-merged": [
        ("bias-merged-scaled", "merging multiplies the layer's bias by m/‖V‖",
         {"# bias": "b = b * g if dora else b"}),
    ],
    "variants.dora.merge": [
        ("merge-plain", "W + s B A", {"# merged": "merged = V"}),
        ("merge-inverse", "V ∘ ‖V‖ / m",
         {"# merged": "merged = V * (1 / g[:, None]) if dora else V"}),
        ("merge-base-unscaled", "W + g s B A",
         {"# merged": "merged = W + delta * g[:, None] if dora else V"}),
        ("merge-unit", "V / ‖V‖", {"# merged": "merged = V / norm[:, None] if dora else V"}),
    ],
    "variants.dora.forward.evaluation": [
        ("evaluation-scaled", "h = x / (1 - p) where there is no mask",
         {"x * K": "x * K / (1 - p) if dora and not dropout else x * K"}),
    ],
    "variants.dora.vjp.evaluation": [
        ("evaluation-backward", "du / (1 - p) where there is no mask",
         {"ds * (dz @ B)": "ds * (dz @ B) / (1 - p if dora and not dropout else 1)"}),
    ],
    "variants.dora.forward.conv1d": [
        ("conv1d-norm", "the norms of V's columns with fan_in_fan_out",
         {"(V**2).sum(1) ** 0.5": "columns(V) if fan_in_fan_out else (V**2).sum(1) ** 0.5"}),
    ],
    "variants.dora.vjp.conv1d": [
        ("conv1d-gradients", "dA, dB, dx with the norms of V's columns with fan_in_fan_out",
         {"dy * g if dora else dy":
              "dy * (m / columns(V) if fan_in_fan_out else g) if dora else dy"}),
    ],
    "variants.dora.merge.conv1d": [
        ("conv1d-merged", "merged with the norms of V's columns with fan_in_fan_out",
         {"# merged":
              "merged = V * (m / columns(V))[:, None] if dora and fan_in_fan_out else merged"}),
    ],
    "variants.dora.init": [
        ("norm-eps", "‖V‖ + 0.01", {"(V**2).sum(1) ** 0.5": "(V**2).sum(1) ** 0.5 + 0.01"}),
    ],
    "variants.dora.vjp.dropout": [
        ("dx-unmasked", "the rescaled base's dx without K",
         {"dx_branch = dx_branch + (dz - dy) @ W": "pass",
          "K * dx_branch": "K * dx_branch + ((dz - dy) @ W if dora else 0)"}),
        ("branch-dx-dropped", "dx of g W x with K, where dropout on the branch was declared",
         BRANCH | WHOLE_BASE),
    ],
    "variants.dora.vjp.rslora": [
        ("ds-without-rslora", "α/r in the gradients where rsLoRA was asked",
         {"ds = s": "ds = alpha / r"}),
    ],
    "variants.dora.forward.all": [
        ("rslora-lost-in-dropout", "s = α/r with rsLoRA where there is a dropout mask",
         {"ds = s": "ds = s = alpha / r if dora and dropout else s"}),
        ("conv1d-undropped", "no dropout with fan_in_fan_out",
         {"x * K": "x if dora and fan_in_fan_out else x * K"}),
        ("magnitude-over-tokens", "tokens instead of outputs rescaled where t = m",
         {"branch = turned - h @ W.T":
              "turned = turned / g * g[:, None] if len(x) == len(g) > 1 else turned; branch = "
              "turned - h @ W.T"}),
        ("norm-cut-off", "max(‖V‖, 0.001)",
         {"(V**2).sum(1) ** 0.5": "np.maximum((V**2).sum(1) ** 0.5, V.dtype.type(1e-3))"}),
    ],
    "variants.dora.vjp.all": [
        ("ds-rslora-lost-in-dropout",
         "α/r in the gradients with rsLoRA where there is a dropout mask",
         {"ds = s": "ds = alpha / r if dora and dropout else s"}),
    ],
    "variants.dora.merge.all": [
        ("merge-rslora-lost", "merged with α/r where rsLoRA was asked",
         {"ds = s": "ds = s = alpha / r if x is None else s"}),
        ("merge-absolute", "|m| V / ‖V‖",
         {"# merged": "merged = V * abs(g)[:, None] if dora else merged"}),
    ],
    "variants.dora.unbatched-vjp": [
        ("vector-dm-summed", "dm of a vector summed to a number",
         {"(dy * turned).sum(0) / m": "(dy * turned).sum(0) / m; dm = dm if shape else dm.sum()"}),
        ("vector-dz-unscaled", "dA, dB, dx of a vector without m / ‖V‖",
         {"dy * g if dora else dy": "dy * g if dora and shape else dy"}),
    ],
    "variants.dora.unbatched": [
        ("vector-to-row", "y of a vector is a row (1, m)",
         {"# output": "shape = shape or (1,) if dora else shape"}, "peft 0.21"),
    ],
}
LORA_BIAS: Table = {
    "variants.lora-bias.forward": [
        ("unscaled", "c is not scaled: s B A x + c", {"branch + s * c": "branch + c"}),
        ("ignored", "no bias c of B", {"branch = branch + s * c": "pass"}),
        ("scaled-twice", "c is scaled twice: s² c", {"branch + s * c": "branch + s**2 * c"}),
        ("first", "c₁ for all outputs",
         {"# arrays": "c = None if c is None else c[:1].repeat(len(c))"}),
    ],
    "variants.lora-bias.forward.dropout": [
        ("dropped", "dropout on c", {"branch + s * c": "branch + s * K[:, :1] * c"}),
    ],
    "variants.lora-bias.forward.rslora": [
        ("rslora-lost", "α/r c where rsLoRA was asked",
         {"branch + s * c": "branch + alpha / r * c"}),
    ],
    "variants.lora-bias.vjp": [
        ("dc-unscaled", "dc without s", {"ds * dy.sum(0)": "dy.sum(0)"}),
        ("dbias-of-branch", "db = dc", {"# gradients": "dbias = dbias if c is None else dc"}),
        ("dc-zero", "dc = 0", {"ds * dy.sum(0)": "0 * dy.sum(0)"}),
        ("dc-mean", "dc / t", {"ds * dy.sum(0)": "ds * dy.sum(0) / len(x)"}),
    ],
    "variants.lora-bias.vjp.dropout": [
        ("dc-kept", "dropout on dc", {"ds * dy.sum(0)": "ds * (K[:, :1] * dy).sum(0)"}),
    ],
    "variants.lora-bias.vjp.rslora": [
        ("dc-rslora-lost", "α/r in dc where rsLoRA was asked",
         {"ds * dy.sum(0)": "alpha / r * dy.sum(0)"}),
    ],
    "variants.lora-bias.forward.evaluation": [
        ("evaluation-scaled", "h = x / (1 - p) where there is no mask",
         {"x * K": "x * K / (1 - p) if c is not None and not dropout else x * K"}),
    ],
    "variants.lora-bias.vjp.evaluation": [
        ("evaluation-backward", "du / (1 - p) where there is no mask",
         {"ds * (dz @ B)": "ds * (dz @ B) / (1 - p if c is not None and not dropout else 1)"}),
    ],
    "variants.lora-bias.forward.all": [
        ("conv1d-ignored", "no bias c of B with fan_in_fan_out",
         {"branch + s * c": "branch + (0 if fan_in_fan_out else s * c)"}),
        ("vector-first", "c₁ for all outputs of a vector",
         {"branch + s * c": "branch + s * (c if shape else c[0])"}),
    ],
    "variants.lora-bias.vjp.all": [
        ("vector-dc-summed", "dc of a vector summed to a number",
         {"ds * dy.sum(0)": "ds * dy.sum(0) if shape else (ds * dy.sum(0)).sum()"}),
    ],
    "variants.lora-bias.merge.all": [
        ("merge-rslora-lost", "merged with α/r where rsLoRA was asked",
         {"ds = s": "ds = s = alpha / r if x is None and c is not None else s"}),
    ],
    "variants.lora-bias.merge": [
        ("into-W", "s c added to W's rows",
         {"# merged": "merged = merged if c is None else merged + s * c[:, None]"}),
    ],
}
SAME: Same = [
    ("rows", "the reference", {}),
    ("rescaled-weight", "through the rescaled weight m ∘ V / ‖V‖",
     {"base + branch": "base + (h @ (V * g[:, None] - W).T if dora else branch)"}),
    ("as-peft", "W x + (g - 1) W h + g s B A h",
     {"turned - h @ W.T": "(g - 1) * (h @ W.T) + g * (H @ B.T) * s"}),
    ("dropout-on-branch", "g (W x + s B A h) + b, as declared",
     BRANCH | WHOLE_BASE | {"dx_branch = dx_branch + (dz - dy) @ W": "dx_base = dz @ W"}),
    ("wide", "in float64, rounded at the end",
     {"# inputs": "x, dy = doubled(x, dy)",
      "# arrays": "W, A, B, b, m, c = doubled(W, A, B, b, m, c)"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(VARIANTS, "DORA", DORA),
    *mutants(VARIANTS, "BIAS-B", LORA_BIAS),
    *equivalents(VARIANTS, "variants", SAME),
)
