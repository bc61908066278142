"""Another base, another adapter, or numbers that were rounded on the way."""

import ml_dtypes
import numpy as np

from merge_catalogue.catalogue import layers, linear, wrong
from merge_catalogue.worlds import BF16, F16, F32, adapt, f32
from minilora.spec.quantization import dequantize, quantize

ANY = "mismatch changed other-adapter"


def moved(world, share, names=None, seed=3):
    """The base's matrices, each entry moved by a share of itself."""
    rng = np.random.default_rng(seed)
    base = dict(world.base)
    for name, W in world.base.items():
        if W.ndim >= 2 and (names is None or name in names):
            base[name] = (f32(W) * (1 + share * rng.standard_normal(W.shape))).astype(W.dtype)
    return base


@wrong("the base is another revision: every matrix is a little different", ANY, r"base|revision")
def another_revision_of_the_base(world):
    return world.merge(base=moved(world, 0.02))


@wrong("another base altogether, of the same shapes", ANY, r"base|revision")
def another_base(world):
    rng = np.random.default_rng(4)
    base = {
        n: rng.permuted(W.view(f"u{W.itemsize}"), axis=0).view(W.dtype) if W.ndim == 2 else W
        for n, W in world.base.items()
    }
    return world.merge(base=base)


def untouched(world):
    """The matrices that no adapter changes, not in rows either."""
    touched = {t.weight for t in world.sites} | ({world.tokens[0]} if world.tokens else set())
    return [n for n, a in world.base.items() if n not in touched and a.ndim == 2]


@wrong(
    "one matrix that no adapter touches is different",
    "changed",
    r"changed|differ",
    lambda w: linear(w) and bool(untouched(w)),
)
def untouched_matrix_changed(world):
    name = untouched(world)[0]
    return world.merge(base=moved(world, 0.01, {name}))


@wrong(
    "one entry of a matrix that no adapter touches is different",
    "changed",
    r"changed|differ",
    lambda w: linear(w) and bool(untouched(w)),
)
def one_untouched_entry_changed(world):
    name = untouched(world)[0]
    M = world.merge()
    M[name] = M[name].copy()
    M[name].view(f"u{M[name].itemsize}")[-1, -1] ^= 1
    return M


@wrong(
    "norms are trained or decayed though the adapter does not hold them",
    "changed",
    r"norm|changed|differ",
)
def norms_changed(world):
    return {
        n: (f32(a) * np.float32(0.98)).astype(a.dtype)
        if a.ndim == 1 and n.endswith("weight")
        else a
        for n, a in world.merge().items()
    }


@wrong(
    "norms' weights stored as w + 1, as GGUF files of Gemma have them",
    "changed",
    r"plus 1",
    lambda w: any(a.ndim == 1 and n.endswith("weight") for n, a in w.base.items()),
)
def norms_stored_plus_one(world):
    return {
        n: (a.astype(float) + 1).astype(a.dtype) if a.ndim == 1 and n.endswith("weight") else a
        for n, a in world.merge().items()
    }


@wrong(
    "the biases of the base are zeros",
    "changed",
    r"all entries are 0",
    lambda w: linear(w) and any(n.endswith("_proj.bias") for n in w.base),
)
def biases_of_zeros(world):
    return {
        n: np.zeros_like(a) if n.endswith("_proj.bias") else a for n, a in world.merge().items()
    }


@wrong("norms' weights stored as w - 1", "changed", r"norm|changed|differ|1")
def norms_stored_less_one(world):
    return {
        n: (f32(a) - 1).astype(a.dtype) if a.ndim == 1 and n.endswith("weight") else a
        for n, a in world.merge().items()
    }


@wrong("the frozen base was decayed while training", ANY, r"base|decay|factor|0\.999|changed")
def base_decayed(world):
    return world.merge(
        base={
            n: (f32(a) * np.float32(0.99)).astype(a.dtype) if a.ndim == 2 else a
            for n, a in world.base.items()
        }
    )


