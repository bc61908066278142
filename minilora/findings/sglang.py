"""Findings in SGLang."""

from minilora.findings.conditions import (
    alpha_of,
    any_of,
    other_type,
    parts,
    ratio,
    scaled_otherwise,
    settings,
)
from minilora.findings.finding import Finding, Library, Stored
from minilora.findings.shared import (
    ALL_TENSORS_COUNT,
    ALL_TENSORS_FIT,
    START_STAYS,
    START_TAKEN_OUT,
)
from minilora.findings.stored import StoredAdapter, StoredModule

SEEN = "0.5.23"


def _scale(adapter: StoredAdapter, module: StoredModule) -> float:
    return alpha_of(adapter) / float(adapter.config.get("r") or module.rank)


FINDINGS = (
    Finding(
        id="sglang.one-scale",
        title="All modules have the one scale of the configuration",
        severity="silent",
        seen=SEEN,
        code="sglang/srt/lora/lora.py:71 LoRAAdapter.__init__",
        cause=(
            "LoRAAdapter (srt/lora/lora.py) has one scale lora_alpha / r: use_rslora, "
            "rank_pattern and alpha_pattern are not read"
        ),
        does="""
            Reported as [SGLang 40835](https://github.com/sgl-project/sglang/issues/40835) for
            rsLoRA; `rank_pattern` and `alpha_pattern` are passed over in the same line.
            """,
        fix=(
            "Compute a scale for each module: alpha_pattern and rank_pattern by PEFT's rule, and "
            "/ sqrt(r) with use_rslora"
        ),
        right=r"""
            $s = \alpha / \sqrt r$ with rsLoRA, and each module's own $\alpha$ and $r$ with
            patterns, as the adapter was trained.
            """,
        consequence="""
            With rsLoRA the adapter acts √r times too weakly. Put what is lacking into B: multiply
            it by √r and set `use_rslora` to false, and likewise for patterns; or merge the adapter.
            """,
        found_by=("sglang", "inference.deltas.rslora", "inference.deltas.patterns"),
        stored=Stored(
            scaled_otherwise(_scale),
            "scaled",
            "it divides lora_alpha by r for every module, whatever use_rslora, rank_pattern and "
            "alpha_pattern say",
            ratio(_scale),
        ),
    ),
    Finding(
        id="sglang.left-out",
        title="Everything but A and B is left out",
        severity="silent",
        seen=SEEN,
        code="sglang/srt/lora/lora.py:164 LoRAAdapter._process_weight",
        cause=(
            "LoRAAdapter (srt/lora/lora.py) takes the factors A and B alone: modules_to_save, "
            "trained biases and the bias of B are left out without a word"
        ),
        fix=(
            "Refuse modules_to_save, trained biases and the bias of B as long as they are not "
            "supported"
        ),
        right=ALL_TENSORS_COUNT,
        consequence="""
            Heads, norms and biases that were trained are the base's. Merge such an adapter.
            """,
        found_by=(
            "sglang",
            "inference.deltas.lora-bias",
            "inference.deltas.bias",
            "inference.deltas.modules-to-save",
        ),
        stored=Stored(
            parts("lora_bias", "weight", "bias", "tokens"),
            "dropped",
            "it takes A and B alone",
        ),
    ),
    Finding(
        id="sglang.names-fit-nothing",
        title="Tensors whose names have no layers.N in them are passed over",
        severity="silent",
        seen=SEEN,
        code="sglang/srt/lora/lora.py:164 LoRAAdapter._process_weight",
        cause=(
            "LoRAAdapter (srt/lora/lora.py) keeps a tensor whose name has a layer's number after "
            "layers., or is a table's, and has no else"
        ),
        fix="Raise for a name that is neither a layer's nor a table's",
        right=ALL_TENSORS_FIT,
        consequence="""
            An adapter with another architecture's names (`transformer.h.0`) is loaded without an
            error, and the base is served. Compare the names with those of the base.
            """,
        found_by=("sglang", "inference.deltas.names.other-model"),
    ),
    Finding(
        id="sglang.start",
        title="PiSSA's start stays in the base",
        severity="silent",
        seen=SEEN,
        code="sglang/srt/lora/lora_config.py:43 LoRAConfig.__init__",
        cause="LoRAConfig (srt/lora/lora_config.py) does not read init_lora_weights",
        does="""
            The factors that PiSSA, OLoRA, CorDA and LoftQ have trained belong to a base that their
            start was taken out of. SGLang adds them to the base as it is.
            """,
        fix=(
            "Read init_lora_weights, and refuse a start that lies in the base (pissa, olora, "
            "corda, loftq)"
        ),
        right=START_TAKEN_OUT,
        consequence="""
            The start acts twice, unless the served base is the residual. Convert the adapter, by
            `minilora convert` or by `path_initial_model_for_weight_conversion` of PEFT.
            """,
        not_asked="the adapters in the drawn files start by Kaiming's rule",
        stored=START_STAYS,
    ),
    Finding(
        id="sglang.refused",
        title="Only LoRA itself is loaded",
        severity="fails",
        seen=SEEN,
        code="sglang/srt/lora/lora_manager.py:349 LoRAManager.validate_new_adapter",
        cause=(
            "LoRAManager.validate_new_adapter (srt/lora/lora_manager.py) refuses use_dora, and "
            "LoRAAdapter (srt/lora/lora.py) every other peft_type than LORA"
        ),
        fix=(
            "Name the adapters that are loaded in the documentation; an error is right as long as"
            " others are not supported"
        ),
        right="""
            An error is right for what is not supported. Merge the adapter instead.
            """,
        not_asked="what a library refuses is skipped",
        source="SGLang 0.5.23, srt/lora/lora_manager.py, `validate_new_adapter`",
        stored=Stored(any_of(settings("use_dora"), other_type), "refused", "only LoRA is loaded"),
    ),
)

LIBRARY = Library(
    "sglang",
    "SGLang",
    "sglang",
    FINDINGS,
    release=SEEN,
    reads=("peft",),
    files="https://github.com/sgl-project/sglang/blob/v{release}/python/{file}#L{line}",
)
