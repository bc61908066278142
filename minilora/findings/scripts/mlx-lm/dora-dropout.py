# PEFT drops features of all that DoRA adds to the base: y = W x + (g W - W) (K x), with g = 2,
# W = [3, 4], x = [1, 1] and K dropping all: 7. Here nothing of the base's part is dropped.
from unittest.mock import patch

import mlx.core as mx
import mlx.nn
from mlx_lm.tuner.dora import DoRALinear

mx.set_default_device(mx.cpu)
base = mlx.nn.Linear(2, 1, bias=False)
base.weight = mx.array([[3.0, 4.0]])
layer = DoRALinear.from_base(base, r=1, dropout=0.5).train()
layer.m = 2 * layer.m
with patch.object(mx.random, "bernoulli", lambda *_, **__: mx.array([0, 0])):
    found = layer(mx.ones((1, 2))).item()
print("got     ", found)
print("expected", 7.0, "as PEFT has it")
