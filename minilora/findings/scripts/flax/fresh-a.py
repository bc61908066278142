# LoRA's own code draws A from U(-1/sqrt(n), 1/sqrt(n)), of variance 1 / (3 n).
from flax import nnx

A = nnx.LoRA(6, 1000, 1, rngs=nnx.Rngs(0)).lora_a[...]
print("got     ", "within 1/sqrt(n):", bool(abs(A).max() <= 6**-0.5))
print("expected", "within 1/sqrt(n):", True)
