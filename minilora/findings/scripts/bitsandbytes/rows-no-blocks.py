# Entry i lies in block i // 64: three blocks of ones, twos and fours come back as they are, in rows
# of 48 as in rows of 64. (The kernel is that of processors with AVX-512.)
import bitsandbytes.functional as F
import torch

W = torch.tensor([1.0, 2, 4]).repeat_interleave(64).reshape(4, 48)
codes, state = F.quantize_4bit(W, quant_type="nf4")
print("got     ", F.dequantize_4bit(codes, state).ravel()[::64].tolist())
print("expected", [1.0, 2.0, 4.0])
