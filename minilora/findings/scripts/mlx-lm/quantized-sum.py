# y = x W^T = 256 + 1 + 1 = 258, which bfloat16 holds; 256 + 1 rounds to 256 in it.
import mlx.core as mx
import numpy as np

mx.set_default_device(mx.cpu)
W, x = np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32)
W[0, [0, 1, 2, 63]] = 1, 1, 1, 15  # steps of 1: each is exact in four bits
x[0, :3] = 256, 1, 1
w, x = (mx.array(v).astype(mx.bfloat16) for v in (W, x))
held = mx.quantize(w, 64, 4)
y = mx.quantized_matmul(x, *held, transpose=True, group_size=64, bits=4)
print("got     ", y.item())
print("expected", (x @ mx.dequantize(*held, 64, 4).T).item())
