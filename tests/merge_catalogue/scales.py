"""The right change by a wrong factor."""

import numpy as np

from merge_catalogue.catalogue import linear, variant, wrong


def by(factor):
    """Each module adds its change times factor(site)."""
    return lambda world: world.adding(lambda site: np.float32(factor(site)) * site.delta)


def rslora(world):
    return linear(world) and bool(world.settings.get("use_rslora"))


def plain(world):
    return linear(world) and not world.settings.get("use_rslora")


def factor(text, says, f, where=linear):
    """Enter "every module by another factor"; the name is the text's first half."""
    name, _, formula = text.partition(": ")

    def make(world):
        return by(f)(world)

    make.__name__ = name.replace(" ", "_")
    wrong(f"W' = {formula}", "factor", says, where)(make)


factor("alpha and rank ignored: W + B A", r"alpha|scale", lambda t: 1 / t.s)
factor("rank ignored: W + alpha B A", r"rank|r\b", lambda t: t.alpha / t.s)
factor("alpha ignored but divided by r: W + B A / r", r"alpha", lambda t: 1 / (t.r * t.s))
factor("root for plain: W + alpha/sqrt(r) B A", r"sqrt|√|rslora", lambda t: t.r**0.5, plain)
factor("rslora ignored: W + alpha/r B A", r"rslora|sqrt|√", lambda t: t.r**-0.5, rslora)
factor("scaled twice: W + s² B A", r"twice|s²|squared", lambda t: t.s)
factor("divided by r twice: W + alpha/r² B A", r"r²|twice|/ ?r", lambda t: 1 / t.r)
factor("merged twice: W + 2 s B A", r"twice|2", lambda t: 2)
factor("merged thrice: W + 3 s B A", r"three|thrice|3", lambda t: 3)
factor("subtracted: W - s B A", r"negative|subtract|opposite|-1|minus", lambda t: -1)
factor("half the change: W + s B A / 2", r"half|0\.5", lambda t: 0.5)
factor("r over alpha: W + r/alpha B A", r"alpha|r/|inver", lambda t: t.s**-2, plain)
factor("square root of the scale: W + sqrt(s) B A", r"sqrt|√|root", lambda t: t.s**-0.5)
factor("strength of eight tenths: W + 0.8 s B A", r"0\.8|factor", lambda t: 0.8)
factor("inverted dropout kept: W + s B A / 0.9", r"1\.11|dropout|factor", lambda t: 1 / 0.9)
factor(
    "default alpha of sixteen: W + 16/r B A", r"alpha|factor|16", lambda t: 16 / t.r / t.s, plain
)
factor("scale of twenty as mlx: W + 20 B A", r"20|mlx|factor", lambda t: 20 / t.s)
factor("one twentieth more: W + 1.05 s B A", r"1\.05|factor", lambda t: 1.05)
factor("one hundredth more: W + 1.01 s B A", r"1\.01|factor", lambda t: 1.01)


@wrong(
    "α is the configuration's r of every module",
    "factor",
    r"pattern|rank",
    lambda w: linear(w) and bool(w.settings.get("rank_pattern")),
)
def rank_pattern_ignored_in_the_scale(world):
    return by(lambda t: (world.settings["lora_alpha"] / world.settings["r"]) / t.s)(world)


@wrong(
    "lora_alpha instead of alpha_pattern's",
    "factor",
    r"alpha_pattern|pattern|alpha",
    lambda w: linear(w) and bool(w.settings.get("alpha_pattern")),
)
def alpha_pattern_ignored(world):
    return by(lambda t: world.settings["lora_alpha"] / t.alpha)(world)


@wrong(
    "merged in one layer with another factor",
    "factor",
    r"1\.5|factor",
    lambda w: linear(w) and len(w.sites) > 2,
)
def another_factor_in_one_module(world):
    odd = world.sites[1].module
    return by(lambda t: 1.5 if t.module == odd else 1)(world)


@wrong(
    "merged and unmerged in place: W + s B A - s B A",
    "not-applied mismatch rounded-away factor",
    r"not.applied|unmerged|0\b|base",
)
def merged_and_unmerged(world):
    once = world.merge()
    return world.merge(lambda t, W: W - t.delta, base=once, tokens=False, saved=False)


@wrong("merged into what is merged already: rounded in between", "factor", r"twice")
def merged_into_the_merged(world):
    return world.merge(base=world.merge(), tokens=False, saved=False)


@wrong("b + c instead of b + s c", "bias-unscaled factor", r"bias", variant("lora_bias"))
def bias_unscaled(world):
    M = world.merge(biases=None)
    for t in world.sites:
        b = M.get(t.bias, np.zeros(t.shape[0], world.dtype))
        M[t.bias] = (b.astype(np.float32) + t.extra["c"][:, 0]).astype(world.dtype)
    return M


@wrong("b instead of b + s c", "not-applied missing", r"bias|not.applied", variant("lora_bias"))
def bias_forgotten(world):
    return world.merge(biases=None)


@wrong("b + 2 s c", "factor", r"bias|twice|2", variant("lora_bias"))
def bias_added_twice(world):
    return world.merge(biases=2.0)


@wrong("b - s c", "factor", r"bias|negative|-1", variant("lora_bias"))
def bias_subtracted(world):
    return world.merge(biases=-1.0)
