# A list of modules is a set of names: those of a classifier are classifier and score, each once,
# however often the adapter was saved.
import peft
import transformers

size = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
bert = transformers.BertForSequenceClassification(transformers.BertConfig(**size))
mine = ["classifier"]
config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=mine)
peft.get_peft_model(bert, config)
print("got     ", mine)
print("expected", ["classifier"])
