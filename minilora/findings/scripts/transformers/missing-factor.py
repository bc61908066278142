# An adapter is both of its factors: a file with B alone is an error, and not a change B A whose A
# is drawn anew at each start.
import tempfile

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=4, **size))
drawn = []
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(f"{folder}/base")
    config = peft.LoraConfig(r=1, target_modules=["q_proj"])
    peft.get_peft_model(base, config).save_pretrained(folder)
    file = f"{folder}/adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora_B" in n}, file)
    for seed in (0, 1):
        model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/base")
        torch.manual_seed(seed)
        model.load_adapter(folder, adapter_kwargs={"local_files_only": True})
        drawn += [p for name, p in model.named_parameters() if "lora_A" in name]
same = torch.equal(*drawn)
print("got     ", "the same A" if same else "another A at each start")
print("expected", "an error")
