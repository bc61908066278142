# A tied table has one pair of factors, whose gradient is the sum of both uses: 1 + 1. One step of
# Adam moves it by lr, from 0 to -1.
import peft
import torch
import transformers

sizes = {"n_embd": 2, "n_layer": 1, "n_head": 1, "vocab_size": 3, "n_positions": 2}
c = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
config = peft.LoraConfig(r=1, target_modules=["lm_head"], ensure_weight_tying=True)
model = peft.get_peft_model(transformers.GPT2LMHeadModel(c), config)
A = model.get_input_embeddings().lora_embedding_A["default"]
trained = [p for p in model.parameters() if p.requires_grad]
for parameter in trained:
    parameter.grad = torch.ones_like(parameter)
torch.optim.Adam(trained, lr=1, betas=(0.5, 0.5), eps=0).step()
print("got     ", A.tolist())
print("expected", [[-1.0, -1.0, -1.0]])
