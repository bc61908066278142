"""Every variant on every kind of layer, and the starts, against the libraries that define them."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, record_worst, same_bits
from extras import optional

from minilora.spec.initialization import DRAW, loftq, olora, orthogonal, pissa
from minilora.spec.layers import PADDING
from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.ops import linear
from minilora.spec.quantization import dequantize, quantize
from minilora.spec.variants import (
    REGISTRY,
    dora_full_linear,
    dora_linear,
    rescaled_linear,
    row_norm,
)
from minilora.verify.properties.layer_kinds import KINDS, answers

torch = optional("torch")
optional("transformers")
optional("peft")
optional("loralib")
peers = importlib.import_module("minilora.verify.properties.libraries")
deviation = peers.deviation

CELLS = [(entry, kind) for kind in KINDS for entry in REGISTRY if kind not in REGISTRY[entry].lacks]

UNKNOWN_START = "ValueError: Unknown initialization init_lora_weights="
SILENT = "makes it plain LoRA's start, without a word"
NO_PARAMETERS = "ValueError: lora.ParamWrapper does not work with"
NO_CONFIG = "TypeError: LoraLayer.loftq_init() missing 1 required positional argument: 'config'"
NO_VERA = "ValueError: No layers types compatible with VeRA were found"
NO_ADALORA = "is not supported. Currently, only `torch.nn.Linear`, `Conv1D`, and `torch.nn.Conv2d`"
NO_LYCORIS = "ValueError: unknown is not supported in LoRA/LoCon algo."
NONE = {
    **{(entry, "embedding"): SILENT for entry in ("gaussian", "orthogonal", "pissa", "olora")},
    **{
        (entry, kind): UNKNOWN_START
        for entry in ("orthogonal", "pissa", "olora")
        for kind in ("conv1", "conv2")
    },
    **{("loftq", kind): NO_CONFIG for kind in ("embedding", "experts", "conv1", "conv2")},
    **{("vera", kind): NO_VERA for kind in ("embedding", "conv1", "conv2")},
    **{("adalora", kind): NO_ADALORA for kind in ("embedding", "conv1")},
    **{("dora-full", kind): NO_LYCORIS for kind in ("transposed", "embedding", "experts")},
    ("lora-bias", "experts"): f"{NO_PARAMETERS} lora_bias=True.",
    ("dora", "experts"): f"{NO_PARAMETERS} use_dora=True.",
    ("pissa", "experts"): "RuntimeError: size mismatch",
    ("olora", "experts"): "RuntimeError: The size of tensor a (3) must match the size of tensor b",
    ("orthogonal", "experts"): "makes A (2, 5) where it needs (6, 5)",
    ("vera", "experts"): "TypeError: VeraConfig.__init__() got an unexpected keyword argument",
    ("adalora", "experts"): "TypeError: AdaLoraModel._create_and_replace() got an unexpected",
    ("olora", "transposed"): "makes A (2, 3) where it needs (2, 5)",
    ("loftq", "transposed"): "makes A (2, 3) where it needs (2, 5)",
}
"""The cells that no library has, and why: by its own error, or what it makes instead."""


NO_MERGE = {
    **{
        ("alora", kind): "NotImplementedError: aLoRA does not support merging."
        for kind in ("linear", "transposed", "fused", "tied")
    },
    ("lora-bias", "tied"): "RuntimeError: Impossible to merge LoRA with `lora_bias=True`",
}
"""What is compared and not merged: an activated adapter, and a bias where the base has none."""

COMPARED = [cell for cell in CELLS if cell not in NONE]


def skip_without_library(entry):
    if entry == "dora-full":
        optional("lycoris")


@pytest.mark.parametrize(("entry", "kind"), COMPARED)
def test_a_variant_on_a_kind_of_layer_is_the_librarys(entry, kind):
    skip_without_library(entry)
    for seed, square in ((0, False), (1, True)):
        found = deviation(entry, kind, seed, square)
        record_worst("variants on kinds of layers against the libraries", found.worst)
        assert found.worst <= GRADIENT, found.by


@pytest.mark.parametrize(("entry", "kind"), NONE)
def test_what_no_library_has_it_refuses_still(entry, kind):
    """Seen in peft 0.21.2 and lycoris_lora 4.1.3."""
    skip_without_library(entry)
    for compare in (deviation, peers.merge_deviation):
        found = compare(entry, kind)
        assert found.worst is None
        assert NONE[entry, kind] in found.by


@pytest.mark.parametrize(("entry", "kind"), COMPARED)
def test_the_merged_weight_is_the_librarys(entry, kind):
    """Seen in peft 0.21.2 and lycoris_lora 4.1.3."""
    skip_without_library(entry)
    for seed, square in ((0, False), (1, True)):
        found = peers.merge_deviation(entry, kind, seed, square)
        if (entry, kind) in NO_MERGE:
            assert found.worst is None
            assert NO_MERGE[entry, kind] in found.by
        else:
            record_worst("merged variants against the libraries", found.worst)
            assert found.worst <= GRADIENT, found.by


def test_every_cell_is_compared_or_refused():
    assert NONE.keys() < set(CELLS)
    assert NO_MERGE.keys() < set(COMPARED)


def test_second_opinions_are_asked():
    for kind in ("linear", "transposed", "embedding"):
        assert "loralib" in deviation("lora", kind).by
    assert "loralib" in deviation("lora", "fused", square=True).by
    assert "loralib" not in deviation("lora", "fused").by  # its parts are of one size


def test_convolutions_with_dilation_are_compared_with_lycoris():
    skip_without_library("dora-full")
    for kind in ("conv1", "conv2"):
        for entry in ("lora", "dora-full"):
            assert "lycoris" in deviation(entry, kind).by


def test_convolutions_are_compared_in_every_padding_mode():
    modes = set()

    def ours(case):
        modes.add(case.extra["geometry"].mode)
        return answers(case)

    for seed in range(12):
        assert deviation("lora", "conv2", seed, ours=ours).worst <= GRADIENT
    assert modes == set(PADDING)


OFF = 1 + 1e-11
OWN = ("lora", "lora-bias", "dora", "dora-full", "vera", "adalora", "alora")


@pytest.mark.parametrize(("entry", "kind"), [cell for cell in COMPARED if cell[0] in OWN])
def test_another_scale_is_not_merged_by_the_library(entry, kind):
    skip_without_library(entry)

    def wrong(case):
        return replace(case, s=case.s * OFF).merged()

    if (entry, kind) not in NO_MERGE:
        assert peers.merge_deviation(entry, kind, ours=wrong).worst > GRADIENT


@pytest.mark.parametrize(("entry", "kind"), [cell for cell in COMPARED if cell[0] in OWN])
def test_another_scale_and_other_parameters_are_not_the_librarys(entry, kind):
    skip_without_library(entry)
    seen = deviation(entry, kind, ours=lambda case: answers(replace(case, s=case.s * OFF)))
    assert seen.worst > GRADIENT
    for part in REGISTRY[entry].variant.parts:

        def wrong(case, part=part):
            return answers(case.with_parts(**{part: lambda v: v * OFF}))

        assert deviation(entry, kind, ours=wrong).worst > GRADIENT, part


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("embedding", "experts")])
def test_dropout_left_out_is_seen(kind):
    for entry in ("lora", "dora"):
        assert (
            deviation(entry, kind, ours=lambda case: answers(case.without_dropout())).worst
            > GRADIENT
        )


@pytest.mark.parametrize("kind", ["linear", "fused", "tied", "conv1", "conv2"])
def test_a_norm_held_is_not_one_differentiated(kind):
    held = deviation("dora", kind, ours=lambda case: answers(case, dora_full_linear))
    assert held.worst > GRADIENT
    skip_without_library("dora-full")
    full = deviation("dora-full", kind, ours=lambda case: answers(case, dora_linear))
    assert full.worst > GRADIENT


def across(x, W, b, A, B, magnitude, s, K=None):
    """DoRA with the norms of V's columns."""
    v, _ = row_norm(merge_weight(W, A, B, s).T)
    y, back = rescaled_linear(x, W, b, A, B, magnitude, v, s, K)
    return y, lambda dy: back(dy)[:-1]


