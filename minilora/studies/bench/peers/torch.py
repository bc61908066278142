"""The same step by PyTorch, written by hand: as it stands, and compiled."""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from minilora.io.files import read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import read_adapter
from minilora.spec.models import Llama
from minilora.studies.bench.cases import RATE
from minilora.studies.bench.sides import Missing


class ByHand:
    """A Llama with LoRA in PyTorch's functions alone, its gradients by autograd."""

    versions = f"torch {torch.__version__}"

    def __init__(self, folder: str, threads: int) -> None:
        torch.set_num_threads(threads)
        at = Path(folder)
        c, base = read_model(at / "model")
        assert isinstance(c, Llama)
        adapter, tuning = read_adapter(at / "adapter", c)
        self.c, self.scale = c, tuning.scale
        self.W = {name: torch.from_numpy(w) for name, w in base.items()}
        self.params = {name: torch.from_numpy(w).requires_grad_() for name, w in adapter.items()}
        self.optimizer = torch.optim.AdamW(list(self.params.values()), lr=RATE)
        batch = read_tensors(at / "batch.safetensors")
        self.ids, self.labels = (torch.from_numpy(batch[name]) for name in ("ids", "labels"))
        half = torch.arange(0, c.head_dim, 2) / c.head_dim
        angles = torch.arange(self.ids.shape[1])[:, None] * c.theta**-half
        self.cos, self.sin = angles.cos(), angles.sin()

    def _project(self, x: torch.Tensor, at: str) -> torch.Tensor:
        y: torch.Tensor = F.linear(x, self.W[f"{at}.weight"])
        if at not in self.scale:
            return y
        A, B = self.params[f"{at}.A"], self.params[f"{at}.B"]
        return y + self.scale[at] * F.linear(F.linear(x, A), B)

    def _norm(self, x: torch.Tensor, at: str) -> torch.Tensor:
        y: torch.Tensor = F.rms_norm(x, (self.c.d,), self.W[f"{at}.weight"][:, 0], self.c.eps)
        return y

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        turned = first * self.cos - second * self.sin, second * self.cos + first * self.sin
        return torch.cat(turned, -1)

    def _loss(self) -> torch.Tensor:
        c, (b, t) = self.c, self.ids.shape
        x = F.embedding(self.ids, self.W["embed.weight"])
        for i in range(c.layers):
            at = f"layers.{i}."
            h = self._norm(x, at + "norm1")
            q, k, v = (
                self._project(h, at + part).view(b, t, -1, c.head_dim).transpose(1, 2)
                for part in "qkv"
            )
            a = F.scaled_dot_product_attention(
                self._turn(q), self._turn(k), v, is_causal=True, enable_gqa=True
            )
            x = x + self._project(a.transpose(1, 2).reshape(b, t, -1), at + "o")
            h = self._norm(x, at + "norm2")
            gated = F.silu(self._project(h, at + "gate")) * self._project(h, at + "up")
            x = x + self._project(gated, at + "down")
        head = self.W["embed.weight" if c.tied else "head.weight"]
        z = F.linear(self._norm(x, "norm"), head)
        loss: torch.Tensor = F.cross_entropy(
            z[:, :-1].reshape(-1, c.vocab), self.labels[:, 1:].ravel()
        )
        return loss

    def step(self) -> float:
        """Loss, gradients and AdamW's step."""
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def forward(self) -> float:
        """The loss alone."""
        with torch.no_grad():
            return float(self._loss())


class Compiled(ByHand):
    """The same, its loss and gradients compiled by torch.compile; AdamW is PyTorch's as it is.

    Errors: Missing without a C++ compiler.
    """

    def __init__(self, folder: str, threads: int) -> None:
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            raise Missing(
                f"torch.compile calls a C++ compiler, and {compiler} is not installed; "
                "install it, or name another in CXX"
            )
        super().__init__(folder, threads)
        self._compiled = torch.compile(super()._loss)

    def _loss(self) -> torch.Tensor:
        loss: torch.Tensor = self._compiled()
        return loss
