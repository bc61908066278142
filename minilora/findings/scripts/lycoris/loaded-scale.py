# The file says alpha = 8 and r = 2, so s = 4: y = (W + s B A) x = 1 + 4 with all of them I.
import lycoris
import torch

model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
torch.nn.init.eye_(model[0].weight)
network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1)
network.apply_to()
state = {f"lycoris_0.lora_{end}.weight": torch.eye(2) for end in ("down", "up")}
network.load_state_dict(state | {"lycoris_0.alpha": torch.tensor(8.0)}, strict=True)
print("got     ", model(torch.eye(2))[0, 0].item())
print("expected", 5.0)
