# The file has B = 3 for each projection. A file none of whose names fits is another model's: an
# error, and not an adapter with B = 0.
import tempfile

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=4, **size))
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(f"{folder}/base")
    peft.get_peft_model(base, peft.LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(
        folder
    )
    file = f"{folder}/adapter_model.safetensors"
    stored = load_file(file)
    save_file(
        {n.replace("self_attn", "attn"): torch.full_like(t, 3) for n, t in stored.items()}, file
    )
    model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/base")
    model.load_adapter(folder, adapter_kwargs={"local_files_only": True})
found = [p.max().item() for name, p in model.named_parameters() if "lora_B" in name]
print("got     ", found)
print("expected", [3.0], "or an error")
