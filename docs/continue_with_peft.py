"""Continue training with PEFT: python continue_with_peft.py MODEL ADAPTER DATA OUT [STEPS].

DATA has a JSON object a line, with the tokens as ids or a text. The optimizer starts afresh.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, data, out = sys.argv[1:5]
steps = int(sys.argv[5]) if len(sys.argv) > 5 else 100
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter, is_trainable=True)

rows = [json.loads(line) for line in Path(data).read_text("utf-8").splitlines()]
tokenizer = None if "ids" in rows[0] else AutoTokenizer.from_pretrained(base)
texts = [row["ids"] if tokenizer is None else tokenizer(row["text"])["input_ids"] for row in rows]


def mean_loss(some):
    t = max(map(len, some))
    ids = torch.tensor([row + [0] * (t - len(row)) for row in some])
    real = torch.tensor([[i < len(row) for i in range(t)] for row in some])
    labels = ids.masked_fill(~real, -100)
    return model(input_ids=ids, attention_mask=real.long(), labels=labels).loss


def report(step):
    model.eval()
    with torch.no_grad():
        print(f"step {step}: loss {mean_loss(texts).item():.9g}")
    model.train()


trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
generator = torch.Generator().manual_seed(0)
report(0)
for _ in range(steps):
    some = torch.randint(len(texts), (16,), generator=generator).tolist()
    mean_loss([texts[i] for i in some]).backward()
    optimizer.step()
    optimizer.zero_grad()
report(steps)
model.save_pretrained(out)
