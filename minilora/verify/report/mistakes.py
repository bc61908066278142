"""The known mistakes that reports name: what each is, and where it was reported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from minilora.verify.report.causes import AND

if TYPE_CHECKING:
    from minilora.verify.mutants.mutant import Mutant
    from minilora.verify.report.report import Report
    from minilora.verify.report.result import Result

REPOSITORIES = {
    "ComfyUI": "comfyanonymous/ComfyUI",
    "LyCORIS": "KohakuBlueleaf/LyCORIS",
    "Megatron-LM": "NVIDIA/Megatron-LM",
    "PEFT": "huggingface/peft",
    "TensorRT-LLM": "NVIDIA/TensorRT-LLM",
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "candle-lora": "EricLBuehler/candle-lora",
    "catid/dora": "catid/dora",
    "diffusers": "huggingface/diffusers",
    "llama.cpp": "ggml-org/llama.cpp",
    "microsoft/LoRA": "microsoft/LoRA",
    "mlx-examples": "ml-explore/mlx-examples",
    "mlx-lm": "ml-explore/mlx-lm",
    "mlx-vlm": "Blaizzy/mlx-vlm",
    "peft": "huggingface/peft",
    "rasbt/LLMs-from-scratch": "rasbt/LLMs-from-scratch",
    "sglang": "sgl-project/sglang",
    "torchtune": "pytorch/torchtune",
    "transformers": "huggingface/transformers",
    "unsloth": "unslothai/unsloth",
    "unsloth-zoo": "unslothai/unsloth-zoo",
}
"""Where the projects are that the catalogue of mutants names."""


@cache
def _catalogue() -> dict[str, Mutant]:
    from minilora.verify.mutants import MUTANTS

    return {mutant.id: mutant for mutant in MUTANTS}


def of_result(result: Result) -> list[Mutant]:
    """The mutants that the diagnoses of a result name."""
    ids = [id for each in result.diagnosis for id in each.id.split(AND)]
    return [_catalogue()[id] for id in ids if id in _catalogue()] if ids else []


def named(reports: Sequence[Report]) -> list[Mutant]:
    """The mutants that diagnoses name, each once."""
    found = {m.id: m for report in reports for result in report.results for m in of_result(result)}
    return list(found.values())


def issue_of(seen: str) -> str:
    """The address of "PROJECT NUMBER"; "" for a release, and for a project that is not known."""
    project, _, number = seen.rpartition(" ")
    known = REPOSITORIES.get(project)
    return f"https://github.com/{known}/issues/{number}" if known and number.isdigit() else ""


def linked(text: str, mutants: Sequence[Mutant]) -> str:
    """Text of HTML in which the ids of these mutants lead to what the page says of them."""
    if not mutants:
        return text
    longest_first = sorted((re.escape(mutant.id) for mutant in mutants), key=len, reverse=True)
    ids = re.compile(rf"(?<![\w.-])({'|'.join(longest_first)})(?![\w-])")
    return ids.sub(r'<a href="#mistake-\1">\1</a>', text)