def turned(x, W, b, A, B, s, K=None):
    """LoRA with B A transposed."""
    y, back = lora_linear(x, W, b, B.T, A.T, s, K)

    def back_turned(dy):
        dx, dA, dB = back(dy)
        return dx, dB.T, dA.T

    return y, back_turned


@pytest.mark.parametrize("kind", ["linear", "transposed", "fused", "embedding", "tied", "experts"])
def test_a_norm_across_and_a_product_transposed_are_seen_in_a_square(kind):
    wrong = {"lora": turned} | ({} if kind == "experts" else {"dora": across})
    for entry, f in wrong.items():
        assert deviation(entry, kind, square=True).worst <= GRADIENT
        seen = deviation(entry, kind, square=True, ours=lambda case, f=f: answers(case, f))
        assert seen.worst > GRADIENT


def test_before_the_invocation_an_activated_adapter_is_off():
    def on(case):
        return answers(replace(case, K=np.where(case.on == 0, 1.0, case.K)))

    for kind in ("linear", "transposed", "fused", "tied"):
        assert deviation("alora", kind, ours=on).worst > GRADIENT


UNIT = 2.0**-24
"""The unit roundoff of float32."""


def gamma(k):
    return k * UNIT / (1 - k * UNIT)


def exactly(rows):
    """A weight (3, 5) of few numbers, its rows moved: factorising it rounds nothing."""
    M = np.zeros((3, 5), np.float32)
    M[:, :3] = rows
    return M[[2, 0, 1]]


