# An embedding with the scale c = 4 gives c (W + s B A) of its token: 4 (1 + 1).
import peft
import torch
from axolotl.kernels.lora import apply_lora_embedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

base = torch.nn.Sequential(Gemma3TextScaledWordEmbedding(1, 1, None, embed_scale=4.0))
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
layer = peft.get_peft_model(base, config).base_model.model[0]
for parameter in layer.parameters():
    parameter.data.fill_(1)
ids = torch.tensor([[0]])
print("got     ", apply_lora_embedding(layer, ids).item())
print("expected", layer(ids).item())
