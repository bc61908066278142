# The rate is (1 + cos(pi t / T)) / 2 up to t = T and 0 from there on: T = 4.
import torch
import transformers

optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, num_training_steps=4)
rates = []
for _ in range(9):
    rates += scheduler.get_last_lr()
    optimizer.step()
    scheduler.step()
print("got     ", [round(rate, 3) for rate in rates[4:]])
print("expected", [0.0, 0.0, 0.0, 0.0, 0.0])
