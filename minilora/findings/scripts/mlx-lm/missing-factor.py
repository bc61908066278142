# An adapter is both of its factors: one with B alone is an error, and not a change that is drawn
# anew at each start.
import json
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import load_adapters

mx.set_default_device(mx.cpu)
sizes = {"hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 2, "vocab_size": 3}
args = ModelArgs("llama", num_attention_heads=1, rms_norm_eps=1e-5, **sizes)
parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
drawn = []
with tempfile.TemporaryDirectory() as folder:
    said = {"num_layers": 1, "lora_parameters": parameters}
    Path(folder, "adapter_config.json").write_text(json.dumps(said))
    only = {"model.layers.0.mlp.up_proj.lora_b": mx.ones((1, 2))}
    mx.save_safetensors(f"{folder}/adapters.safetensors", only)
    for seed in (0, 1):
        mx.random.seed(seed)
        up = load_adapters(Model(args), folder).layers[0].mlp.up_proj
        drawn.append((up.lora_a @ up.lora_b).tolist())
print("got     ", "the same change" if drawn[0] == drawn[1] else "another change at each start")
print("expected", "an error")
