"""A small model with a tokenizer of its own, and an adapter, in the folders that servers read."""

from dataclasses import replace

import numpy as np
from tokenizer_folders import write as write_tokenizer

from minilora.io.formats.huggingface.model import write_model
from minilora.io.formats.mlx import write_adapter as write_mlx
from minilora.io.formats.peft.write import write_adapter as write_peft
from minilora.io.formats.tokenizers import read_tokenizer
from minilora.spec.models import Llama
from minilora.spec.target_modules import LoraConfig, inject

RANK, ALPHA = 4, 8


def write(folder, dtype=np.float32, strength=1.0, family="byte level"):
    """``base``, ``peft``, and ``mlx``; the weights are drawn, the adapter acts on every block."""
    base = folder / "base"
    base.mkdir(parents=True)
    write_tokenizer(base, family)
    vocab = read_tokenizer(base).vocab
    c = Llama(vocab, 64, 2, 4, 96, kv_heads=2, head_dim=16, tied=True)
    rng = np.random.default_rng(0)
    norms = {name for name in c.shapes() if "norm" in name}
    W = {
        name: (np.ones(shape) if name in norms else rng.normal(0, 1.5 / shape[1] ** 0.5, shape))
        for name, shape in c.shapes().items()
    }
    W = {name: w.astype(dtype).astype(np.float32) for name, w in W.items()}
    write_model(base, c, W, dtype=dtype)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    adapted, tuning = inject(W, lora, c.matrices(), rng)
    for name in adapted:
        if name.endswith(".B"):
            adapted[name] = rng.normal(0, 0.1 * strength, adapted[name].shape).astype(np.float32)
    write_peft(folder / "peft", c, adapted, tuning, lora, name_or_path=str(base))
    write_mlx(folder / "mlx", c, adapted, tuning)
    twice = replace(tuning, scale={at: 2 * s for at, s in tuning.scale.items()})
    write_mlx(folder / "mlx, twice the scale", c, adapted, twice)
    return folder
