# s = alpha / r = 8 / 2 = 4 and B A = 1 + 1, so y = 8.
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import numpy as np

layer = keras.layers.Dense(1, use_bias=False, lora_rank=2, lora_alpha=8)
layer.build((None, 1))
layer._kernel.assign([[0.0]])
layer.lora_kernel_a.assign([[1.0, 1.0]])
layer.lora_kernel_b.assign([[1.0], [1.0]])
print("got     ", layer(np.ones((1, 1), np.float32)).item())
print("expected", 8.0)
