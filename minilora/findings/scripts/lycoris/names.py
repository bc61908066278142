# A file none of whose names fits is another model's: an error, and not an adapter of no module.
import lycoris
import torch

state = {f"lycoris_layers_7_q.lora_{end}.weight": torch.eye(2) for end in ("down", "up")}
state["lycoris_layers_7_q.alpha"] = torch.tensor(8.0)
model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
network, _ = lycoris.create_lycoris_from_weights(1.0, "", model, state)
print("got     ", len(network.loras), "modules, and no error")
print("expected", "an error")
