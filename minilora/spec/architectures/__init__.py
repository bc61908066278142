"""Architectures beside the three of `models`, each block written out in full in a file of its own.

They use the same equations, projections and norms; importing this package lets `models.logits` and
`models.loss` compute them.
"""

from minilora.spec import models
from minilora.spec.architectures.distilbert import DistilBert, distilbert
from minilora.spec.architectures.gemma3 import Gemma3, gemma3
from minilora.spec.architectures.llama3 import Llama3, RopeScaling, llama3
from minilora.spec.architectures.qwen3 import Qwen3, qwen3
from minilora.spec.architectures.smollm3 import SmolLM3, smollm3

__all__ = [
    "DistilBert",
    "Gemma3",
    "Llama3",
    "Qwen3",
    "RopeScaling",
    "SmolLM3",
    "distilbert",
    "gemma3",
    "llama3",
    "qwen3",
    "smollm3",
]

models.FORWARD |= {
    DistilBert: distilbert,
    Gemma3: gemma3,
    Llama3: llama3,
    Qwen3: qwen3,
    SmolLM3: smollm3,
}
