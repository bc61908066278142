# y = W x + s B A x, so dA = s B^T dy x^T = 1 in either mode, with ones everywhere.
import loralib
import torch

layer = loralib.Linear(1, 1, r=1)
for parameter in layer.parameters():
    parameter.data.fill_(1)
layer.eval()
layer(torch.ones(1, 1, requires_grad=True)).backward()
print("got     ", layer.lora_A.grad)
print("expected", torch.ones(1, 1))