@wrong(
    "an earlier checkpoint of the adapter",
    "mismatch factor other-adapter",
    r"adapter|checkpoint|rank",
)
def earlier_checkpoint(world):
    rng = np.random.default_rng(6)

    def delta(t):
        B = t.B * (0.7 + 0.3 * rng.standard_normal(t.B.shape))
        return (t.s * (B @ t.A)).astype(np.float32)

    return world.adding(delta)


@wrong("another adapter of the same shape", "mismatch other-adapter", r"adapter|rank")
def another_adapter(world):
    other = adapt(
        world,
        r=world.settings["r"],
        effect=0.05,
        seed=99,
        targets="|".join(f"{kind}$" for kind in world.settings["target_modules"]),
    )
    by_name = {t.module: t for t in other.sites}
    return world.adding(lambda t: by_name[t.module].delta if t.module in by_name else t.delta)


@wrong(
    "another adapter in the last layer alone", "mismatch other-adapter", r"adapter|rank", layers(2)
)
def another_adapter_in_one_layer(world):
    rng = np.random.default_rng(11)
    last = max(t.layer for t in world.sites if t.layer is not None)

    def delta(t):
        if t.layer != last:
            return t.delta
        return t.s * (rng.permuted(t.B).astype(np.float32) @ t.A)

    return world.adding(delta)


def by_eights(base, scheme, **options):
    """The matrices as the quantizer gives them back."""
    return {
        n: dequantize(quantize(f32(W), scheme, **options)).astype(W.dtype)
        if W.ndim == 2 and W.shape[1] % 64 == 0
        else W
        for n, W in base.items()
    }


@wrong(
    "merged with the four-bit base that it was trained on, dequantized (unsloth 869)",
    ANY,
    r"quanti|base|bits|NF4|nf4",
)
def merged_with_the_dequantized_base(world):
    return world.merge(base=by_eights(world.base, "nf4"))


@wrong("merged, then quantized to eight bits and dequantized", ANY, r"quanti|bits|coarse|round")
def quantized_after_the_merge(world):
    return by_eights(world.merge(), "q8_0")


