# "all-linear" adapts every projection but the head, and the head is one module, head.out;
# that another module's name ends alike does not make it one.
import peft
import torch
import transformers


class Model(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig

    def __init__(self):
        super().__init__(self.config_class())
        self.out = torch.nn.Linear(1, 1)
        self.head = torch.nn.ModuleDict({"out": torch.nn.Linear(1, 1)})

    def get_output_embeddings(self):
        return self.head["out"]


model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), Model())
print("got     ", [name for name, at in model.named_modules() if hasattr(at, "lora_A")])
print("expected", ["out"])
