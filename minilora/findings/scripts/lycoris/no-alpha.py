# A file without alpha means alpha = r, so s = 1.
import lycoris
import torch

state = {f"lycoris_0.lora_{end}.weight": torch.eye(2) for end in ("down", "up")}
model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
try:
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", model, state)
    found = network.loras[0].scale
except TypeError as error:
    found = f"TypeError: {error}"
print("got     ", found)
print("expected", 1.0)
