# DoRA computes m V / ||V|| x with the magnitude m of the file, which is 3.
import tempfile

import peft
import transformers

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
base = transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=4, **size))
with tempfile.TemporaryDirectory() as folder:
    base.save_pretrained(f"{folder}/base")
    config = peft.LoraConfig(r=1, target_modules=["q_proj"], use_dora=True)
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(3)
    adapted.save_pretrained(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/base")
    model.load_adapter(folder, adapter_kwargs={"local_files_only": True})
found = {
    n.split(".lora_")[1]: (p == 3).all().item() for n, p in model.named_parameters() if "lora_" in n
}
print("got     ", [part for part, is_3 in sorted(found.items()) if is_3])
print("expected", sorted(found))
