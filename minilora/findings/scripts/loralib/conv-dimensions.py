# B A has as many entries as the weight: 4 * 3 * 3.
import loralib

layer = loralib.Conv1d(4, 3, kernel_size=3, r=2)
print("got     ", (layer.lora_B @ layer.lora_A).numel())
print("expected", layer.conv.weight.numel())
