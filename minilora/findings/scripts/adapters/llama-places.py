# The intermediate layer of a feed-forward block makes it wide: up_proj.
import adapters
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=5, num_hidden_layers=1, **sizes))
adapters.init(model)
model.add_adapter("one", adapters.LoRAConfig(selfattn_lora=False, intermediate_lora=True))
found = {name.split(".")[4] for name, _ in model.named_parameters() if "loras.one" in name}
print("got     ", *found)
print("expected", "up_proj")
