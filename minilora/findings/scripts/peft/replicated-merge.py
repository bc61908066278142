# Each copy has its own adapter on the shared W = 8: merged, W + 1 and W + 2. One weight cannot
# hold both.
import peft
import torch
import transformers

sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "vocab_size": 5}
c = transformers.LlamaConfig(num_attention_heads=1, num_key_value_heads=1, **sizes)
copies = [[0, 1], [0, 1]]
config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"], layer_replication=copies)
model = peft.get_peft_model(transformers.LlamaForCausalLM(c), config)
layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
for layer, change in zip(layers, (1, 2), strict=True):
    layer.weight.data.fill_(8)
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(change)
model.merge_adapter()
print("got     ", [layer(torch.ones(1, 4))[0, 0].item() for layer in layers])
print("expected", [4 * (8 + 1.0), 4 * (8 + 2.0)])
