# The number of a layer is what follows `layers` in its name: 1 in layers.1.experts.0.up,
# whatever stands before `layers`.
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

config = LoraConfig(target_modules=["up"], layers_to_transform=[1])
names = ["layers.1.experts.0.up", "model.layers.1.experts.0.up"]
print("got     ", [bool(check_target_module_exists(config, name)) for name in names])
print("expected", [True, True])
