# LoftQ splits W = Q + s B A, whatever s is: NF4 of [1, 2^-6, 0, ...] is [1, 0, 0, ...], and the
# rank 1 makes up for the rest, 2^-6. Here s = 4. (LoftQ asks for a GPU; the CPU stands in.)
from unittest.mock import patch

import bitsandbytes
import peft
import torch


def on_cpu(kind, move):
    def to(tensor, *at, **named):
        named |= {"device": "cpu"} if named.get("device") == "cuda" else {}
        return move(tensor, *["cpu" if place == "cuda" else place for place in at], **named)

    return patch.object(kind, "to", to)


base = torch.nn.Sequential(torch.nn.Linear(64, 1, bias=False))
base[0].weight.data = torch.zeros(1, 64)
base[0].weight.data[0, :2] = torch.tensor([1, 2**-6])
settings = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()}
config = peft.LoraConfig(r=1, lora_alpha=4, target_modules=["0"], **settings)
params = bitsandbytes.nn.Params4bit
with on_cpu(torch.Tensor, torch.Tensor.to), on_cpu(params, params.to):
    model = peft.get_peft_model(base, config)
x = torch.zeros(1, 64)
x[0, :2] = 1
print("got     ", model(x).item())
print("expected", 1 + 2**-6)
