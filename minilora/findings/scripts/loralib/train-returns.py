# As of every module of PyTorch, eval() is the layer itself.
import loralib

layer = loralib.Linear(4, 3, r=2)
print("got     ", layer.eval())
print("expected", layer)
