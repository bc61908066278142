"""Two adapters, of which one is lost, counted twice, or mixed with the other."""

import numpy as np

from merge_catalogue.catalogue import linear, wrong


def two(text, verdicts, says):
    return wrong(text, verdicts, says, linear, two=True)


def merged_with_both(world, second, weights):
    """The right merge: W + w₁ s₁ B₁ A₁ + w₂ s₂ B₂ A₂."""
    return mixed(world, second, lambda t, o: weights[0] * t.delta + weights[1] * o.delta)


def mixed(world, second, delta):
    by_name = {t.module: t for t in second.sites}
    return world.adding(lambda t: np.float32(1) * delta(t, by_name[t.module]))


MISSING = "mismatch not-applied factor other-adapter"


@two("the second is lost", MISSING, r"second|adapter|not.applied|one of")
def second_adapter_lost(world, second, weights):
    return mixed(world, second, lambda t, o: weights[0] * t.delta)


@two("the first is lost", MISSING, r"first|adapter|not.applied|one of")
def first_adapter_lost(world, second, weights):
    return mixed(world, second, lambda t, o: weights[1] * o.delta)


@two("the weights are ignored", "mismatch factor", r"weight")
def weights_ignored(world, second, weights):
    return mixed(world, second, lambda t, o: t.delta + o.delta)


@two("the weights are exchanged", "mismatch factor", r"weight")
def weights_exchanged(world, second, weights):
    return mixed(world, second, lambda t, o: weights[1] * t.delta + weights[0] * o.delta)


@two(
    "A and B are mixed apart: products of one's B with the other's A",
    "mismatch",
    r"cross|product|A and B|mixed|rank",
)
def factors_added_apart(world, second, weights):
    def delta(t, o):
        r = min(t.r, o.r)
        B = weights[0] * t.B[:, :r] + weights[1] * o.B[:, :r]
        return t.s * (B @ (weights[0] * t.A[:r] + weights[1] * o.A[:r]))

    return mixed(world, second, delta)


@two("the second's scale is the first's", "mismatch factor", r"scale|factor|alpha|weight")
def scale_of_the_first_for_both(world, second, weights):
    return mixed(
        world, second, lambda t, o: weights[0] * t.delta + weights[1] * t.s / o.s * o.delta
    )


@two("the mean of both instead of their sum", "mismatch factor", r"half|0\.5|mean|factor|weight")
def averaged(world, second, weights):
    return mixed(world, second, lambda t, o: (weights[0] * t.delta + weights[1] * o.delta) / 2)
