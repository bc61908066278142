"""Findings in vLLM."""

from collections.abc import Sequence

from minilora.findings.conditions import (
    any_of,
    not_in_base,
    other_type,
    parts,
    settings,
    start_in_base,
)
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import ALL_TENSORS_FIT
from minilora.findings.stored import StoredAdapter

SEEN = "0.33.0"
MAX_RANK = 16
"""The default of ``--max-lora-rank``."""


def _saved(adapter: StoredAdapter) -> list[str]:
    """What is saved in full, other than the heads of classifiers."""
    names = adapter.config.get("modules_to_save") or []
    heads = ("classifier", "score")
    return [f"modules_to_save {name}" for name in names if name not in heads]


def _beyond_rank(adapter: StoredAdapter) -> Sequence[str]:
    return [m.name for m in adapter.adapted if m.rank > MAX_RANK]


def _only_prefix(adapter: StoredAdapter) -> list[str]:
    """The modules whose names in the base end alike, and begin otherwise."""
    last = {name.rpartition(".")[2] for name in adapter.base_modules or ()}
    return [name for name in not_in_base(adapter) if name.rpartition(".")[2] in last]


FINDINGS = (
    Finding(
        id="vllm.prefix",
        title="Modules of another prefix are passed over",
        severity="silent",
        seen=SEEN,
        code="vllm/lora/lora_model.py:268 LoRAModel.from_local_checkpoint.check_unexpected_modules",
        versions=">=0.15.1",
        cause=(
            "from_local_checkpoint (lora/lora_model.py) compares the last word of a module's name "
            "with those that can be adapted, and the rest of it with nothing"
        ),
        does="""
            An adapter whose modules have another prefix than the served model's, as
            `model.language_model.layers` for `model.layers`, is accepted and acts nowhere: [vLLM
            34186](https://github.com/vllm-project/vllm/issues/34186),
            [48019](https://github.com/vllm-project/vllm/issues/48019).
            """,
        fix=(
            "Compare the whole names of the adapter's modules with the model's, and raise for one"
            " that is left over"
        ),
        right=ALL_TENSORS_FIT,
        consequence="""
            The base answers, under the adapter's name. Rename the tensors.
            """,
        not_asked="`inference.deltas` reads what is loaded, and no engine is started",
        source="vLLM 0.33.0, lora/lora_model.py, `check_unexpected_modules`",
        stored=Stored(_only_prefix, "dropped", "no module of the base has this name"),
    ),
    Finding(
        id="vllm.refused",
        title="What changes more than the factors of LoRA is refused",
        severity="fails",
        seen=SEEN,
        code="vllm/lora/peft_helper.py:53 PEFTHelper._validate_features",
        cause=(
            "PEFTHelper (lora/peft_helper.py) refuses use_dora, lora_bias, bias, modules_to_save "
            "other than a classifier's head, layer_replication, aLoRA, and a start that PEFT takes "
            "out of the base; parse_fine_tuned_lora_name (lora/utils.py) every other tensor"
        ),
        fix=(
            "Support the setting, or name it in the documentation; an error is right as long as "
            "it is not supported"
        ),
        right="""
            An error is right for what is not supported. Merge the adapter instead, or convert it.
            """,
        not_asked="what a library refuses is skipped",
        stored=Stored(
            any_of(
                settings(
                    "use_dora",
                    "lora_bias",
                    "bias",
                    "layer_replication",
                    "alora_invocation_tokens",
                    "use_qalora",
                    "use_bdlora",
                    "trainable_token_indices",
                ),
                _saved,
                start_in_base,
                other_type,
                parts("tokens"),
            ),
            "refused",
            "it takes the factors of LoRA alone",
        ),
    ),
    Finding(
        id="vllm.max-rank",
        title="A rank above 16 is refused unless the server is told of it",
        severity="fails",
        seen=SEEN,
        code="vllm/config/lora.py:34 LoRAConfig",
        cause="max_lora_rank (config/lora.py) is 16 unless given",
        fix="Take the greatest rank of the adapters that are named at the start for the default",
        right="""
            A limit that memory asks for is a choice, and the error names it.
            """,
        consequence="""
            Start the server with `--max-lora-rank`, the greatest rank of the adapters.
            """,
        not_asked="no engine is started",
        stored=Stored(_beyond_rank, "use", "start it with --max-lora-rank of these ranks"),
    ),
)

LIBRARY = Library(
    "vllm",
    "vLLM",
    "vllm",
    FINDINGS,
    release=SEEN,
    reads=("peft",),
    files="https://github.com/vllm-project/vllm/blob/v{release}/{file}#L{line}",
)
