# LoftQ's start has an answer for any matrix, and where it is not supported, an error that says so.
import peft
import torch

found = []
for base in (torch.nn.Conv1d(1, 1, 1), torch.nn.Embedding(1, 1)):
    settings = {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig()}
    try:
        config = peft.LoraConfig(target_modules=["0"], **settings)
        peft.get_peft_model(torch.nn.Sequential(base), config)
    except TypeError as error:
        found.append(f"TypeError: {error}")
print("got     ", found)
print("expected", "adapters, or an error that says that LoftQ is not supported there")
