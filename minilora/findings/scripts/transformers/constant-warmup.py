# A warm-up of 4 steps takes the rate from 0 to 1 by quarters.
import torch
import transformers

optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
scheduler = transformers.get_scheduler("constant", optimizer, num_warmup_steps=4)
rates = []
for _ in range(6):
    rates += scheduler.get_last_lr()
    optimizer.step()
    scheduler.step()
print("got     ", rates)
print("expected", [0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
