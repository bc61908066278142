# Two micro-batches of the same example have the gradient of one: the mean of both. So one step of
# SGD is the same.
import tempfile

import torch
import transformers

sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": 2}
config = transformers.BertConfig(
    vocab_size=5,
    intermediate_size=4,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    **sizes,
)
batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}


def step(micro_batches):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    how = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    how |= {"lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "disable_tqdm": True}
    how |= {"gradient_accumulation_steps": micro_batches, "per_device_train_batch_size": 1}
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(folder, save_strategy="no", **how)
        data = [batch] * micro_batches
        transformers.Trainer(model, arguments, lambda items: items[0], data).train()
    return model.classifier.bias.detach()[1]  # which began at 0


print("got     ", round((step(2) / step(1)).item(), 4), "times the step")
print("expected", 1.0, "times the step")
