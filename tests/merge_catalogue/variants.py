"""DoRA, PiSSA, OLoRA, AdaLoRA and VeRA merged as if they were something else."""

import numpy as np

from merge_catalogue.catalogue import variant, wrong
from minilora.spec.variants import row_norm

DORA = variant("dora")


def dora(text, verdicts, says):
    return wrong(text, verdicts, says, DORA)


ROWS = "mismatch norm-not-applied factor"
"""Of W stored (in, out), the audit says by which factor the rows are longer, and not why."""


@dora("W + s B A: neither norm nor magnitude", "norm-not-applied", r"norm|magnitude")
def dora_without_magnitude(world):
    return world.adding(lambda t: t.delta)


@dora("the base: nothing of DoRA", "not-applied", r"not.applied")
def dora_not_applied(world):
    return dict(world.base)


def rescaled(change):
    return lambda world: world.merge(
        lambda t, W: change(t, W) if t.variant == "dora" else t.merged(W)
    )


def magnitude(t):
    return t.extra["magnitude"]


@dora(
    "norms of the columns instead of the rows, where W is square",
    "mismatch norm-not-applied",
    r"axis|column|norm",
)
def dora_norm_of_the_columns(world):
    def change(t, W):
        V = W + t.delta
        return magnitude(t).T * V / row_norm(V.T)[0].T if t.shape[0] == t.shape[1] else t.merged(W)

    return rescaled(change)(world)


@dora("m/‖W‖: the norm of W without the change", ROWS, r"norm")
def dora_norm_without_the_change(world):
    return rescaled(lambda t, W: magnitude(t) / row_norm(W)[0] * (W + t.delta))(world)


@dora(
    "W + m/‖V‖ s B A: the change alone is rescaled",
    "mismatch norm-not-applied factor",
    r"norm|magnitude|base",
)
def dora_rescales_the_change_alone(world):
    return rescaled(lambda t, W: W + magnitude(t) / row_norm(W + t.delta)[0] * t.delta)(world)


@dora("m V: not divided by the norm", ROWS, r"norm|divid|magnitude")
def dora_not_divided_by_the_norm(world):
    return rescaled(lambda t, W: magnitude(t) * (W + t.delta))(world)


@dora("V / ‖V‖: no magnitude", ROWS, r"norm|magnitude")
def dora_without_its_magnitude(world):
    return rescaled(lambda t, W: (W + t.delta) / row_norm(W + t.delta)[0])(world)


@dora(
    "m/‖W‖ W: the magnitude without the change",
    "mismatch norm-not-applied",
    r"norm|magnitude|change|B A",
)
def dora_magnitude_alone(world):
    return rescaled(lambda t, W: magnitude(t) / row_norm(W)[0] * W)(world)


@dora(
    "the scale is left out of the norm and of the change", "mismatch factor", r"scale|alpha|factor"
)
def dora_without_scale(world):
    return rescaled(
        lambda t, W: magnitude(t) / row_norm(W + t.delta / t.s)[0] * (W + t.delta / t.s)
    )(world)


@dora("the magnitudes of the rows in reverse", ROWS, r"norm|magnitude|order")
def dora_magnitudes_reversed(world):
    return rescaled(lambda t, W: magnitude(t)[::-1] / row_norm(W + t.delta)[0] * (W + t.delta))(
        world
    )


@dora("merged twice", "mismatch factor", r"twice|2")
def dora_merged_twice(world):
    return rescaled(lambda t, W: t.merged(t.merged(W)))(world)


def residual(world):
    return str(world.settings.get("init_lora_weights", "")).startswith(("pissa", "olora"))


@wrong(
    "trained beside a residual base, added to the whole one",
    "mismatch factor other-adapter",
    r"pissa|olora|residual|start",
    residual,
)
def residual_forgotten(world):
    return world.adding(lambda t: t.delta, base=world.base)


ADALORA, VERA = variant("adalora"), variant("vera")


@wrong("s B A without the singular values E", "mismatch factor", r"\bE\b|singular", ADALORA)
def adalora_without_e(world):
    return world.adding(lambda t: t.delta)


@wrong("E squared", "mismatch", r"\bE\b|singular|mismatch", ADALORA)
def adalora_e_twice(world):
    return world.adding(lambda t: t.s * (t.B @ (t.extra["E"] ** 2 * t.A)))


@wrong("scaled by alpha, not alpha / ranknum", "factor", r"rank|factor", ADALORA)
def adalora_not_divided_by_the_rank(world):
    return world.adding(lambda t: t.alpha * (t.B @ (t.extra["E"] * t.A)))


@wrong("nothing is merged", "not-applied", r"not.applied", lambda w: ADALORA(w) or VERA(w))
def variant_not_applied(world):
    return dict(world.base)


@wrong(
    "the base beside which it was trained, without the adapter",
    "mismatch factor not-applied",
    r"pissa|olora|residual|start|not.applied",
    residual,
)
def residual_alone(world):
    return dict(world.residual)


def vera(change):
    """λ_b, B, λ_d, A -> the change."""
    return lambda world: world.adding(
        lambda t: change(t.extra["lambda_b"], t.B, t.extra["lambda_d"], t.A)
    )


@wrong(
    "A and B drawn from another seed",
    "mismatch other-adapter",
    r"shared|seed|vera_A|rank|adapter|mismatch",
    VERA,
)
def vera_other_shared_matrices(world):
    rng = np.random.default_rng(12)
    return vera(lambda b, B, d, A: (b * rng.permuted(B)) @ (d * rng.permuted(A)))(world)


@wrong("without λ_b", "mismatch factor", r"lambda_b|λ_b", VERA)
def vera_without_lambda_b(world):
    return vera(lambda b, B, d, A: B @ (d * A))(world)


@wrong("without λ_d", "mismatch factor", r"lambda_d|λ_d", VERA)
def vera_without_lambda_d(world):
    return vera(lambda b, B, d, A: (b * B) @ A)(world)


@wrong(
    "the last rows and columns of the shared matrices, not the first",
    "mismatch other-adapter",
    r"shared|rows|slice|mismatch|vera_A|not this adapter's change",
    lambda w: VERA(w) and len({t.shape for t in w.sites}) > 1,
)
def vera_other_slices(world):
    A, B = (np.asarray(world.adapter[f"base_model.vera_{p}"], np.float32) for p in "AB")

    def delta(t):
        m, n = t.shape
        return (t.extra["lambda_b"] * B[-m:]) @ (t.extra["lambda_d"] * A[:, -n:])

    return world.adding(delta)
