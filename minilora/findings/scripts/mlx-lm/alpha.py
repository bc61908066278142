# A file of an older release says scale = 1 and alpha = 8, by which it was trained: s = 1 * 8 / 2.
import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

mx.set_default_device(mx.cpu)
sizes = {"hidden_size": 2, "num_hidden_layers": 1, "intermediate_size": 2, "vocab_size": 3}
model = Model(ModelArgs("llama", num_attention_heads=1, rms_norm_eps=1e-5, **sizes))
parameters = {"rank": 2, "scale": 1.0, "alpha": 8, "dropout": 0.0, "keys": ["mlp.up_proj"]}
linear_to_lora_layers(model, 1, parameters)
print("got     ", model.layers[0].mlp.up_proj.scale)
print("expected", 4.0, "or an error")
