# The map has 0, so 0 is stored without any error.
import bitsandbytes.functional as F
import torch

codes, state = F.quantize_blockwise(torch.tensor([0.0, 1.0]), blocksize=256)
print("got     ", F.dequantize_blockwise(codes, state)[0].item())
print("expected", 0.0)
