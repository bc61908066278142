"""Mutants of a layer whose operands have several dtypes."""

from __future__ import annotations

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.mixed import Mixed

MIXED = Reference((Mixed,), globals())


def _cast(operands: str, gradients: str, where: str = "True") -> dict[str, str]:
    """Operands cast to the base's dtype and back; an autograd library casts their gradients too."""

    def cast(names: str) -> str:
        each = ", ".join(f"{name}.astype(theirs).astype(of_factors)" for name in names.split(", "))
        return f"{names} = ({each}) if {where} else ({names})"

    return {"# operands": cast(operands), "# gradients": cast(gradients)}


def _hidden(dtype: str) -> dict[str, str]:
    """u cast to a dtype and back, and so its gradient."""
    return {
        "# hidden": f"H = H.astype({dtype}).astype(ours)",
        "# through the branch": f"dH = dH.astype({dtype}).astype(ours)",
    }


# fmt: off
PRECISION: Table = {
    "precision.digits": [
        ("adapters-as-base", "A and B rounded to the base's dtype before the forward",
         {"# operands": "A, B = (v.astype(theirs).astype(wide) for v in (A, B))"}),
        ("hidden-as-base", "u = A x stored in the base's dtype",
         {"# branch":
              "branch = (s * (H.astype(theirs).astype(wide) @ B.T.astype(wide))).astype(ours)"}),
        ("branch-in-base", "the branch computed in the base's dtype throughout",
         {"# branch": "B_ = B.astype(theirs).astype(wide); branch = (s * "
          "(h.astype(wide) @ A.T.astype(theirs).astype(wide)).astype(theirs).astype(wide) @ B_.T)"
          ".astype(ours)"}),
    ],
    "precision.vjp": [
        ("adapters-cast", "A and B cast to the base's dtype, and their gradients with them",
         _cast("A, B", "dA, dB")),
        ("A-cast", "A cast to the base's dtype, and its gradient with it", _cast("A", "dA")),
        ("B-cast", "B cast to the base's dtype, and its gradient with it", _cast("B", "dB")),
        ("u-cast", "u = A x cast to the base's dtype, and its gradient with it",
         _hidden("theirs")),
        ("u-in-float16", "u = A x cast to float16, and its gradient with it", _hidden("'float16'")),
        ("y-in-adapters-dtype", "y in the adapters' dtype",
         {"# output": "y = y.astype(of_factors)"}),
        ("dA-as-base", "dA rounded to the base's dtype",
         {"# gradients": "dA = dA.astype(theirs).astype(of_factors)"}),
        ("dB-as-base", "dB rounded to the base's dtype",
         {"# gradients": "dB = dB.astype(theirs).astype(of_factors)"}),
        ("dH-as-base", "du rounded to the base's dtype",
         {"# through the branch": "dH = dH.astype(theirs).astype(ours)"}),
        ("B-as-base-backward", "B rounded to the base's dtype in du",
         {"dH = (s * (G @ B.astype(wide)))": "dH = (s * (G @ B.astype(theirs).astype(wide)))"}),
        ("s-as-base", "s rounded to the base's dtype",
         {"# operands": "s = float(np.asarray(s, theirs))"}),
        ("dx-without-branch", "dx of the base alone",
         {"(dx + K * (dH.astype(wide) @ A.astype(wide)).astype(ours)).astype(given)":
              "dx.astype(given)"}),
        ("gradients-in-base-dtype", "dA and dB in the base's dtype",
         {"# gradients": "dA, dB = dA.astype(theirs), dB.astype(theirs)"}),
    ],
    "precision.forward": [
        ("branch-lost", "no branch where the adapters have another dtype than the base",
         {"# branch": "branch = branch * (theirs == ours)"}),
        ("y-coarse", "y rounded to half of the base's digits",
         {"# output": "y = coarse(y, theirs)"}),
    ],
    "precision.vjp.all": [
        ("rslora-as-base", "√r rounded to the base's dtype",
         {"s: Any = alpha * r**-0.5":
              "s: Any = alpha / float(np.asarray(r**0.5, theirs))"}),
        ("mask-as-base", "1/(1 - p) rounded to the base's dtype",
         {"# mask": "K = K if keep is None else K.astype(theirs).astype(wide)"}),
        ("dropped-as-base", "K ∘ x, K = keep / (1 - p), computed in the base's dtype",
         {"# mask": "K = K if keep is None else K.astype(theirs).astype(wide)",
          "# dropped": "h = h.astype(theirs).astype(ours)"}),
        ("adapters-as-base-in-training", "with dropout, A and B cast to the base's dtype",
         _cast("A, B", "dA, dB", "keep is not None")),
        ("B-as-base-with-rslora", "with rsLoRA, B cast to the base's dtype",
         _cast("B", "dB", "use_rslora")),
    ],
    "precision.forward.all": [
        ("bias-dropped", "no bias where the base has another dtype than the adapters",
         {"base = base if bias is None else":
              "base = base if bias is None or theirs != ours else"}),
    ],
    "precision.digits-vjp": [
        ("A-as-base-backward", "A rounded to the base's dtype in dx",
         {"(dH.astype(wide) @ A.astype(wide))":
              "(dH.astype(wide) @ A.astype(theirs).astype(wide))"}),
        ("u-as-base-backward", "u rounded to the base's dtype in dB",
         {"(G.T @ H.astype(wide))": "(G.T @ H.astype(theirs).astype(wide))"}),
    ],
    "precision.merge": [
        ("merge-as-base-coarse", "s B A rounded to half of the base's digits",
         {"# delta": "delta = coarse(delta, W.dtype)"}),
        ("merge-dtype", "the merged weight in the adapters' dtype",
         {"merged: Array = (W.astype(ours) + delta).astype(W.dtype)":
              "merged: Array = W.astype(ours) + delta"}),
    ],
    "precision.digits-merge": [
        ("merge-adapters-as-base", "A and B rounded to the base's dtype before they are merged",
         {"# factors": "A, B = (v.astype(W.dtype).astype(ours) for v in (A, B))"}, "peft 1388"),
    ],
    "precision.zero-B": [
        ("zero-B-noise", "y + the mean of A x where B is 0",
         {"# branch": "branch = branch + (0 if B.any() else H.mean())"}),
    ],
}
SAME: Same = [
    ("reference", "each product stored where its operands are", {}),
    ("branch-cast", "the branch cast to the base's dtype before the sum",
     {"# branch": "branch = branch.astype(theirs)"}),
    ("at-once", "base and branch summed before any is stored",
     {".astype(theirs)\n        base = base if": "\n        base = base if"}),
    ("merged-cast", "s B A stored in the base's dtype before the sum",
     {"# delta": "delta = delta.astype(W.dtype).astype(ours)"}),
    ("scaled-B", "s in B",
     {"(s * (H.astype(wide) @ B.T.astype(wide)))": "(H.astype(wide) @ (s * B).T.astype(wide))"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(MIXED, "PRECISION", PRECISION),
    *equivalents(MIXED, "precision", SAME),
)
