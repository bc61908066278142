"""Findings in llama.cpp, whose script convert_lora_to_gguf.py reads PEFT's folders."""

import re

from minilora.findings.conditions import (
    alpha_of,
    any_of,
    other_type,
    ratio,
    scaled_otherwise,
    settings,
)
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import ALL_TENSORS_COUNT, START_STAYS, START_TAKEN_OUT
from minilora.findings.stored import StoredAdapter, StoredModule

SCRIPT = "0b03ada"
"""The commit of convert_lora_to_gguf.py that was read."""

_SOURCE = (
    "[convert_lora_to_gguf.py](https://github.com/ggml-org/llama.cpp/blob/0b03ada/"
    "convert_lora_to_gguf.py) and [llama-adapter.h](https://github.com/ggml-org/llama.cpp/blob/"
    "master/src/llama-adapter.h), `get_scale`"
)
_WRITTEN = {"A", "B", "base weight"}
_NORM = re.compile(r"(_layernorm|\.norm)")


def _scale(adapter: StoredAdapter, module: StoredModule) -> float:
    """Alpha / r with the tensor's rank, 1 for an alpha of 0; a GGUF's own scale is that."""
    if adapter.format != "peft":
        return module.scale
    return alpha_of(adapter) / module.rank if alpha_of(adapter) else 1.0


def _norms(adapter: StoredAdapter) -> list[str]:
    saved = {name for name in adapter.having("weight", "bias") if _NORM.search(f".{name}")}
    return sorted(saved)


def _beside(adapter: StoredAdapter) -> list[str]:
    """What the script stops at: every tensor that is no factor, but norms'."""
    norms = {*_norms(adapter)}
    return [m.name for m in adapter.modules if m.parts - _WRITTEN and m.name not in norms]


def _tied(adapter: StoredAdapter) -> list[str]:
    """An adapted head of a base that ties it to its embedding."""
    if not (adapter.base or {}).get("tie_word_embeddings"):
        return []
    ends = ("lm_head", "embed_tokens", "wte")
    return [m.name for m in adapter.adapted if m.name.rpartition(".")[2] in ends]


FINDINGS = (
    Finding(
        id="llama-cpp.one-alpha",
        title="The one alpha is divided by the rank, with rsLoRA too",
        severity="silent",
        seen=SCRIPT,
        cause=(
            "convert_lora_to_gguf.py writes lora_alpha alone, and get_scale (llama-adapter.h) "
            "divides it by the rank of the tensor: use_rslora and alpha_pattern are not read"
        ),
        fix=(
            "Write a scale for each tensor (alpha times rank over sqrt(rank) with rsLoRA, "
            "alpha_pattern), as get_scale divides by the rank"
        ),
        right=r"""
            $s = \alpha / \sqrt r$ with rsLoRA, and the module's own $\alpha$ with a pattern.
            """,
        consequence="""
            With rsLoRA the adapter acts √r times too weakly. `minilora convert --to gguf` puts what
            one alpha cannot say into B.
            """,
        not_asked="there is no peer of llama.cpp",
        source=_SOURCE,
        stored=Stored(
            scaled_otherwise(_scale),
            "scaled",
            "convert_lora_to_gguf.py writes lora_alpha alone, and llama.cpp divides it by the "
            "rank, whatever use_rslora and alpha_pattern say",
            ratio(_scale),
        ),
    ),
    Finding(
        id="llama-cpp.start",
        title="PiSSA's start stays in the base",
        severity="silent",
        seen=SCRIPT,
        cause="convert_lora_to_gguf.py does not read init_lora_weights",
        fix="Read init_lora_weights, and refuse a start that lies in the base",
        right=START_TAKEN_OUT,
        consequence="""
            The start acts twice. Convert the adapter to an ordinary one first, by `minilora
            convert` or by `path_initial_model_for_weight_conversion` of PEFT.
            """,
        not_asked="there is no peer of llama.cpp",
        source=_SOURCE,
        stored=START_STAYS,
    ),
    Finding(
        id="llama-cpp.norms",
        title="Trained norms are converted, and passed over when they are loaded",
        severity="silent",
        seen=SCRIPT,
        cause=(
            "llama_adapter_lora_init_impl (llama-adapter.cpp) goes on at a tensor whose name ends "
            "in _norm.weight"
        ),
        fix="Replace the base's norm by the adapter's, or refuse the file",
        right=ALL_TENSORS_COUNT,
        consequence="""
            The norms are the base's. Merge the adapter, and convert the merged model.
            """,
        not_asked="there is no peer of llama.cpp",
        source="[llama-adapter.cpp](https://github.com/ggml-org/llama.cpp/blob/master/src/"
        "llama-adapter.cpp)",
        stored=Stored(_norms, "dropped", "the script converts norms, and loading passes over them"),
    ),
    Finding(
        id="llama-cpp.refused",
        title="convert_lora_to_gguf.py stops at everything but A and B",
        severity="fails",
        seen=SCRIPT,
        cause="convert_lora_to_gguf.py exits at a name that is neither lora_A nor lora_B",
        fix=(
            "Name the tensor and the setting in the message; an error is right as long as it is "
            "not supported"
        ),
        right="""
            An error is right for what the format cannot say. Merge the adapter, and convert the
            merged model.
            """,
        not_asked="there is no peer of llama.cpp",
        source=_SOURCE,
        stored=Stored(
            any_of(_beside, other_type, settings("layer_replication")),
            "refused",
            "convert_lora_to_gguf.py stops at what is neither A nor B",
        ),
    ),
    Finding(
        id="llama-cpp.tied",
        title="No adapter is applied to a tied table",
        severity="fails",
        seen=SCRIPT,
        cause=(
            "a tied head has no tensor of its own (llama.cpp 9065), and a table that is the head "
            "too is taken for the embedding alone (llama-adapter.cpp)"
        ),
        fix=(
            "Look for the tied table's tensor under both of its names, and apply the adapter to "
            "the use that it names"
        ),
        right="""
            An adapter of a tied head acts in the head.
            """,
        consequence="""
            Merge the adapter, and convert the merged model.
            """,
        not_asked="there is no peer of llama.cpp",
        source="[llama.cpp 9065](https://github.com/ggml-org/llama.cpp/issues/9065)",
        stored=Stored(_tied, "refused", "it applies no adapter to a table that is tied"),
    ),
    Finding(
        id="llama-cpp.echo-late",
        title="llama-cpp-python echoes log-probabilities that are one place late",
        severity="silent",
        seen="0.3.36",
        cause=(
            "where no token begins the text, Llama._create_completion (llama_cpp/llama.py) pairs "
            "token i of the prompt with row i of the logits"
        ),
        fix="Pair token i of the prompt with row i - 1 of the logits, and give the first one null",
        right="""
            Row $i - 1$ of the logits predicts token $i$.
            """,
        consequence="""
            Perplexities by `echo` and `logprobs` are wrong. `minilora audit served` confirms what
            an echo says by tokens that are generated.
            """,
        not_asked="there is no peer of llama.cpp",
        source="`Llama._create_completion` of llama-cpp-python 0.3.36, and its server's answers",
    ),
)

LIBRARY = Library(
    "llama-cpp", "llama.cpp", "", FINDINGS, release=f"commit {SCRIPT}", reads=("peft", "gguf")
)