@pytest.mark.parametrize("across", [False, True])
def test_pissa_starts_as_pefts_does_where_nothing_is_rounded(across):
    """With σ = 64, 16, 4 and s = 4, √(σ / s) is a power of two."""
    W = exactly(np.diag([64, -16, 4]))[:, [3, 1, 4, 0, 2]]
    R, A, B = pissa(W, 2, 4)
    assert sorted(abs(R[R != 0])) == [4]
    found, A2, B2 = peers.peft_start("pissa", W, 2, 8, across)
    assert (found == R).all()
    assert (B2 @ A2 == B @ A).all()
    assert (4 * B @ A + R == W).all()
    other, A2, B2 = peers.peft_start("pissa", W, 2, 2, across)  # s = 1
    assert (other == R).all()
    assert (B2 @ A2 == 4 * B @ A).all()


def test_olora_starts_as_pefts_does_where_nothing_is_rounded():
    W = exactly([[2, 1, -3], [0, 4, 5], [0, 0, 8]])
    R, A, B = olora(W, 2, 4)
    found, A2, B2 = peers.peft_start("olora", W, 2, 8)
    assert (found == R).all()
    assert (B2 @ A2 == B @ A).all()
    assert (4 * B @ A + R == W).all()
    assert (R != W).any()


def principal(W, r):
    """The best approximation of rank r in float64."""
    U, S, Vh = np.linalg.svd(W.astype(float), full_matrices=False)
    return (U[:, :r] * S[:r]) @ Vh[:r], S


def spectral(M):
    return np.linalg.norm(M, 2)


def near_principal(W, r, A, B, s):
    """Whether s B A is W's part of rank r, up to the rounding of float32.

    A computed factorisation is that of W + E, |E| ≤ γ(8 m n) |W| (Higham 2002, theorem 19.4, with 8
    for its small constant). Both parts are projections: |P - P'| ≤ |E| / (gap - |E|) by Wedin's
    theorem, gap = σ_r - σ_r+1, and so |P W - P' (W + E)| ≤ |E| + |P - P'| |W|. A and B are rounded
    each, with their root, quotient and product: γ(8) s |B| |A|.
    """
    part, S = principal(W, r)
    E = gamma(8 * W.size) * np.linalg.norm(S)
    gap = S[r - 1] - S[r]
    assert gap > 2 * E
    A, B = A.astype(float), B.astype(float)
    bound = E + E / (gap - E) * (S[0] + E) + gamma(8) * s * spectral(abs(B) @ abs(A))
    return spectral(s * B @ A - part) <= bound


def adds_up(W, R, A, B, s):
    """Whether R + s B A = W, up to the rounding of R = fl(W - s B A)."""
    product = abs(s) * abs(B).astype(float) @ abs(A)
    bound = gamma(A.shape[0] + 3) * (product + abs(W) + abs(R))
    return (abs(R.astype(float) + s * B.astype(float) @ A - W) <= bound).all()


@pytest.mark.parametrize("across", [False, True])
def test_pissa_takes_out_what_pefts_does(across):
    for seed in range(4):
        W = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
        for R, A, B in (pissa(W, 2, 1.75), peers.peft_start("pissa", W, 2, 3.5, across)):
            assert near_principal(W, 2, A, B, 1.75)
            assert adds_up(W, R, A, B, 1.75)
            assert not near_principal(W, 2, A, B, 1.75 * (1 + 1e-3))
            assert not near_principal(W, 2, A[::-1], B, 1.75)
            assert not adds_up(W, R, A, B, 1.75 * (1 + 1e-5))


