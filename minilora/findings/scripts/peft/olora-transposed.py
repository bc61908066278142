# OLoRA splits W = R + s B A, so at the start y = R x + s B A x = W x, which is [0, 4] for
# x = [1, 0].
import peft
import torch
import transformers

base = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(2, 2))
base[0].weight.data = torch.tensor([[0.0, 4], [1, 0]])  # stored (in, out)
settings = {"init_lora_weights": "olora", "fan_in_fan_out": True, "target_modules": ["0"]}
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, **settings))
print("got     ", model(torch.tensor([[1.0, 0]])).tolist())
print("expected", [[0.0, 4.0]])
