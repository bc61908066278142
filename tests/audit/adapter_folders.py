"""Adapters in files, written by hand, and right unless something is changed of them."""

import json

import numpy as np
from safetensors.numpy import save_file

R, ALPHA, D, FFN, LAYERS, VOCABULARY = 4, 8, 6, 10, 2, 7
SHAPES = {"self_attn.q_proj": (D, D), "mlp.up_proj": (FFN, D), "mlp.down_proj": (D, FFN)}


def modules():
    """The paths of the adapted modules, and (m, n) of each."""
    return {f"model.layers.{i}.{name}": s for i in range(LAYERS) for name, s in SHAPES.items()}


def factors(seed=0, r=R, dtype=np.float32):
    """{path: (A, B)}, all entries other than 0."""
    rng = np.random.default_rng(seed)
    return {
        at: (
            rng.uniform(0.1, 1, (r, n)).astype(dtype),
            rng.uniform(0.1, 1, (m, r)).astype(dtype),
        )
        for at, (m, n) in modules().items()
    }


def settings(**more):
    return {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        **more,
    }


def tensors(pairs=None):
    """The tensors of a PEFT folder."""
    return {
        f"base_model.model.{at}.lora_{part}.weight": array
        for at, pair in (factors() if pairs is None else pairs).items()
        for part, array in zip("AB", pair, strict=True)
    }


def write_peft(folder, stored=None, said=None):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings() if said is None else said))
    save_file(tensors() if stored is None else stored, folder / "adapter_model.safetensors")
    return folder


def write_mlx(folder, pairs=None, scale=ALPHA / R, **parameters):
    folder.mkdir(exist_ok=True, parents=True)
    said = {"rank": R, "scale": scale, "dropout": 0.0, "keys": [*SHAPES], **parameters}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": said}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stored = {
        f"{at}.lora_{part}": np.ascontiguousarray(array.T)
        for at, pair in (factors() if pairs is None else pairs).items()
        for part, array in zip("ab", pair, strict=True)
    }
    save_file(stored, folder / "adapters.safetensors")
    return folder


def write_kohya(file, pairs=None, alpha=ALPHA, prefix="lora_unet"):
    stored = {}
    for at, (A, B) in (factors() if pairs is None else pairs).items():
        name = f"{prefix}_{at.replace('.', '_')}"
        stored |= {f"{name}.lora_down.weight": A, f"{name}.lora_up.weight": B}
        if alpha is not None:
            stored[f"{name}.alpha"] = np.array(alpha, np.float32)
    save_file(stored, file)
    return file


def write_loralib(file, pairs=None):
    pairs = factors() if pairs is None else pairs
    save_file(
        {f"{at}.lora_{p}": pair["AB".index(p)] for at, pair in pairs.items() for p in "AB"}, file
    )
    return file


def write_base(folder, tied=False, drop=(), **config):
    """A model of the adapted modules alone, with an embedding and a head."""
    folder.mkdir(exist_ok=True, parents=True)
    rng = np.random.default_rng(1)
    shapes = {f"{at}.weight": shape for at, shape in modules().items()}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, D)
    shapes |= {} if tied else {"lm_head.weight": (VOCABULARY, D)}
    stored = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
        if name not in drop
    }
    config = {"model_type": "llama", "tie_word_embeddings": tied, **config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    return folder
