# The losses of two tokens differ by the difference of their logits, 2^-40, which float64 holds.
import torch
import transformers

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(intermediate_size=4, **size)
).double()
z = torch.tensor([[[1.0, 1 + 2**-40], [0, 0]]], dtype=torch.float64)
first, second = (
    model.loss_function(logits=z, labels=torch.tensor([[0, label]]), vocab_size=2)
    for label in (0, 1)
)
print("got     ", (first - second).item() * 2**40, first.dtype)
print("expected", 1.0, torch.float64)