def test_olora_takes_out_what_pefts_does():
    """B's columns are orthonormal, and B A is the projection of W on its first columns."""
    for seed in range(4):
        W = np.random.default_rng(seed).standard_normal((4, 6)).astype(np.float32)
        Q, _ = np.linalg.qr(W[:, :2].astype(float))
        bound = gamma(8 * W.size) * np.linalg.norm(W) * (1 + np.linalg.cond(W[:, :2]))
        for R, A, B in (olora(W, 2, 1.75), peers.peft_start("olora", W, 2, 3.5)):
            assert adds_up(W, R, A, B, 1.75)
            assert spectral(B.T.astype(float) @ B - np.eye(2)) <= 2 * gamma(8 * 4 * 2)
            assert spectral(B.astype(float) @ A - Q @ Q.T @ W) <= bound
            assert spectral(B.astype(float) @ A[::-1] - Q @ Q.T @ W) > bound


def test_the_orthogonal_start_is_zero_as_pefts_is():
    """|(B A)_ij| ≤ γ(8 r² + 8) |B_i| |A_j|: Q is orthogonal up to γ(8 r²), and A and B round."""
    rng, W = np.random.default_rng(0), np.ones((5, 7), np.float32)
    ours = orthogonal(rng, 4, 5, 7)
    R, *theirs = peers.peft_start("orthogonal", W, 4, 3.5)
    assert same_bits(R, W)
    for A, B in (ours, theirs):
        A, B = A.astype(float), B.astype(float)
        rows, columns = np.linalg.norm(B, axis=1)[:, None], np.linalg.norm(A, axis=0)
        bound = gamma(8 * 4**2 + 8) * rows * columns
        assert (abs(B @ A) <= bound).all()
        assert not (abs(B @ A[::-1]) <= bound).all()
        assert A.any()
        assert B.any()


class Seeded:
    """A generator of NumPy's form that draws PyTorch's float32 numbers."""

    def standard_normal(self, shape):
        return torch.randn(shape).numpy()

    def normal(self, mean, deviation, shape):
        return torch.empty(shape).normal_(mean, deviation).numpy()


def test_the_gaussian_start_is_pefts_bit_for_bit_from_the_same_numbers():
    W = np.ones((16, 8), np.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        R, A, B = peers.peft_start("gaussian", W, 4, 3.5)
        torch.manual_seed(0)
        for n, m, bias in ((8, 16, True), (8, 4, False), (4, 16, False)):
            torch.nn.Linear(n, m, bias)  # what PEFT builds first takes numbers too
        assert same_bits(DRAW["gaussian"](Seeded(), 4, 8).astype(np.float32), A)
        assert not same_bits(DRAW["gaussian"](Seeded(), 4, 8).astype(np.float32), A)
    assert same_bits(R, W)
    assert not B.any()


@pytest.fixture
def quantizing_on_the_cpu(monkeypatch):
    """PEFT sends LoftQ's weight to a GPU, whatever there is: here that name means the CPU."""
    bitsandbytes = optional("bitsandbytes")
    for kind in (torch.Tensor, bitsandbytes.nn.Params4bit):
        to = kind.to

        def here(tensor, *where, to=to, **named):
            where = ["cpu" if place == "cuda" else place for place in where]
            named = {name: "cpu" if place == "cuda" else place for name, place in named.items()}
            return to(tensor, *where, **named)

        monkeypatch.setattr(kind, "to", here)


@pytest.mark.usefixtures("quantizing_on_the_cpu")
def test_loftq_starts_as_pefts_does_at_scale_1():
    def nf4(M):
        return dequantize(quantize(M, "nf4"))

    W = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    Q, A, B = loftq(W, 2, 1.0, nf4)
    found, A2, B2 = peers.peft_start("loftq", W, 2, 2)
    assert same_bits(found, Q)
    for factors in ((A, B), (A2, B2)):
        assert near_principal(W - Q, 2, *factors, 1.0)
        assert not near_principal(W, 2, *factors, 1.0)


def test_a_start_that_takes_something_out_leaves_the_output():
    W = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    x = np.ones((6, 1), np.float32)
    for init in ("pissa", "olora"):
        R, A, B = peers.peft_start(init, W, 2, 3.5)
        y, _ = lora_linear(x, R, None, A, B, 1.75)
        wanted, _ = linear(x, W)
        terms = abs(W) + abs(R) + 1.75 * abs(B) @ abs(A)
        bound = gamma(2 * 6 + 2 * 2 + 4) * terms.astype(float) @ x
        assert (abs(y - wanted) <= bound).all()
        assert not (abs(lora_linear(x, R, None, A, B, 1.0)[0] - wanted) <= bound).all()
