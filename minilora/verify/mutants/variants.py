"""DoRA, and the bias of B, misread."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.verify.mutants.mutant import Mutant, equivalents, family
from minilora.verify.mutants.reference import Call, Plain, but, coarse, reads, then, wide, with_


def _dora(c: Call) -> bool:
    return bool(c.kind == "magnitude")


def _length(f: Any) -> Any:
    """`Plain` with another norm: a function of (V, call, the plain one)."""
    return but(length=lambda my, c: f(my.V(c), c, my))


def _unscaled_V(my: Plain, c: Call) -> Any:
    return c.W + (c.B @ c.A if _dora(c) else my.delta(c))


def _columns(V: Any, c: Call, my: Plain) -> Any:
    norms = (V**2).sum(0) ** 0.5
    return norms if len(norms) == len(V) else np.resize(norms, len(V))


def _through_norm(my: Plain, c: Call) -> Any:
    """dV through the norm, ∂L/∂v ∘ V / v."""
    v = my.length(c)
    dv = -(c.dy * my.turned(c)).sum(0) / v
    return (dv / v)[:, None] * my.V(c)


def _dA_through(my: Plain, c: Call) -> Any:
    dA = Plain.dA(my, c)
    return dA + my.ds(c) * (c.B.T @ _through_norm(my, c)) if _dora(c) else dA


def _dB_through(my: Plain, c: Call) -> Any:
    dB = Plain.dB(my, c)
    return dB + my.ds(c) * (_through_norm(my, c) @ c.A.T) if _dora(c) else dB


def _if_dora(name: str, f: Any) -> Any:
    """`Plain` with another method for DoRA: a function of (my, call)."""
    right = getattr(Plain, name)
    return but(**{name: lambda my, c: f(my, c) if _dora(c) else right(my, c)})


def _base_dropped(my: Plain, c: Call) -> Any:
    return my.turned(c) + c.b if _dora(c) else Plain.y(my, c)


def _base_undropped(my: Plain, c: Call) -> Any:
    """g ∘ (W x + s B A h): dropout on LoRA's branch alone."""
    return (c.x @ c.W.T + my.s(c) * (my.H(c) @ c.B.T)) * my.g(c) + c.b if _dora(c) else None


def _over_tokens(my: Plain, c: Call) -> Any:
    """The rescaling of outputs put on tokens, where that fits and nothing raises."""
    turned, g = Plain.turned(my, c), my.g(c)
    return turned / g * g[:, None] if len(turned) == len(g) > 1 else turned


def _without_rslora(c: Call) -> Call:
    return with_(c, rslora=lambda c: False)


def _bias_branch(part: Any) -> Any:
    """`Plain` with another bias of B in the output: a function of the call."""
    return but(branch=lambda my, c: my.s(c) * (my.H(c) @ c.B.T + part(c))
               if c.kind == "lora_bias" else Plain.branch(my, c))  # fmt: skip


def _y(f: Any) -> Any:
    """`Plain` with another output for DoRA: a function of (my, call)."""
    return but(y=lambda my, c: f(my, c) if _dora(c) else Plain.y(my, c))


