# The new rows equal the old ones, so nothing changes: y = W x + b = 3 + 5.
import peft
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer

head = torch.nn.Linear(1, 2)
head.weight.data.fill_(3)
head.bias.data.fill_(5)
layer = TrainableTokensLayer(head, "default")
layer.update_layer("default", peft.TrainableTokensConfig(token_indices=[1]))
print("got     ", layer(torch.ones(1, 1)).tolist())
print("expected", head(torch.ones(1, 1)).tolist())
