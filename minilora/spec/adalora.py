"""AdaLoRA's budget: how many singular values each projection keeps during training.

Beside its equation, y = W x + b + s B (E ∘ A x) (`adalora_linear`), AdaLoRA has a penalty that
keeps A and B near orthogonal, and a budget of singular values that all projections share. A
triplet is a singular value with its row of A and its column of B. The budget falls with the steps;
the triplets with the highest scores stay, the singular values of the others become 0.

All functions are pure; the running means are an `Importance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.spec.lora import Weights
from minilora.spec.ops import Array, Back, python_scalar


def adalora_scale(alpha: Any, r: int) -> Any:
    """s = α / (r + 10⁻⁵), r the rank at the start whatever is pruned; an α of 0 or less means r.

    Errors: ValueError if r < 1.
    Source: the code of Zhang et al. 2023, and PEFT's; equation 3 of the paper has no scale.
    """
    if r < 1:
        raise ValueError(f"rank {r}: expected at least 1")
    alpha = python_scalar(alpha)
    return (alpha if alpha > 0 else r) / (r + 1e-5)


def orthogonality(A: Array, B: Array) -> tuple[Array, Back]:
    """R = ‖BᵀB - I‖² + ‖A Aᵀ - I‖², Frobenius; 0 if A's rows and B's columns are orthonormal.

    With P = A Aᵀ - I, Q = BᵀB - I and dR given:   dA = 4 dR P A,   dB = 4 dR B Q.
    γ times the sum of R over all projections is added to the loss.

    Shapes: A (r, n), B (m, r) -> R ().
    Source: Zhang et al. 2023, "AdaLoRA", section 3.1, whose P, Q are B, A here.
    """
    eye = np.eye(len(A), dtype=A.dtype)
    P, Q = A @ A.T - eye, B.T @ B - eye
    R = (Q * Q).sum() + (P * P).sum()

    def back(dR: Any) -> tuple[Array, Array]:
        return 4 * dR * (P @ A), 4 * dR * (B @ Q)

    return R, back


def budget(step: int, initial: int, target: int, t_initial: int, t_final: int, total: int) -> int:
    """b = target + ⌊(initial - target) q³⌋, q = 1 - (t - t₀) / (T - t₁ - t₀) at t = ``step``.

    Up to t₀ = ``t_initial`` it is ``initial``, and from T - t₁ = ``total - t_final`` on ``target``.
    The arithmetic is in whole numbers: only the floor rounds.

    Errors: ValueError if target is not in 0 … initial, or no step is left between t₀ and T - t₁.
    Source: Zhang et al. 2023, section 3.3; counted as in its code and PEFT's.
    """
    if not 0 <= target <= initial:
        raise ValueError(f"target {target}: expected 0 to {initial}, the initial budget")
    if not 0 <= t_initial < total - t_final <= total:
        raise ValueError(
            f"t_initial {t_initial}, t_final {t_final}, total {total}: expected steps between "
            "t_initial and total - t_final, in which the budget falls"
        )
    span = total - t_final - t_initial
    left = min(max(total - t_final - step, 0), span)
    return target + (initial - target) * left**3 // span**3


def sensitivity(W: Array, dW: Array) -> Array:
    """I = |W ∘ dW|: how much the loss changes, to first order, if an entry becomes 0.

    Shapes: W (m, n), dW (m, n) -> I (m, n).
    Source: Zhang et al. 2023, section 3.2; Molchanov et al. 2019, of single weights.
    """
    return abs(W * dW)


def smooth(mean: Any, spread: Any, now: Array, beta1: Any, beta2: Any) -> tuple[Array, Array]:
    """Ī ← β₁ Ī + (1 - β₁) I, and Ū ← β₂ Ū + (1 - β₂) |I - Ī| with the new Ī; both from 0.

    Ī is ``mean``, the uncertainty Ū is ``spread``, and I is ``now``, the `sensitivity`.

    Shapes: mean (m, n), spread (m, n), now (m, n) -> Ī (m, n), Ū (m, n).
    Source: Zhang et al. 2023, section 3.2.
    """
    new = beta1 * mean + (1 - beta1) * now
    return new, beta2 * spread + (1 - beta2) * abs(now - new)


def triplet_scores(sA: Array, sB: Array, sE: Array) -> Array:
    """S = sE + the mean of each row of sA + the mean of each column of sB, for each triplet.

    The arguments are the scores s = Ī ∘ Ū of the entries of A, B and E.

    Shapes: sA (r, n), sB (m, r), sE (r, 1) -> S (r, 1).
    Source: Zhang et al. 2023, section 3.2.
    """
    m, n = len(sB), sA.shape[1]
    S: Array = sE + (sA.sum(1, keepdims=True) / n + sB.sum(0)[:, None] / m)
    return S


def allocate(scores: Mapping[str, Array], b: int) -> dict[str, Array]:
    """True for the b greatest of all projections' scores, False for the others.

    Among equal scores the first ones stay, by name and then by entry: always b triplets.

    Shapes: scores {name: S (r, 1)} -> {name: keep (r, 1)}.
    Errors: ValueError if b is not in 0 … the number of scores, or a score is NaN.
    Source: Zhang et al. 2023, section 3.2.
    """
    every = np.concatenate([S.ravel() for S in scores.values()]) if scores else np.zeros(0)
    if not 0 <= b <= every.size:
        raise ValueError(f"a budget of {b}: expected 0 to {every.size}, the number of triplets")
    if (every != every).any():
        raise ValueError("a score is NaN: there is no order; look at the gradients")
    keep = np.zeros(every.size, bool)
    keep[np.argsort(-every, kind="stable")[:b]] = True
    ends = np.cumsum([S.size for S in scores.values()])[:-1]
    parts = np.split(keep, ends) if scores else []
    return {at: part.reshape(scores[at].shape) for at, part in zip(scores, parts, strict=True)}


def prune(E: Array, keep: Array) -> Array:
    """E where ``keep`` is True, 0 elsewhere: a pruned singular value may grow again.

    Shapes: E (r, 1), keep (r, 1) -> E' (r, 1).
    Source: Zhang et al. 2023, section 3.2.
    """
    return np.where(keep, E, np.zeros_like(E))


@dataclass(frozen=True)
class BudgetPlan:
    """The schedule: the arguments of `budget`, the steps between prunings, β₁ and β₂.

    ``initial`` and ``target`` are the budgets of all projections together: PEFT's ``init_r`` and
    ``target_r`` times the number of projections.

    Errors: ValueError for an interval below 1.
    """

    initial: int
    target: int
    t_initial: int
    t_final: int
    total: int
    interval: int = 1
    beta1: Any = 0.85
    beta2: Any = 0.85

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval {self.interval}: expected 1 step or more")

    def budget(self, step: int) -> int:
        """The budget at a step."""
        times = self.t_initial, self.t_final, self.total
        return budget(step, self.initial, self.target, *times)


GAMMA = 0.1
"""γ, by which the sum of `orthogonality` over the projections counts in a run's loss: a tenth.

