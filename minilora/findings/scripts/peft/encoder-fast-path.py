# In evaluation, without dropout, the layer is the same function as in training.
import peft
import torch

torch.manual_seed(0)
base = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
config = peft.LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)
model, x = peft.inject_adapter_in_model(config, base), torch.randn(1, 3, 4, dtype=torch.float64)
with torch.no_grad():
    same = torch.allclose(model.train()(x), model.eval()(x))
print("got     ", "the same" if same else "another function in evaluation")
print("expected", "the same")
