# A budget of 3 keeps 3 of 4 triplets, also where all have the same score.
import peft
import torch

settings = {"init_r": 4, "target_r": 3, "total_step": 1}
base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})
model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
layer, allocator = model.base_model.model.q, model.base_model.rankallocator
for part in "AEB":
    factor = getattr(layer, f"lora_{part}")["default"]
    factor.data.fill_(1)
    factor.grad = torch.ones_like(factor)
allocator.update_ipt(model.base_model.model)
allocator.mask_to_budget(model.base_model.model, 3)
print("got     ", layer.lora_E["default"].count_nonzero().item(), "of 4 triplets")
print("expected", 3, "of 4 triplets")
