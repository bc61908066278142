"""The same step, and generation, by transformers and PEFT."""

from pathlib import Path

import peft
import torch
import transformers

from minilora.io.files import read_tensors
from minilora.studies.bench.cases import NEW, PROMPT, RATE
from minilora.training.memory import keep_freed_memory


class Peft:
    """transformers' Llama with eager attention, PEFT's LoRA and PyTorch's AdamW."""

    versions = (
        f"peft {peft.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}"
    )

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        at = Path(folder)
        base = transformers.LlamaForCausalLM.from_pretrained(
            at / "model", attn_implementation="eager", dtype=torch.float32
        )
        self.model = peft.PeftModel.from_pretrained(base, at / "adapter", is_trainable=True)
        self.model.train()
        batch = read_tensors(at / "batch.safetensors")
        self.ids, self.labels = (torch.from_numpy(batch[name]) for name in ("ids", "labels"))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step(self) -> float:
        """Loss, gradients and AdamW's step."""
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def forward(self) -> float:
        """The loss alone."""
        with torch.no_grad():
            return float(self.model(input_ids=self.ids, labels=self.labels, use_cache=False).loss)

    def generate(self) -> list[int]:
        """The most probable tokens, `NEW` of them, with the keys and values of those before."""
        prompt = self.ids[:1, :PROMPT]
        text = self.model.generate(
            input_ids=prompt, max_new_tokens=NEW, do_sample=False, use_cache=True
        )
        drawn: list[int] = text[0, prompt.shape[1] :].tolist()
        return drawn


class Warm(Peft):
    """PEFT in a process whose freed memory stays warm, as this package's does."""

    def __init__(self, folder: str, threads: int) -> None:
        keep_freed_memory()
        super().__init__(folder, threads)