DORA = (
    *family(
        "DORA",
        "variants.dora.forward",
        ("norm-of-W", "m ∘ V / ‖W‖", _length(lambda V, c, my: (c.W**2).sum(1) ** 0.5)),
        ("norm-unscaled", "‖W + B A‖", _length(
            lambda V, c, my: (_unscaled_V(my, c) ** 2).sum(1) ** 0.5)),
        ("norm-columns", "the norm of columns", _length(_columns), "peft 2348"),
        ("norm-frobenius", "one norm for all rows", _length(
            lambda V, c, my: np.full(len(V), (V**2).sum() ** 0.5))),
        ("norm-l1", "Σ |V|", _length(lambda V, c, my: abs(V).sum(1))),
        ("norm-greatest", "max |V|", _length(lambda V, c, my: abs(V).max(1))),
        ("norm-squared", "‖V‖²", _length(lambda V, c, my: (V**2).sum(1))),
        ("norm-rms", "the root mean square", _length(lambda V, c, my: (V**2).mean(1) ** 0.5)),
        ("norm-coarse", "the norm in half of the digits", then(length=coarse)),
        ("magnitude-ignored", "V / ‖V‖", _if_dora("g", lambda my, c: 1 / my.length(c))),
        ("not-normalised", "m ∘ V", _if_dora("g", lambda my, c: c.part)),
        ("plain", "V: no rescaling", _if_dora("g", lambda my, c: np.ones_like(c.part))),
        ("one-more", "(1 + m / ‖V‖) V", _if_dora("g", lambda my, c: 1 + c.part / my.length(c))),
        ("first-magnitude", "m₁ for all rows", _if_dora(
            "g", lambda my, c: c.part[0] / my.length(c))),
        ("base-alone", "g W + s B A", _if_dora(
            "turned", lambda my, c: my.kept(c) @ c.W.T * my.g(c)
            + my.s(c) * (my.H(c) @ c.B.T))),
        ("branch-alone", "W + g s B A", _if_dora(
            "turned", lambda my, c: my.kept(c) @ c.W.T
            + my.s(c) * (my.H(c) @ c.B.T) * my.g(c))),
        ("bias-scaled", "g (V x + b)", _y(lambda my, c: Plain.y(my, c) + (my.g(c) - 1) * c.b)),
        ("s-twice", "‖V‖ with s² B A", but(V=lambda my, c: c.W + (
            my.s(c) if _dora(c) else 1) * my.delta(c))),
    ),
    *family(
        "DORA",
        "variants.dora.forward.dropout",
        ("dropout-on-base", "m ∘ V h / ‖V‖ + b: the base's input is dropped too",
         _y(_base_dropped)),
        ("dropout-on-B-A", "g (W x + s B A h): the rescaled base is not dropped",
         _y(_base_undropped)),
    ),
    *family(
        "DORA",
        "variants.dora.forward.rslora",
        ("rslora-in-branch-alone", "‖V‖ with α/r where rsLoRA was asked", _length(
            lambda V, c, my: ((c.W + c.alpha / c.r * (c.B @ c.A)) ** 2).sum(1) ** 0.5)),
    ),
    *family(
        "DORA",
        "variants.dora.vjp",
        ("norm-differentiated", "dA and dB through the norm too: a convention, to be declared as "
         "{'dora_norm': 'differentiated'}", but(dA=_dA_through, dB=_dB_through)),
        ("dA-through-norm", "dA alone through the norm", but(dA=_dA_through)),
        ("dB-through-norm", "dB alone through the norm", but(dB=_dB_through)),
        ("dz-unscaled", "dA, dB, dx without m / ‖V‖", but(dz=lambda my, c: c.dy)),
        ("dm-zero", "dm = 0", _if_dora("dpart", lambda my, c: 0 * c.part)),
        ("dm-undivided", "dm without 1 / ‖V‖", _if_dora(
            "dpart", lambda my, c: Plain.dpart(my, c) * my.length(c))),
        ("dm-of-branch", "dm from s B A x alone", _if_dora(
            "dpart", lambda my, c: (c.dy * (my.s(c) * (my.H(c) @ c.B.T))).sum(0)
            / my.length(c))),
        ("dm-of-y", "dm from y, bias included", _if_dora(
            "dpart", lambda my, c: (c.dy * (my.turned(c) + c.b)).sum(0) / c.part)),
        ("dbias-scaled", "db with m / ‖V‖", but(dbias=lambda my, c: my.dz(c).sum(0))),
        ("dm-mean", "dm / t", _if_dora("dpart", lambda my, c: Plain.dpart(my, c) / len(c.x))),
        ("dx-of-base", "dx without (g - 1) W", but(
            dx_branch=lambda my, c: c.K * (my.dH(c) @ c.A))),
    ),
    *family(
        "DORA",
        "variants.dora.merge",
        ("merge-plain", "W + s B A", but(merged=lambda my, c: my.V(c))),
        ("merge-inverse", "‖V‖ / m", but(
            merged=lambda my, c: my.V(c) * (1 / my.g(c)[:, None] if _dora(c) else 1))),
        ("merge-base-unscaled", "W + g s B A", but(
            merged=lambda my, c: c.W + my.delta(c) * (my.g(c)[:, None] if _dora(c) else 1))),
        ("merge-unit", "V / ‖V‖", but(
            merged=lambda my, c: my.V(c) / (my.length(c)[:, None] if _dora(c) else 1))),
    ),
    *family(
        "DORA",
        "variants.dora.forward.evaluation",
        ("evaluation-scaled", "h = x / (1 - p) without a mask", then(
            kept=lambda x, c: x / (1 - c.p) if _dora(c) and not c.dropout else x)),
    ),
    *family(
        "DORA",
        "variants.dora.vjp.evaluation",
        ("evaluation-backward", "du / (1 - p) without a mask", then(
            dH=lambda v, c: v / (1 - c.p) if _dora(c) and not c.dropout else v)),
    ),
    *family(
        "DORA",
        "variants.dora.forward.conv1d",
        ("conv1d-norm", "the norm of columns with fan_in_fan_out", _length(
            lambda V, c, my: _columns(V, c, my) if c.conv1d else (V**2).sum(1) ** 0.5)),
    ),
    *family(
        "DORA",
        "variants.dora.vjp.conv1d",
        ("conv1d-gradients", "dA, dB, dx with the norm of columns with fan_in_fan_out", but(
            dz=lambda my, c: c.dy * c.part / _columns(my.V(c), c, my)
            if _dora(c) and c.conv1d else Plain.dz(my, c))),
    ),
    *family(
        "DORA",
        "variants.dora.merge.conv1d",
        ("conv1d-merged", "merged with the norm of columns with fan_in_fan_out", but(
            merged=lambda my, c: my.V(c) * (c.part / _columns(my.V(c), c, my))[:, None]
            if _dora(c) and c.conv1d else Plain.merged(my, c))),
    ),
    *family(
        "DORA",
        "variants.dora.init",
        ("norm-eps", "‖V‖ + 0.01", _length(lambda V, c, my: (V**2).sum(1) ** 0.5 + 0.01)),
    ),
    *family(
        "DORA",
        "variants.dora.vjp.dropout",
        ("dx-unmasked", "the rescaled base's dx without K", but(
            dx_branch=lambda my, c: c.K * (my.dH(c) @ c.A)
            + ((my.dz(c) - c.dy) @ c.W if _dora(c) else 0))),
    ),
    *family(
        "DORA",
        "variants.dora.vjp.rslora",
        ("ds-without-rslora", "α/r in the gradients where rsLoRA was asked", but(
            ds=lambda my, c: c.alpha / c.r)),
    ),
    *family(
        "DORA",
        "variants.dora.forward.all",
        ("rslora-lost-in-dropout", "s = α/r with rsLoRA where there is a dropout mask", but(
            s=lambda my, c: c.alpha / c.r if _dora(c) and c.dropout else Plain.s(my, c))),
        ("conv1d-undropped", "no dropout with fan_in_fan_out", but(
            kept=lambda my, c: c.x if _dora(c) and c.conv1d else Plain.kept(my, c))),
        ("magnitude-over-tokens", "(m / ‖V‖)ᵀ where there are as many tokens as outputs",
         _if_dora("turned", _over_tokens)),
        ("norm-cut-off", "‖V‖, or 0.001 if that is greater", _length(
            lambda V, c, my: np.maximum((V**2).sum(1) ** 0.5, V.dtype.type(1e-3)))),
    ),
    *family(
        "DORA",
        "variants.dora.vjp.all",
        ("ds-rslora-lost-in-dropout", "α/r in the gradients with rsLoRA where there is a dropout "
         "mask", but(ds=lambda my, c: c.alpha / c.r if _dora(c) and c.dropout
                     else Plain.ds(my, c))),
    ),
    *family(
        "DORA",
        "variants.dora.merge.all",
        ("merge-rslora-lost", "merged with α/r where rsLoRA was asked", but(
            merged=lambda my, c: Plain.merged(my, _without_rslora(c)))),
        ("merge-absolute", "|m| V / ‖V‖", but(
            merged=lambda my, c: Plain.merged(my, with_(c, part=lambda c: abs(c.part)))
            if _dora(c) else Plain.merged(my, c))),
    ),
    *family(
        "DORA",
        "variants.dora.unbatched-vjp",
        ("vector-dm-summed", "dm of a vector summed to a number", then(
            dpart=lambda v, c: v if c.lead or not _dora(c) else v.sum())),
        ("vector-dz-unscaled", "dA, dB, dx of a vector without m / ‖V‖", but(
            dz=lambda my, c: Plain.dz(my, c) if c.lead else c.dy)),
    ),
    *family(
        "DORA",
        "variants.dora.unbatched",
        ("vector-to-row", "y of a vector is a row (1, m)", but(
            shaped=lambda my, c, rows: rows if not c.lead and _dora(c)
            else Plain.shaped(my, c, rows)), "peft 0.21"),
    ),
)  # fmt: skip

