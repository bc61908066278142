# Saving and loading change no weight: W + s B A = 1 + 1 * 1 * 1, s = alpha / r = 1.
import loralib

saved = loralib.Linear(1, 1, r=1)
for parameter in saved.parameters():
    parameter.data.fill_(1)
saved.eval()
loaded = loralib.Linear(1, 1, r=1)
loaded.load_state_dict(saved.state_dict())
loaded.eval()
print("got     ", loaded.weight.item())
print("expected", 2.0)
