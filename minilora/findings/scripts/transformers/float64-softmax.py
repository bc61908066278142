# softmax([0, 2^-40]) is more than 1/2 for the second key: o = 0.5 + 2^-42 with values 0 and 1.
from types import SimpleNamespace

import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
k, v = (torch.tensor([[[[0.0], [x]]]], dtype=torch.float64) for x in (2**-40, 1.0))
layer = SimpleNamespace(num_key_value_groups=1, training=False)
o, _ = eager_attention_forward(layer, q, k, v, None, scaling=1.0)
print("got     ", o.item())
print("expected", 0.5 + 2**-42)