LORA_BIAS = (
    *family(
        "BIAS-B",
        "variants.lora-bias.forward",
        ("unscaled", "s B A x + c", but(
            branch=lambda my, c: my.s(c) * (my.H(c) @ c.B.T)
            + (c.part if c.kind == "lora_bias" else 0))),
        ("ignored", "no c", but(branch=lambda my, c: my.s(c) * (my.H(c) @ c.B.T))),
        ("scaled-twice", "s² c", but(
            branch=lambda my, c: Plain.branch(my, c)
            + ((my.s(c) - 1) * my.s(c) * c.part if c.kind == "lora_bias" else 0))),
        ("first", "c₁ for all", reads(
            part=lambda c: None if c.part is None else c.part[:1].repeat(len(c.part)))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.forward.dropout",
        ("dropped", "c dropped with the input", but(
            branch=lambda my, c: my.s(c) * (my.H(c) @ c.B.T + (
                c.K[:, :1] * c.part if c.kind == "lora_bias" else 0)))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.forward.rslora",
        ("rslora-lost", "α/r c where rsLoRA was asked", but(
            branch=lambda my, c: my.s(c) * (my.H(c) @ c.B.T) + (
                c.alpha / c.r * c.part if c.kind == "lora_bias" else 0))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.vjp",
        ("dc-unscaled", "dc without s", but(
            dpart=lambda my, c: c.dy.sum(0) if c.kind == "lora_bias" else Plain.dpart(my, c))),
        ("dbias-of-branch", "db = dc", but(
            dbias=lambda my, c: my.dpart(c) if c.kind == "lora_bias" else Plain.dbias(my, c))),
        ("dc-zero", "dc = 0", then(dpart=lambda v, c: 0 * v if c.kind == "lora_bias" else v)),
        ("dc-mean", "dc / t", then(
            dpart=lambda v, c: v / len(c.x) if c.kind == "lora_bias" else v)),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.vjp.dropout",
        ("dc-kept", "dc with K", but(
            dpart=lambda my, c: my.ds(c) * (c.K[:, :1] * c.dy).sum(0)
            if c.kind == "lora_bias" else Plain.dpart(my, c))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.vjp.rslora",
        ("dc-rslora-lost", "α/r in dc where rsLoRA was asked", but(
            dpart=lambda my, c: c.alpha / c.r * c.dy.sum(0)
            if c.kind == "lora_bias" else Plain.dpart(my, c))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.forward.evaluation",
        ("evaluation-scaled", "h = x / (1 - p) without a mask", then(
            kept=lambda x, c: x / (1 - c.p) if c.kind == "lora_bias" and not c.dropout else x)),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.vjp.evaluation",
        ("evaluation-backward", "du / (1 - p) without a mask", then(
            dH=lambda v, c: v / (1 - c.p) if c.kind == "lora_bias" and not c.dropout else v)),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.forward.all",
        ("conv1d-ignored", "no c with fan_in_fan_out", _bias_branch(
            lambda c: 0 if c.conv1d else c.part)),
        ("vector-first", "c₁ for all outputs of a vector", _bias_branch(
            lambda c: c.part if c.lead else c.part[0])),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.vjp.all",
        ("vector-dc-summed", "dc of a vector summed to a number", then(
            dpart=lambda v, c: v if c.lead or c.kind != "lora_bias" else v.sum())),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.merge.all",
        ("merge-rslora-lost", "merged with α/r where rsLoRA was asked", but(
            merged=lambda my, c: Plain.merged(
                my, _without_rslora(c) if c.kind == "lora_bias" else c))),
    ),
    *family(
        "BIAS-B",
        "variants.lora-bias.merge",
        ("into-W", "s c added to W's rows", but(
            merged=lambda my, c: Plain.merged(my, c) + (
                my.s(c) * c.part[:, None] if c.kind == "lora_bias" else 0))),
    ),
)  # fmt: skip

SAME = equivalents(
    "variants",
    ("rows", "as it is", Plain),
    ("rescaled-weight", "with V rescaled first", _y(
        lambda my, c: c.x @ c.W.T + c.b + my.kept(c) @ (
            my.V(c) * my.g(c)[:, None] - c.W).T)),
    ("as-peft", "W x + (g - 1) W h + g s B A h", _if_dora(
        "branch", lambda my, c: (my.g(c) - 1) * (my.kept(c) @ c.W.T)
        + my.g(c) * (my.H(c) @ c.B.T) * my.s(c))),
    ("wide", "in float64, rounded at the end",
     reads(**wide("W", "A", "B", "x", "dy", "b", "part"))),
)  # fmt: skip

MUTANTS: tuple[Mutant, ...] = DORA + LORA_BIAS + SAME