Source: the scripts of Zhang et al. 2023 for MNLI and CNN/DailyMail; PEFT has 0.5 unless told.
"""


def initial_rank(rank: int) -> int:
    """The rank at the start: 3/2 of the mean rank at the end.

    Source: the experiments of Zhang et al. 2023.
    """
    return (3 * rank + 1) // 2


def plan_budget(rank: int, projections: int, steps: int) -> BudgetPlan:
    """The plan of a run of ``steps`` steps after which projections have the mean rank ``rank``.

    Nothing is pruned in the first tenth of the steps, and the choice is fixed in the second half.

    Errors: ValueError for less than 3 steps.
    """
    if steps < 3:
        raise ValueError(f"{steps} steps: expected 3 or more, as AdaLoRA prunes before their half")
    ranks = projections * initial_rank(rank), projections * rank
    return BudgetPlan(*ranks, t_initial=steps // 10, t_final=steps // 2, total=steps)


def add_orthogonality(params: Weights, gradients: Weights, gamma: Any = GAMMA) -> Weights:
    """The gradients with those of γ Σ R added, R the `orthogonality` of each projection."""
    added: Weights = {}
    for at in (name.removesuffix(".E") for name in params if name.endswith(".E")):
        names = f"{at}.A", f"{at}.B"
        _, back = orthogonality(*(params[name] for name in names))
        added |= {name: gradients[name] + dR for name, dR in zip(names, back(gamma), strict=True)}
    return gradients | added


def without_pruned(params: Weights) -> Weights:
    """The parameters without triplets whose singular value is 0; at the start, where all are, all.

    A projection without triplets is left out. Other parameters stay as they are.
    """
    at = {name.removesuffix(".E"): E[:, 0] != 0 for name, E in params.items() if name[-2:] == ".E"}
    if not any(keep.any() for keep in at.values()):
        return dict(params)
    kept: Weights = {}
    for name, array in params.items():
        module, _, part = name.rpartition(".")
        keep = at.get(module)
        if keep is None or part not in ("A", "B", "E"):
            kept[name] = array
        elif keep.any():
            kept[name] = array[:, keep] if part == "B" else array[keep]
    return kept


@dataclass(frozen=True)
class Importance:
    """Ī and Ū of the adapters' parameters, and the triplets that the last pruning kept."""

    mean: Weights = field(default_factory=dict)
    spread: Weights = field(default_factory=dict)
    keep: Weights = field(default_factory=dict)

    def scores(self) -> dict[str, Array]:
        """The triplets' scores of each projection."""
        s = {name: self.mean[name] * self.spread[name] for name in self.mean}
        at = [name.removesuffix(".E") for name in s if name.endswith(".E")]
        return {k: triplet_scores(*(s[f"{k}.{part}"] for part in "ABE")) for k in at}


def advance(
    params: Weights, gradients: Weights, state: Importance, step: int, plan: BudgetPlan
) -> tuple[Weights, Importance]:
    """The parameters and the state after AdaLoRA's part of ``step``, which follows the optimizer's.

    ``params`` have x.A, x.B and x.E of every projection x, after the optimizer's step with
    ``gradients``. Before T - t₁ the gradients update Ī and Ū. After t₀, every ``interval`` steps
    and at T - t₁, the triplets within the budget are chosen and the others pruned. After T - t₁
    the choice is fixed, and the others are set to 0 at each step.

    Errors: those of `budget` and `allocate`.
    Source: Zhang et al. 2023, algorithm 1; the order of the steps is that of its code and PEFT's.
    """
    end = plan.total - plan.t_final
    if step < end:
        now = {
            name: smooth(
                state.mean.get(name, 0 * p),
                state.spread.get(name, 0 * p),
                sensitivity(p, gradients[name]),
                plan.beta1,
                plan.beta2,
            )
            for name, p in params.items()
        }
        mean, spread = ({name: pair[i] for name, pair in now.items()} for i in (0, 1))
        state = Importance(mean, spread, state.keep)
    chosen = plan.t_initial < step < end and step % plan.interval == 0
    if chosen or step == end:
        keep = allocate(state.scores(), plan.budget(step))
        state = Importance(state.mean, state.spread, keep)
    if not (chosen or step >= end):
        return params, state
    pruned = {f"{at}.E": prune(params[f"{at}.E"], keep) for at, keep in state.keep.items()}
    return params | pruned, state
