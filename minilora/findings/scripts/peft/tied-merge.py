# The head's adapter changes the head alone: embedding E, head E + s B A. E = 1 and s B A = 2.
import peft
import transformers

sizes = {"n_embd": 2, "n_layer": 1, "n_head": 1, "vocab_size": 3, "n_positions": 2}
c = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"])
model = peft.get_peft_model(transformers.GPT2LMHeadModel(c), config)
embed, head = model.get_input_embeddings(), model.get_output_embeddings()
embed.weight.data.fill_(1)
head.lora_A["default"].weight.data.fill_(1)
head.lora_B["default"].weight.data.fill_(2)
model.merge_adapter()
print(
    "got     ",
    embed.weight[0, 0].item(),
    "in the embedding,",
    head.weight[0, 0].item(),
    "in the head",
)
print("expected", 1.0, "in the embedding,", 3.0, "in the head")
