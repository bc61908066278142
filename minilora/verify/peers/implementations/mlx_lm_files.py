"""A folder of PEFT's as mlx-lm has its own: tensors renamed one by one, and the settings in words.

The library reads no folder of PEFT's. What a file lacks, and what fits no module, it is told as it
is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mlx import core as mx

from minilora.verify.peers.peer import refuse_settings

_PARTS = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
}
_TENSOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _PARTS))})")

_LACKS = (
    "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "layer_replication",
    "trainable_token_indices", "target_parameters",
)  # fmt: skip
"""Settings of PEFT's that change the function, which mlx-lm has no words for."""


def write(model_dir: str | Path, adapter_dir: str | Path, folder: str | Path) -> None:
    """Write the folder. Errors: NotImplementedError for settings that mlx-lm lacks."""
    config, base = _json(adapter_dir, "adapter_config.json"), _json(model_dir, "config.json")
    refuse_settings("mlx-lm", [name for name in _LACKS if config.get(name)])
    if config.get("bias", "none") != "none":
        refuse_settings("mlx-lm", ["bias"])
    tensors: dict[str, Any] = {}
    at: set[str] = set()
    given: Any = mx.load(str(Path(adapter_dir) / "adapter_model.safetensors"))
    for name, array in given.items():
        path = re.sub(r"^base_model\.model\.", "", name)
        path = re.sub(r"^transformer\.", "model.", path) if base["model_type"] == "gpt2" else path
        if found := _TENSOR.fullmatch(path):
            at.add(found[1])
            tensors[f"{found[1]}.{_PARTS[found[2]]}"] = array.T
        else:
            tensors[path] = array
    is_table = any(name.endswith(("embed_tokens", "wte", "lm_head")) for name in at)
    if is_table and (base.get("tie_word_embeddings") or config.get("use_dora")):
        refuse_settings("mlx-lm", ["for a tied table, or for DoRA of one"])
    mx.save_safetensors(str(Path(folder) / "adapters.safetensors"), tensors)
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    settings = {
        "fine_tune_type": "dora" if config.get("use_dora") else "lora",
        "num_layers": base.get("num_hidden_layers") or base["n_layer"],
        "lora_parameters": {
            "rank": config["r"],
            "scale": config["lora_alpha"] / root,
            "dropout": 0.0,
            "keys": sorted({re.sub(r"^model\.(layers|h)\.\d+\.", "", name) for name in at}),
        },
    }
    (Path(folder) / "adapter_config.json").write_text(json.dumps(settings))


def _json(folder: str | Path, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((Path(folder) / name).read_text())
    return settings
