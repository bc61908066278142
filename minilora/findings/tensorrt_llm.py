"""Findings in TensorRT-LLM."""

import math

from minilora.findings.conditions import (
    Condition,
    alpha_of,
    any_of,
    other_type,
    parts,
    ratio,
    scaled_otherwise,
    settings,
)
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import ALL_TENSORS_COUNT, START_STAYS, START_TAKEN_OUT
from minilora.findings.stored import StoredAdapter, StoredModule

READ = "007e181b"
"""The commit of tensorrt_llm/lora_manager.py that was read."""

_SOURCE = (
    "[lora_manager.py](https://github.com/NVIDIA/TensorRT-LLM/blob/007e181b/tensorrt_llm/"
    "lora_manager.py)"
)
_TABLES = ("embed_tokens", "lm_head")


def _scale(adapter: StoredAdapter, module: StoredModule) -> float:
    rslora = bool(adapter.config.get("use_rslora"))
    return alpha_of(adapter) / (math.sqrt(module.rank) if rslora else module.rank)


def _old_scale(adapter: StoredAdapter, module: StoredModule) -> float:
    return alpha_of(adapter) / module.rank


def _if_rslora(condition: Condition) -> Condition:
    return lambda adapter: condition(adapter) if adapter.config.get("use_rslora") else []


def _tables(adapter: StoredAdapter) -> list[str]:
    return [m.name for m in adapter.adapted if m.name.rpartition(".")[2] in _TABLES]


FINDINGS = (
    Finding(
        id="tensorrt-llm.rslora",
        title="rsLoRA is scaled as LoRA before 0.11",
        severity="silent",
        seen="0.10.0",
        versions="<0.11",
        fixed_in="0.11.0",
        cause="LoraManager.load_from_hf (lora_manager.py) divides lora_alpha by the rank",
        fix="Divide by the root of the rank where use_rslora is set (done in 0.11)",
        right=r"""
            $s = \alpha / \sqrt r$.
            """,
        consequence="""
            The adapter acts √r times too weakly. [TensorRT-LLM
            1669](https://github.com/NVIDIA/TensorRT-LLM/pull/1669) mended it.
            """,
        not_asked="there is no peer of TensorRT-LLM",
        source="[TensorRT-LLM 1668](https://github.com/NVIDIA/TensorRT-LLM/issues/1668)",
        stored=Stored(
            _if_rslora(scaled_otherwise(_old_scale)),
            "scaled",
            "it divides lora_alpha by r although use_rslora is true",
            ratio(_old_scale),
        ),
    ),
    Finding(
        id="tensorrt-llm.one-alpha",
        title="The alphas of a pattern are not read",
        severity="silent",
        seen=READ,
        versions=">=0.11",
        cause=(
            "LoraManager.load_from_hf (lora_manager.py) takes lora_alpha for every module, and "
            "divides it by the tensor's rank"
        ),
        fix="Read alpha_pattern by PEFT's rule for each module",
        right="""
            Each module has its own alpha.
            """,
        consequence="""
            The modules of a pattern are scaled otherwise. Put the scale into the factors.
            """,
        not_asked="there is no peer of TensorRT-LLM",
        source=_SOURCE,
        stored=Stored(
            scaled_otherwise(_scale),
            "scaled",
            "it takes lora_alpha for every module, whatever alpha_pattern says",
            ratio(_scale),
        ),
    ),
    Finding(
        id="tensorrt-llm.tables",
        title="Adapters of the embedding and the head are left out",
        severity="silent",
        seen=READ,
        versions=">=0.11",
        cause=(
            "iterate_hf_lora (lora_manager.py) goes on at a name that is no layer's if it holds "
            "lm_head or embed_tokens"
        ),
        fix="Load the adapters of embed_tokens and lm_head, or raise for them",
        right=ALL_TENSORS_COUNT,
        consequence="""
            Embedding and head are the base's. Merge the adapter.
            """,
        not_asked="there is no peer of TensorRT-LLM",
        source=_SOURCE,
        stored=Stored(_tables, "dropped", "it passes over adapters of the embedding and the head"),
    ),
    Finding(
        id="tensorrt-llm.start",
        title="PiSSA's start stays in the base",
        severity="silent",
        seen=READ,
        versions=">=0.11",
        cause="LoraManager.load_from_hf (lora_manager.py) does not read init_lora_weights",
        fix="Read init_lora_weights, and refuse a start that lies in the base",
        right=START_TAKEN_OUT,
        consequence="""
            The start acts twice. Convert the adapter to an ordinary one first.
            """,
        not_asked="there is no peer of TensorRT-LLM",
        source=_SOURCE,
        stored=START_STAYS,
    ),
    Finding(
        id="tensorrt-llm.refused",
        title="Biases and other variants are refused",
        severity="fails",
        seen=READ,
        versions=">=0.11",
        cause="iterate_hf_lora (lora_manager.py) raises a KeyError for other names",
        fix="Name the tensor and the setting in the message instead of a KeyError",
        right="""
            An error is right for what is not supported. Merge the adapter.
            """,
        not_asked="there is no peer of TensorRT-LLM",
        source=_SOURCE,
        stored=Stored(
            any_of(settings("lora_bias", "bias"), parts("E", "lambda_d", "lambda_b"), other_type),
            "refused",
            "it knows A, B and DoRA's magnitude",
        ),
    ),
)

LIBRARY = Library(
    "tensorrt-llm", "TensorRT-LLM", "", FINDINGS, release=f"commit {READ}", reads=("peft",)
)
