# At the start m = ||W|| and B = 0, so m V / ||V|| = W, also where ||W|| is small.
import lycoris
import torch

small = torch.finfo(torch.float32).eps
model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
torch.nn.init.eye_(model[0].weight).data.mul_(small)
network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, dora_wd=True)
network.apply_to()
print("got     ", model(torch.eye(2))[0, 0].item() / small, "of W")
print("expected", 1.0, "of W")
