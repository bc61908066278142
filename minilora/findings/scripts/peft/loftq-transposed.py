# Of a Conv1D with 64 inputs and 3 outputs A is (r, 64) and B (3, r). (LoftQ asks for a GPU; the
# CPU stands in.)
from unittest.mock import patch

import bitsandbytes
import peft
import torch
import transformers


def on_cpu(kind, move):
    def to(tensor, *at, **named):
        named |= {"device": "cpu"} if named.get("device") == "cuda" else {}
        return move(tensor, *["cpu" if place == "cuda" else place for place in at], **named)

    return patch.object(kind, "to", to)


base = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(3, 64))
settings = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()}
config = peft.LoraConfig(r=1, target_modules=["0"], fan_in_fan_out=True, **settings)
params = bitsandbytes.nn.Params4bit
with on_cpu(torch.Tensor, torch.Tensor.to), on_cpu(params, params.to):
    layer = peft.get_peft_model(base, config).base_model.model[0]
factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
print("got     ", [tuple(factor.shape) for factor in factors])
print("expected", [(1, 64), (3, 1)])
