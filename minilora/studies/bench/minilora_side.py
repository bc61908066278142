"""This package's side: a step, a forward and text as training, evaluation and generation run."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from minilora import __version__
from minilora.io.files import read_tensors
from minilora.io.formats.huggingface import read_config, read_model
from minilora.io.formats.peft import read_adapter
from minilora.io.lazy_weights import Expanded, OnDemand
from minilora.spec.models import Batch
from minilora.spec.optim import AdamState
from minilora.spec.quantization import from_gguf
from minilora.studies.bench.cases import NEW, PROMPT, RATE
from minilora.training.checkpointing import lowest_block
from minilora.training.frozen_prefix import FrozenPrefix
from minilora.training.fused_adamw import fused_adamw
from minilora.training.generate import generate
from minilora.training.gradients import (
    ExecutionPlan,
    evaluate,
    gradients,
)
from minilora.training.memory import keep_freed_memory
from minilora.training.prefix_store import MemoryStore
from minilora.training.threads import blas_threads


def products_of() -> str:
    """The library of NumPy's products and the processor that it takes this one for.

    OpenBLAS takes what OPENBLAS_CORETYPE names, which may be slower than what it would choose.
    """
    pools: list[dict[str, Any]] = threadpool_info()
    info = next((one for one in pools if one["user_api"] == "blas"), {})
    name, kind = info.get("internal_api", "products"), info.get("architecture", "unknown")
    told = " by OPENBLAS_CORETYPE" if os.environ.get("OPENBLAS_CORETYPE") else ""
    return f"{name} for {kind}{told}"


class MiniloraSide:
    """LoRA on the case in ``folder``; ``quantized``: from weights that stay in four bits."""

    versions = f"minilora {__version__}, NumPy {np.__version__}, {products_of()}"

    def __init__(
        self,
        folder: str,
        threads: int,
        group_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        quantized: bool = False,
    ) -> None:
        keep_freed_memory()
        at = Path(folder)
        self.plan = ExecutionPlan(threads, group_tokens, gradient_checkpointing)
        self.c = read_config(at / "model")
        self.W: Any = _quantized(at) if quantized else read_model(at / "model")[1]
        self.params, self.tuning = read_adapter(at / "adapter", self.c)
        self.state = AdamState()
        batch = read_tensors(at / "batch.safetensors")
        self.batch = Batch(batch["ids"], labels=batch["labels"])
        depth = lowest_block(self.c.layers, self.c.causal, self.tuning.trained)
        if depth:
            prefix = FrozenPrefix(depth, MemoryStore(float("inf")))
            self.plan = replace(self.plan, prefix=prefix)

    def step(self) -> float:
        """Loss, gradients and AdamW's step."""
        W = self.W | self.params
        L, g = gradients(self.batch, W, self.c, self.tuning, self.plan)
        self.params, self.state = fused_adamw(self.params, g, self.state, RATE)
        return float(L)

    def forward(self) -> float:
        """The loss alone."""
        nll, n = evaluate(self.batch, self.W | self.params, self.c, self.tuning, self.plan)
        return float(nll / n)

    def generate(self) -> list[int]:
        """The most probable tokens, `NEW` of them, with the keys and values of those before."""
        prompt = self.batch.ids[0, :PROMPT].tolist()
        with blas_threads(self.plan.threads):
            rows = generate([prompt], self.W | self.params, self.c, self.tuning, max_new_tokens=NEW)
            return [token for row in rows for token in row if token is not None]

    def products(self) -> float:
        """What a large matrix product reaches, in multiplications and additions a second."""
        n = 1024
        a, b = np.ones((n, n), np.float32), np.ones((n, n), np.float32)
        best = float("inf")
        with blas_threads(self.plan.threads):
            for _ in range(5):
                start = time.perf_counter()
                a @ b
                best = min(best, time.perf_counter() - start)
        return 2 * n**3 / best


def _quantized(folder: Path) -> Expanded:
    """The weights as GGUF's blocks, each expanded when it is read."""
    found = read_tensors(folder / "quantized.safetensors")
    return Expanded(
        {
            name: OnDemand(from_gguf(data, "q4_1")) if data.dtype == np.uint8 else data
            for name, data in found.items()
        }
    )
