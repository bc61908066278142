# In evaluation nothing is dropped, so the same input has the same output.
import peft
import torch


def config(p):
    return peft.LoraConfig(r=1, lora_dropout=p, target_modules=["0"], init_lora_weights=False)


torch.manual_seed(0)
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), config(0.0)).eval()
model.add_adapter("two", config(0.5))
model.set_adapter("two")
x = torch.ones(1, 64)
print("got     ", "training:", model.training, "- equal:", torch.equal(model(x), model(x)))
print("expected", "training:", False, "- equal:", True)
