# No layer is adapted where none is asked for.
import mlx.core as mx
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

mx.set_default_device(mx.cpu)
sizes = {"hidden_size": 2, "num_hidden_layers": 2, "intermediate_size": 2, "vocab_size": 3}
model = Model(ModelArgs("llama", num_attention_heads=1, rms_norm_eps=1e-5, **sizes))
parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
linear_to_lora_layers(model, 0, parameters)
print("got     ", ["lora_a" in layer.mlp.up_proj for layer in model.layers])
print("expected", [False, False])
