# B = 0: merging changes nothing, and W stays [2, 0, ..., 3, 0, ...] in its first row, which NF4
# holds. (The packing is that of processors with AVX-512 for bfloat16.)
import bitsandbytes
import peft
import torch

nn, W = bitsandbytes.nn, torch.zeros(32, 128)
W[0, ::64] = torch.tensor([2.0, 3.0])
layer = nn.Linear4bit(128, 32, bias=False, compute_dtype=W.dtype, quant_type="nf4")
how = {"quant_type": "nf4", "compress_statistics": False, "requires_grad": False}
layer.weight = nn.Params4bit(W, **how).to("cpu")
whole = torch.nn.Sequential(layer)
whole.is_loaded_in_4bit = True
model = peft.get_peft_model(whole, peft.LoraConfig(r=1, target_modules=["0"]))
with torch.no_grad():
    model.eval()(torch.zeros(1, 128))
model.merge_adapter()
held = model.base_model.model[0].get_base_layer().weight
found = bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)
print("got     ", "W" if torch.equal(found, W) else "another weight")
print("expected", "W")
