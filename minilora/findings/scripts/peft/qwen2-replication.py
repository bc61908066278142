# layer_replication=[(0, 1), (0, 1)] makes two layers of one; a forward is finite, as of a Llama.
import peft
import torch
import transformers

size = {"vocab_size": 5, "hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_hidden_layers=1, **size))
config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
model = peft.get_peft_model(base, config)
try:
    found = bool(model(torch.zeros((1, 2), dtype=int)).logits.isfinite().all())
except IndexError as error:
    found = f"IndexError: {error}"
print("got     ", found)
print("expected", True)
