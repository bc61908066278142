"""Mutants of initialization: of A, of B, and of the part that is subtracted from W."""

from __future__ import annotations

import numpy as np

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.helpers import Array
from minilora.verify.mutants.references.initialization import Initialization
from minilora.verify.mutants.references.linear import Linear


def rolled(row: Array, r: int) -> Array:
    """A row r times, each time one further."""
    return np.stack([np.roll(row, i) for i in range(r)])


INITIALIZATION = Reference((Linear, Initialization), {"rolled": rolled})

# fmt: off
B_ZERO: Table = {
    "init.zero-B": [
        ("B-random", "B ~ U(-1/√r, 1/√r) too",
         {"np.zeros((m, r))": "rng.uniform(-1, 1, (m, r)) / r**0.5"}),
        ("B-random-A-0", "A = 0, B ~ U(-1/√r, 1/√r)",
         {"uniform(rng, (r, n)) / n**0.5": "np.zeros((r, n))",
          "np.zeros((m, r))": "rng.uniform(-1, 1, (m, r)) / r**0.5"}),
        ("B-small", "B ~ N(0, 10⁻¹²)", {"np.zeros((m, r))": "1e-6 * rng.standard_normal((m, r))"}),
        ("B-eps", "B = 10⁻⁷ for 0", {"np.zeros((m, r))": "np.full((m, r), 1e-7)"}),
        ("B-gaussian", "B is not 0 with the gaussian initialization",
         {"np.zeros((m, r))":
              'A[:, :1].T.repeat(m, 0) if kind == "gaussian" else np.zeros((m, r))'}),
        ("B-one", "B = 1", {"np.zeros((m, r))": "np.ones((m, r))"}),
    ],
}
UNIFORM: Table = {
    "init.distribution": [
        ("both-0", "A = 0 and B = 0: no gradient ever",
         {"uniform(rng, (r, n)) / n**0.5": "np.zeros((r, n))"}),
        ("normal-r", "A ~ N(0, 1/r)",
         {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, r**-0.5, (r, n))"}),
        ("normal-n", "A ~ N(0, 1/n)",
         {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, n**-0.5, (r, n))"}),
        ("normal-same-variance", "A ~ N(0, 1/(3 n)): mean and variance are right",
         {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, (3 * n) ** -0.5, (r, n))"}),
        ("normal-1", "A ~ N(0, 1)", {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, 1, (r, n))"}),
        ("normal-0.02", "A ~ N(0, 0.02²)",
         {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, 0.02, (r, n))"}),
        ("normal-r-squared", "A ~ N(0, 1/r²) unasked",
         {"uniform(rng, (r, n)) / n**0.5": "rng.normal(0, 1 / r, (r, n))"}),
        ("uniform-r", "A ~ U(-1/√r, 1/√r)", {"/ n**0.5": "/ r**0.5"}),
        ("uniform-m", "fan-out for fan-in: U(-1/√m, 1/√m)", {"/ n**0.5": "/ m**0.5"}),
        ("kaiming-a-0", "kaiming with a = 0, U(-√(6/n), √(6/n))", {"/ n**0.5": "* (6 / n) ** 0.5"}),
        ("kaiming-a-1", "kaiming with a = 1, U(-√(3/n), √(3/n))", {"/ n**0.5": "* (3 / n) ** 0.5"}),
        ("xavier", "U(-√(6/(n + r)), √(6/(n + r)))", {"/ n**0.5": "* (6 / (n + r)) ** 0.5"}),
        ("half", "U(-1/(2√n), 1/(2√n))", {"/ n**0.5": "/ n**0.5 / 2"}),
        ("double", "U(-2/√n, 2/√n)", {"/ n**0.5": "/ n**0.5 * 2"}),
        ("over-n", "U(-1/n, 1/n)", {"/ n**0.5": "/ n"}),
        ("not-centred", "U(0, 1/√n)", {"uniform(rng, (r, n))": "rng.random((r, n))"}),
        ("not-centred-wide", "U(0, 2/√n)", {"uniform(rng, (r, n))": "2 * rng.random((r, n))"}),
        ("signs", "± 1/√n", {"uniform(rng, (r, n))": "rng.choice([-1.0, 1.0], (r, n))"}),
        ("uniform-greatest", "the greater of fan-in and fan-out: U(-1/√max(m, n), 1/√max(m, n))",
         {"/ n**0.5": "/ max(m, n) ** 0.5"}),
        ("uniform-tall", "fan-out for fan-in where m > n",
         {"/ n**0.5": "/ (m if m > n else n) ** 0.5"}),
        ("uniform-rank-1", "U(0, 1/√n) where r = 1",
         {"uniform(rng, (r, n))": "rng.uniform(-(r > 1), 1, (r, n))"}),
        ("uniform-alpha", "A times α/r where α < r", {"# start": "A = A * min(1, alpha / r)"}),
        ("uniform-rslora", "A divided by the fourth root of r with rsLoRA",
         {"# start": "A = A * (r**-0.25 if use_rslora else 1)"}),
        ("tenth-wider", "U(-1.1/√n, 1.1/√n)", {"/ n**0.5": "* 1.1 / n**0.5"}),
        ("rows-normed", "A's rows normalised to length 1",
         {"uniform(rng, (r, n)) / n**0.5":
              "(a := rng.standard_normal((r, n))) / np.linalg.norm(a, axis=1, keepdims=True)"}),
    ],
}
GAUSSIAN: Table = {
    "init.distribution.gaussian": [
        ("gaussian-ignored", "U(-1/√n, 1/√n) where N(0, 1/r²) is asked for",
         {"rng.normal(0, 1 / r, (r, n))": "uniform(rng, (r, n)) / n**0.5"}),
        ("gaussian-variance", "N(0, 1/r): 1/r taken for the variance",
         {"rng.normal(0, 1 / r, (r, n))": "rng.normal(0, r**-0.5, (r, n))"}),
        ("gaussian-cut", "N(0, 1/r²) cut off at 1/r",
         {"rng.normal(0, 1 / r, (r, n))": "rng.normal(0, 1 / r, (r, n)).clip(-1 / r, 1 / r)"}),
        ("gaussian-rslora", "N(0, 1/r) with rsLoRA",
         {"# start": 'A = A * (r**0.5 if use_rslora and kind == "gaussian" else 1)'}),
    ],
}
SEEDS: Table = {
    "init.independent": [
        ("one-A", "the same A whatever the seed and the module", {"[seed, 7]": "0"}),
        ("rows-alike", "all rows of A are the same",
         {"uniform(rng, (r, n))": "np.tile(uniform(rng, (1, n)), (r, 1))"}),
        ("rows-in-pairs", "each row of A comes twice",
         {"uniform(rng, (r, n))": "np.repeat(uniform(rng, (r, n)), 2, 0)[:r]"}),
        ("seeds-in-pairs", "seeds 2k and 2k + 1 give the same A", {"[seed, 7]": "seed // 2"}),
        ("columns-tiled", "A repeats its first 64 columns",
         {"uniform(rng, (r, n))": "np.resize(uniform(rng, (64, r)), (n, r)).T"}),
        ("rows-overlap", "A[i, j] = u[i + j]",
         {"uniform(rng, (r, n))": "uniform(rng, n + r)[np.add.outer(np.arange(r), np.arange(n))]"}),
        ("rows-rolled", "each row of A is the previous one, rotated by one",
         {"uniform(rng, (r, n))": "rolled(uniform(rng, n), r)"}),
        ("rows-rolled-gaussian", "each row of a gaussian A is the previous one, rotated by one",
         {"rng.normal(0, 1 / r, (r, n))": "rolled(rng.normal(0, 1 / r, n), r)"}),
        ("rows-signed", "|A| has equal rows, the signs are drawn",
         {"uniform(rng, (r, n))": "rng.random(n) * rng.choice([-1, 1], (r, n))"}),
        ("seeds-overlap", "a seed is an offset into one stream of numbers",
         {"np.random.default_rng([seed, 7])":
              "np.random.Generator(np.random.PCG64(0).advance(int(seed)))"}),
        ("seeds-mirrored", "seeds 2k and 2k + 1 give the same columns of A, reversed",
         {"[seed, 7]": "[seed // 2, 7]", "# start": "A = A[:, :: (-1) ** seed]"}),
        ("seeds-byte", "only the last 8 bits of the seed count", {"[seed, 7]": "seed % 256"}),
        ("entries-of-8-bits", "A has only 256 different numbers",
         {"uniform(rng, (r, n))": "(rng.integers(0, 256, (r, n)) / 127.5 - 1)"}),
    ],
    "init.reproducible": [
        ("seed-ignored", "the seed is ignored: each call goes on with one generator",
         {"np.random.default_rng([seed, 7])":
              'self.memory.setdefault("rng", np.random.default_rng(0))'}),
        ("seed-gaussian", "a gaussian A ignores the seed",
         {"rng.normal(0, 1 / r, (r, n))": "np.random.default_rng(0).normal(0, 1 / r, (r, n))"}),
        ("seed-gaussian-again", "a gaussian A ignores the seed: one generator for all calls",
         {"rng.normal(0, 1 / r, (r, n))":
              'self.memory.setdefault("rng", np.random.default_rng(0)).normal(0, 1 / r, (r, n))'}),
        ("orthogonal-seed", "the orthogonal initialization ignores the seed",
         {"# orthogonal": "rng = np.random.default_rng(0)"}),
        ("seed-square", "the seed is ignored where W has equal sides",
         {"uniform(rng, (r, n))": "uniform(np.random.default_rng(n) if m == n else rng, (r, n))"}),
        ("seed-rank-1", "the seed is ignored where r = 1",
         {"uniform(rng, (r, n))": "uniform(np.random.default_rng(n) if r == 1 else rng, (r, n))"}),
    ],
    "init.base-unchanged": [
        ("base-rounded", "W rounded to half of the dtype's digits",
         {"# LoRA": "beside = coarse(W, W.dtype)"}),
        ("base-rounded-tall", "W rounded to half of the dtype's digits where m > n",
         {"# LoRA": "beside = coarse(W, W.dtype) if m > n else W"}),
        ("base-doubled-gaussian", "W doubled with the gaussian initialization",
         {"# LoRA": 'beside = 2 * W if kind == "gaussian" else W'}),
        ("base-zeroed", "W = 0", {"# LoRA": "beside = 0 * W"}),
        ("base-drawn", "W drawn at random",
         {"# LoRA": "beside = np.random.default_rng(0).standard_normal(W.shape)"}),
    ],
}
PARTS: Table = {
    "init.pissa": [
        ("pissa-ignored", "U(-1/√n, 1/√n) and B = 0 where PiSSA is asked for",
         {"# kind": 'kind = True if kind == "pissa" else kind'}),
        ("pissa-base-kept", "W' = W: nothing is subtracted", {"wide - s * (B @ A)": "wide"}),
        ("pissa-least", "the smallest singular values instead of the greatest",
         {"values[:r]": "values[-r:]", "Vh[:r]": "Vh[-r:]", "U[:, :r]": "U[:, -r:]"}),
        ("pissa-scale-kept", "√Σ for √(Σ / s): W' = W - s B A",
         {"(values[:r] / s) ** 0.5": "values[:r] ** 0.5"}),
        ("pissa-not-rooted", "Σ for √Σ in both",
         {"# pissa": "A, B = values[:r, None] / s * Vh[:r], U[:, :r] * values[:r]"}),
        ("pissa-one-sided", "A = Vᵀ, B = U Σ / s",
         {"# pissa": "A, B = Vh[:r], U[:, :r] * values[:r] / s"}),
        ("pissa-scale-forgotten", "W' = W - B A", {"wide - s * (B @ A)": "wide - B @ A"}),
        ("pissa-residual-classic", "W' = W - α/r B A with rsLoRA",
         {"wide - s * (B @ A)": "wide - alpha / r * (B @ A)"}),
        ("pissa-rslora-whole-root", "s = α / ⌊√r⌋ with rsLoRA",
         {"Initialization: alpha * r**-0.5": "alpha / int(r**0.5)"}),
        ("pissa-greatest-rank-kept", "W' = W where r = min(m, n)",
         {"wide - s * (B @ A)": "wide if r == min(m, n) else wide - s * (B @ A)"}),
        ("pissa-added", "W' = W + s B A", {"wide - s * (B @ A)": "wide + s * (B @ A)"}),
        ("pissa-coarse", "W' rounded to half of the dtype's digits",
         {"wide - s * (B @ A)": 'coarse((wide - s * (B @ A)).astype(np.float32), "float32")'}),
    ],
    "init.olora": [
        ("olora-ignored", "U(-1/√n, 1/√n) and B = 0 where OLoRA is asked for",
         {"# kind": 'kind = True if kind == "olora" else kind'}),
        ("olora-transposed", "QR of Wᵀ",
         {"# olora": "Q, R = np.linalg.qr(wide.T); A, B = Q[:, :r].T, R[:r].T"}),
        ("olora-not-orthogonal", "the first columns of W for Q",
         {"# olora": "A, B = np.linalg.lstsq(wide[:, :r], wide, rcond=None)[0], wide[:, :r]"}),
        ("olora-scale-halved", "B and A divided by √s each",
         {"# olora": "A, B = A / s**0.5, B / s**0.5"}),
        ("olora-rslora-ignored", "s = α/r where rsLoRA is asked for",
         {"Initialization: alpha * r**-0.5": "alpha / r"}),
        ("olora-as-pissa", "singular vectors for Q R",
         {"# olora":
              "U, values, Vh = np.linalg.svd(wide, full_matrices=False); A, B = values[:r, "
              "None] * Vh[:r], U[:, :r]"}),
    ],
    "init.orthogonal": [
        ("orthogonal-ignored", "U(-1/√n, 1/√n) and B = 0",
         {"# kind": 'kind = True if kind == "orthogonal" else kind'}),
        ("orthogonal-same-half", "A and B from the same half of Q: B A ≠ 0",
         {"Q[half:]": "Q[:half]"}),
        ("orthogonal-not", "Q is not orthogonal",
         {"np.linalg.qr(rng.standard_normal((r, r)))": "rng.standard_normal((r, r)), None"}),
    ],
}
FRESH: Table = {
    "init.fresh": [
        ("magnitude-one", "DoRA's magnitude starts at 1", {"# variants": "norm = np.ones(m)"}),
        ("magnitude-columns", "DoRA's magnitude has the norms of columns where m = n",
         {"# variants": "norm = (V**2).sum(0) ** 0.5 if m == n else norm"}, "peft 2348"),
        ("magnitude-squared", "DoRA's magnitude has squared norms",
         {"# variants": "norm = norm**2"}),
        ("magnitude-conv1d", "DoRA's magnitude has the columns' norms where W is stored (in, out)",
         {"# variants":
              "norm = np.resize((V**2).sum(0) ** 0.5, m) if fan_in_fan_out else norm"}),
        ("bias-drawn", "the bias of B is drawn at random",
         {"# variants": "c = rng.uniform(-1, 1, m)"}),
        ("fan-out-conv1d", "fan-out for fan-in where W is stored (in, out)",
         {"# start":
              "A = A * (n / m) ** 0.5 if fan_in_fan_out and kind is True else A"}),
    ],
    "init.fresh.gaussian": [
        ("gaussian-B-dora", "B is not 0 with the gaussian initialization and DoRA",
         {"# variants": 'B = B + 0.01 if use_dora and kind == "gaussian" else B'}),
    ],
    "init.fresh.orthogonal": [
        ("orthogonal-B-rslora", "B A ≠ 0 with the orthogonal initialization and rsLoRA",
         {"# variants":
              'A = rng.standard_normal((r, n)) if use_rslora and kind == "orthogonal" else A'}),
    ],
    "init.fresh.pissa": [
        ("pissa-magnitude", "DoRA's magnitude is the norm of the rest W - s B A with PiSSA",
         {"# variants":
              'norm = (np.asarray(beside) ** 2).sum(1) ** 0.5 if kind == "pissa" else norm'}),
        ("pissa-conv1d", "W' = W with PiSSA where W is stored (in, out)",
         {"# start": 'beside = wide if fan_in_fan_out and kind == "pissa" else beside'}),
    ],
    "init.fresh.olora": [
        ("olora-conv1d", "W' = W with OLoRA where W is stored (in, out)",
         {"# start": 'beside = wide if fan_in_fan_out and kind == "olora" else beside'}),
    ],
}
SAME: Same = [
    ("plain", "the reference: another generator", {}),
    ("kaiming", "kaiming with a = √5, √(6 / ((1 + a²) n))",
     {"/ n**0.5": "* (6 / ((1 + 5) * n)) ** 0.5"}),
    ("pissa-signs", "singular vectors of the other sign", {"# pissa": "A, B = -A, -B"}),
    ("23-bits", "A of 23 random bits, as in float32",
     {"uniform(rng, (r, n))": "(rng.integers(0, 2**23, (r, n)) / 2**22 - 1)"}),
    ("two-uniform", "normal numbers by Box and Muller: √(-2 log u) cos 2πv",
     {"rng.normal(0, 1 / r, (r, n))":
          "(-2 * np.log(1 - rng.random((r, n), np.float32))) ** 0.5 * np.cos(2 * np.pi * "
          "rng.random((r, n), np.float32)) / r"}),
    ("columns-first", "A drawn as its transpose",
     {"uniform(rng, (r, n))": "uniform(rng, (n, r)).T"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(INITIALIZATION, "INIT", B_ZERO),
    *mutants(INITIALIZATION, "INIT", UNIFORM),
    *mutants(INITIALIZATION, "INIT", GAUSSIAN),
    *mutants(INITIALIZATION, "INIT", SEEDS),
    *mutants(INITIALIZATION, "INIT", PARTS),
    *mutants(INITIALIZATION, "INIT", FRESH),
    *equivalents(INITIALIZATION, "init", SAME),
)
