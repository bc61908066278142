# At the start PiSSA changes no output: y = E (E[0]) = 16 in the first place, E = diag(4, 1).
import peft
import torch

embed, head = torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2, bias=False)
embed.weight.data = torch.diag(torch.tensor([4.0, 1]))
head.weight = embed.weight
config = peft.LoraConfig(r=1, lora_alpha=1, init_lora_weights="pissa", target_modules=["1"])
model = peft.get_peft_model(torch.nn.Sequential(embed, head), config)
print("got     ", [[round(y, 4) for y in model(torch.tensor([0]))[0].tolist()]])
print("expected", [[16.0, 0.0]])
