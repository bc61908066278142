# A model is the same function in float64 as in float32: finite logits, also of a padded batch.
import torch
import transformers

size = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
config = transformers.LlamaConfig(attn_implementation="eager", intermediate_size=4, **size)
model = transformers.LlamaForCausalLM(config)
batch = {
    "input_ids": torch.tensor([[0, 0, 1, 2]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1]]),
}
found = [model(**batch).logits.isfinite().all().item()]
found += [model.double()(**batch).logits.isfinite().all().item()]
print("got     ", "finite:", found, "in float32 and in float64")
print("expected", "finite:", [True, True], "in float32 and in float64")
