# transformers 5 writes rope_parameters alone; its rope_theta is the base of RoPE.
from mlx_lm.models.llama import ModelArgs

config = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 3}
config |= {"intermediate_size": 2, "num_attention_heads": 1, "rms_norm_eps": 1e-5}
config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
print("got     ", ModelArgs.from_dict(config).rope_theta)
print("expected", 500000.0)
