"""The models that are measured, as files that every side reads."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora.io.atomic import write_tensors
from minilora.io.formats import huggingface, peft
from minilora.spec.initialization import draw_weights
from minilora.spec.models import Config, Llama
from minilora.spec.ops import IGNORED
from minilora.spec.quantization import gguf_bytes, quantize
from minilora.spec.target_modules import LoraConfig, inject
from minilora.training.checkpointing import FIRST

RANK = 8
KINDS = ("step", "forward", "generate")
"""What is measured: a step of training, the loss alone, tokens drawn one by one."""

RATE = 1e-4
"""The learning rate on either side."""

PROMPT, NEW = 32, 32
"""Tokens: at most so many of the batch's first sequence are gone on from, by so many."""


@dataclass(frozen=True)
class Size:
    """A model and its batch, b sequences of t tokens, and what is measured of them.

    ``adapted``: adapters are in so many of the last layers (default: all). ``counted``: the share
    of the tokens, the last ones, whose labels count.
    """

    c: Llama
    b: int
    t: int
    kinds: tuple[str, ...] = KINDS
    adapted: int | None = None
    counted: float = 1.0


_SMOLLM2 = Llama(
    vocab=49152, d=576, layers=30, heads=9, ffn=1536, kv_heads=3, head_dim=64, tied=True
)
SIZES = {
    "tiny": Size(Llama(vocab=256, d=32, layers=2, heads=2, ffn=96, kv_heads=2, head_dim=16), 4, 32),
    "small": Size(
        Llama(vocab=1024, d=128, layers=4, heads=4, ffn=352, kv_heads=4, head_dim=32), 8, 128
    ),
    "medium": Size(
        Llama(vocab=4096, d=384, layers=6, heads=6, ffn=1024, kv_heads=6, head_dim=64), 4, 256
    ),
    "smollm2": Size(_SMOLLM2, 1, 128),
    "smollm2-512": Size(_SMOLLM2, 1, 512, KINDS[:2]),
    "smollm2-last": Size(_SMOLLM2, 1, 128, KINDS[:1], adapted=8),
    "smollm2-last-half": Size(_SMOLLM2, 1, 128, KINDS[:1], adapted=8, counted=0.5),
}
"""The sizes by name, the last four those of SmolLM2-135M, which generates alike in both.

With adapters in the last layers the frozen prefix is kept, as in every epoch after the first.
"""


def flops(
    c: Config, b: int, t: int, r: int = RANK, adapted: int | None = None, counted: float = 1.0
) -> dict[str, int]:
    """The multiplications and additions that a LoRA step on all linears takes at least.

    Of the frozen weights one product forward and one for the gradient of its input, none for dW; of
    the adapters one more. A causal mask leaves half of all pairs of tokens, each with two products
    forward and four backward. No gradient flows below the projections that read the first input.
    With adapters in some layers alone, those below take nothing; the head takes what counts.
    """
    layers = c.layers if adapted is None else adapted
    lowest = c.layers - layers
    heads = getattr(c, "head_dim", c.d // c.heads) * c.heads
    inside = [at for at in c.linears() if at.startswith("layers.")]
    inside = [at for at in inside if int(at.split(".")[1]) >= lowest]
    blocks = {at: math.prod(c.linears()[at]) for at in inside}
    first = sum((m + r) * n for at, (m, n) in c.block().items() if at in FIRST)
    frozen = sum(blocks.values()) + int(counted * c.vocab * c.d)
    adapters = sum(r * sum(c.linears()[at]) for at in blocks)
    pairs = b * layers * heads * t * (t + 1) // 2
    forward = 2 * b * t * (frozen + adapters) + 2 * 2 * pairs
    backward = 2 * b * t * (frozen - first + 2 * adapters) + 4 * 2 * pairs
    return {"forward": forward, "step": forward + backward}


def cost_of(size: Size) -> dict[str, int]:
    """`flops` of a size."""
    return flops(size.c, size.b, size.t, adapted=size.adapted, counted=size.counted)


def write_case(folder: Path, size: Size, seed: int = 0) -> None:
    """The model, an adapter with B ≠ 0 and the batch, as files that every side reads."""
    rng = np.random.default_rng(seed)
    base = {name: w.astype(np.float32) for name, w in draw_weights(size.c, rng).items()}
    layers = size.c.layers
    last = None if size.adapted is None else range(layers - size.adapted, layers)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, layers_to_transform=last)
    W, tuning = inject(base, lora, size.c.linears(), rng)
    for name in sorted(tuning.trained):  # a set's order is another in each process
        W[name] = (0.02 * rng.standard_normal(W[name].shape)).astype(np.float32)
    huggingface.write_model(folder / "model", size.c, base)
    peft.write_adapter(folder / "adapter", size.c, W, tuning, lora)
    ids = rng.integers(0, size.c.vocab, (size.b, size.t))
    labels = ids.copy()
    labels[:, : round((1 - size.counted) * size.t)] = IGNORED
    write_tensors(folder / "batch.safetensors", {"ids": ids, "labels": labels})
    codes = {name: gguf_bytes(quantize(w, "q4_1")) for name, w in base.items() if w.shape[1] > 1}
    small = {name: codes.get(name, w) for name, w in base.items()}
    write_tensors(folder / "quantized.safetensors", small)
