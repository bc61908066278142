# LoRA-FA: dB' = dB (A A^T)^-1 / s^2 = (4 + 2^-8) / 4 = 1 + 2^-10, which float32 holds. Adam's first
# moment is 0.1 times that.
import peft
import torch
from peft.optimizers import create_lorafa_optimizer

base = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
optimizer = create_lorafa_optimizer(model, r=1, lora_alpha=1, lr=0.5)
layer = model.base_model.model[0]
layer.lora_A["default"].weight.data.fill_(1)
layer.lora_B["default"].weight.grad = torch.tensor([[4 + 2**-8]])
optimizer.step()
(state,) = optimizer.state.values()
print("got     ", f"{10 * state['exp_avg_B'].item():.5f}")
print("expected", f"{1 + 2**-10:.5f}")