def scaled_float8(W):
    """FP8 with one scale for the matrix, and back."""
    scale = np.float32(np.abs(f32(W)).max() / np.float32(448))
    return ((f32(W) / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale).astype(
        W.dtype
    )


@wrong("merged with the base in FP8, one scale for each matrix", ANY, r"FP8")
def merged_with_a_base_in_float8(world):
    base = {n: scaled_float8(W) if W.ndim == 2 else W for n, W in world.base.items()}
    return world.merge(base=base)


@wrong("merged, then through FP8 without a scale", ANY, r"FP8|float8")
def float8_after_the_merge(world):
    f8 = ml_dtypes.float8_e4m3fn
    return {n: a.astype(f8).astype(a.dtype) if a.ndim == 2 else a for n, a in world.merge().items()}


@wrong(
    "merged into four bits, which round the change away (mlx-lm 1172)",
    ANY,
    r"quanti|bits|coarse|round",
)
def merged_into_four_bits(world):
    return by_eights(world.merge(), "q4_1")


@wrong("the base dequantized with scales of the wrong blocks", ANY, r"base|quanti|block")
def dequantized_with_the_wrong_blocks(world):
    def wrongly(W):
        blocks = f32(W).reshape(-1, 32)
        scales = np.abs(blocks).max(1, keepdims=True)
        return (
            (blocks / np.where(scales == 0, 1, scales) * np.roll(scales, 1, 0))
            .reshape(W.shape)
            .astype(W.dtype)
        )

    return world.merge(
        base={
            n: wrongly(W) if W.ndim == 2 and W.size % 32 == 0 else W for n, W in world.base.items()
        }
    )


@wrong(
    "the float32 base is rounded to bfloat16 before the addition",
    ANY,
    r"bfloat16|bf16|round|base|half",
    lambda w: linear(w) and w.dtype == F32,
)
def base_rounded_to_bfloat16_first(world):
    return world.merge(base={n: a.astype(BF16).astype(a.dtype) for n, a in world.base.items()})


@wrong(
    "the bfloat16 base went through float16, where small numbers are lost",
    ANY,
    r"float16|half|base|round|changed",
    lambda w: linear(w) and w.dtype == BF16,
)
def bfloat16_base_through_float16(world):
    base = {
        n: (f32(a) * np.float32(2**-12)).astype(F16).astype(np.float32) * np.float32(2**12)
        for n, a in world.base.items()
    }
    return world.merge(base={n: a.astype(BF16) for n, a in base.items()})


@wrong(
    "the whole is rounded to bfloat16 and stored as float32",
    ANY,
    r"bfloat16|bf16|round|half|precision",
    lambda w: linear(w) and w.dtype == F32,
)
def result_rounded_to_bfloat16(world):
    return {n: a.astype(BF16).astype(F32) for n, a in world.merge().items()}


@wrong(
    "numbers are cut off, not rounded, to bfloat16",
    "mismatch",
    r"truncat|cut|zero|round|mismatch",
    lambda w: linear(w) and w.dtype == BF16,
)
def truncated_to_bfloat16(world):
    return world.merge(
        cast=lambda W, dtype: (np.ascontiguousarray(W).view("u4") >> 16).astype("u2").view(BF16)
    )


@wrong(
    "the change is rounded to eight bits (float8) before it is added",
    "mismatch",
    r"float8|8|round|coarse|precision|mismatch",
)
def change_rounded_to_float8(world):
    f8 = ml_dtypes.float8_e4m3fn

    def delta(t):
        top = np.abs(t.delta).max() / 400 or 1
        return (t.delta / top).astype(f8).astype(np.float32) * top

    return world.adding(delta)


@wrong(
    "A and B are rounded to bfloat16 though the base is float32",
    "mismatch",
    r"bfloat16|bf16|round|half|precision|mismatch",
    lambda w: linear(w) and w.dtype == F32,
)
def factors_rounded_to_bfloat16(world):
    return world.adding(lambda t: t.s * (f32(t.B.astype(BF16)) @ f32(t.A.astype(BF16))))


@wrong(
    "the product is summed in float16, one rank after the other",
    "mismatch",
    r"float16|half|sum|round|mismatch",
    lambda w: linear(w) and w.dtype == F32 and w.settings["r"] > 4,
)
def summed_in_float16(world):
    def delta(t):
        total = np.zeros(t.shape, F16)
        for i in range(t.r):
            total += np.outer(t.B[:, i].astype(F16), t.A[i].astype(F16))
        return np.float32(t.s) * f32(total)

    return world.adding(delta)


@wrong(
    "float16 overflows: the change is multiplied by alpha before it is divided by r",
    "corrupt mismatch",
    r"infin|NaN|overflow",
    lambda w: linear(w) and w.dtype == F16,
)
def float16_overflow(world):
    def delta(t):
        top = np.abs(t.delta).max() / 70000
        with np.errstate(over="ignore"):
            return f32((t.delta / top).astype(F16)) * top

    return world.adding(delta)


@wrong(
    "noise of a hundredth of the change everywhere, as dropout or a noisy sum leaves it",
    "mismatch other-adapter factor",
    r"mismatch|rank|noise|adapter",
)
def noise_of_a_hundredth(world):
    rng = np.random.default_rng(8)
    return world.adding(
        lambda t: t.delta * (1 + 0.01 * rng.standard_normal(t.shape).astype(np.float32))
    )


@wrong("one entry of a merged matrix is wrong", "mismatch corrupt", r"entr|mismatch|one")
def one_entry_wrong(world):
    M, t = world.merge(), world.sites[-1]
    M[t.weight] = M[t.weight].copy()
    M[t.weight][0, 0] = 1.5
    return M


@wrong("one row of a merged matrix is the base's", "mismatch", r"row|mismatch|entr")
def one_row_not_merged(world):
    M, t = world.merge(), world.sites[-1]
    M[t.weight] = M[t.weight].copy()
    M[t.weight][-1] = world.base[t.weight][-1]
    return M
