# The new A and B are put in the place of the old ones, in an embedding as in a projection.
import tempfile

import peft
import torch
from peft.utils.hotswap import hotswap_adapter

base = torch.nn.Sequential(torch.nn.Embedding(4, 3))
model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, save_embedding_layers=False)
    try:
        hotswap_adapter(model, folder, "default", torch_device="cpu")
        found = "swapped"
    except AttributeError as error:
        found = f"AttributeError: {error}"
print("got     ", found)
print("expected", "swapped")
