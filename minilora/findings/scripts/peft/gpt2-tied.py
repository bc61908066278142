# A tied table E is used twice, so its adapter acts twice: h = E[id] + s B A at the input, and
# y = (E + s B A) h at the head. Saved and loaded, it must have both halves.
import tempfile

import peft
import transformers

sizes = {"n_embd": 2, "n_layer": 1, "n_head": 1, "vocab_size": 3, "n_positions": 2}
c = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
config = peft.LoraConfig(r=1, target_modules=["lm_head"], ensure_weight_tying=True)
model = peft.get_peft_model(transformers.GPT2LMHeadModel(c), config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel(c), folder)
print("got     ", "lora_A at the head:", hasattr(loaded.get_output_embeddings(), "lora_A"))
print("expected", "lora_A at the head:", hasattr(model.get_output_embeddings(), "lora_A"))
