"""What PEFT saves and loads otherwise than it was trained."""

import re
from collections.abc import Sequence

from minilora.findings.conditions import not_in_base, settings
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.shared import FACTOR_AS_DRAWN, FUNCTION_OF_FILE
from minilora.findings.stored import StoredAdapter


def _ambiguous(adapter: StoredAdapter) -> list[str]:
    """The modules that several patterns fit, with other values."""
    concerned = []
    for module in adapter.adapted:
        for setting in ("rank_pattern", "alpha_pattern"):
            patterns = adapter.config.get(setting) or {}
            values = {v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module.name)}
            concerned += [module.name] if len(values) > 1 else []
    return list(dict.fromkeys(concerned))


def _approximate_start(adapter: StoredAdapter) -> list[str]:
    told = adapter.config.get("init_lora_weights")
    is_one = isinstance(told, str) and told.startswith("pissa_niter")
    return [f"init_lora_weights {told}"] if is_one else []


def _half_tied(adapter: StoredAdapter) -> list[str]:
    """The embedding of a GPT-2 whose head shares its factors, and has none in the file."""
    names = {m.name.rpartition(".")[2]: m.name for m in adapter.adapted}
    tied = adapter.config.get("ensure_weight_tying") and "lm_head" not in names
    return [names["wte"]] if tied and "wte" in names else []


def _replicated(adapter: StoredAdapter) -> Sequence[str]:
    reads_types = (adapter.base or {}).get("model_type") == "qwen2"
    return settings("layer_replication")(adapter) if reads_types else []


def _listed_again(adapter: StoredAdapter) -> list[str]:
    names = adapter.config.get("modules_to_save") or []
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"modules_to_save {name}" for name in twice]


FINDINGS = (
    Finding(
        id="peft.pattern-order",
        title="A loaded adapter may have another scale than the saved one",
        severity="silent",
        seen=SEEN,
        since="0.15.2",
        code="peft/config.py:163 PeftConfigMixin.save_pretrained",
        cause=(
            "get_pattern_key (utils/other.py) takes the first key that fits, and "
            "save_pretrained (config.py) writes the keys sorted"
        ),
        does="""
            `rank_pattern` and `alpha_pattern` map patterns to ranks and alphas, and the first
            pattern that fits a module counts. `save_pretrained` sorts their keys, so another one
            may come first when the adapter is loaded.
            """,
        fix=(
            "Write rank_pattern and alpha_pattern in the order that they have (json.dumps without"
            " sort_keys)"
        ),
        right=r"""
            What is saved and loaded is the same function, with the same $s = \alpha / r$.
            """,
        consequence="""
            The branch of an adapter is scaled otherwise after loading, without a word. Write
            patterns of which only one fits each module. `read_adapter` reads what PEFT loads.
            """,
        not_asked="no case saves patterns of which several fit one module",
        stored=Stored(
            _ambiguous,
            "may",
            "several keys of rank_pattern or alpha_pattern fit these modules, and the first in the "
            "file, whose keys are sorted, counts: the scale may be another one than in training",
        ),
    ),
    Finding(
        id="peft.heads-listed-again",
        title="A classifier's heads are listed again at each saving",
        severity="nuisance",
        seen=SEEN,
        since="0.11.1",
        cause="the constructor extends the list of the configuration itself (peft_model.py)",
        code="peft/peft_model.py:1836 PeftModelForSequenceClassification.__init__",
        does="""
            Of a model with `task_type="SEQ_CLS"` PEFT adds the heads that it knows to the list
            `modules_to_save`, of whatever is there: to the caller's own list, and to the one that
            it has saved.
            """,
        fix="Build a new list without repetitions instead of extending the configuration's own",
        right="""
            What was loaded and is saved again is the same.
            """,
        consequence="""
            The function stays the same; `adapter_config.json` grows with every round, and a
            configuration that is used for two models is not what its caller wrote. Give each model
            a list of its own.
            """,
        found_by=("peft", "files.save.modules-to-save"),
        stored=Stored(
            _listed_again, "use", "each round of loading and saving lists these heads once more"
        ),
    ),
    Finding(
        id="peft.pissa-niter",
        title="PiSSA by a few iterations is loaded as another function",
        severity="silent",
        seen=SEEN,
        since="0.11.1",
        cause="svd_lowrank starts from random vectors, at each load anew (tuners/lora/layer.py)",
        code="peft/tuners/lora/layer.py:446 LoraLayer.pissa_init",
        does="""
            With `init_lora_weights="pissa_niter_…"` the singular values are approximated from a
            random start. Loading takes the start out of the base again, and draws anew: the
            residual is another than the one that A and B were trained beside. Plain `"pissa"`
            computes the same residual each time.
            """,
        fix="Seed the random vectors of svd_lowrank, or store the start beside the adapter",
        right="""
            $W = R + s B A$, so that R is W less the very start of B and A.
            """,
        consequence="""
            What is loaded is not what was trained, the more so the closer the singular values are.
            Convert such an adapter where it was trained. minilora's reader refuses it.
            """,
        not_asked="no check saves after a start, and none starts PiSSA by iterations",
        stored=Stored(
            _approximate_start,
            "other",
            "it draws the start of the base anew, and takes out another one than in training",
        ),
    ),
    Finding(
        id="peft.pissa-converted",
        title="Converting PiSSA drops all but A and B",
        severity="silent",
        seen=SEEN,
        since="0.13.2",
        cause="only the names with lora_A and lora_B are taken over (tuners/lora/model.py)",
        code="peft/tuners/lora/model.py:1096 LoraModel.subtract_mutated_init",
        does="""
            `save_pretrained` with `path_initial_model_for_weight_conversion` writes the doubled A
            and B and nothing else: no magnitude of DoRA, no module that is saved in full, no
            adapter of an embedding.
            """,
        fix=(
            "Keep every tensor that is not lora_A or lora_B of a converted module in the state "
            "that is written"
        ),
        right="""
            $R + s B A = W + s (B A - B_0 A_0)$ is about the projection's A and B; everything else
            that was trained stays part of the function. DoRA's magnitude too: it rescales the rows
            of the same matrix.
            """,
        consequence="""
            The loaded adapter has an embedding without an adapter and magnitudes as they started,
            or fails for a module that is missing. minilora converts and keeps all of them.
            """,
        not_asked="no method converts an adapter",
    ),
    Finding(
        id="peft.gpt2-tied",
        title="A GPT-2 is loaded without the tied half of its adapter",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        cause=(
            "what may be tied is known by the names embed_tokens and lm_head alone "
            "(tuners/tuners_utils.py)"
        ),
        code="peft/tuners/tuners_utils.py:1436 BaseTuner._check_tied_modules",
        does="""
            `target_modules=["lm_head"]` with `ensure_weight_tying` adapts head and embedding, and
            is saved as an adapter of `transformer.wte`. On loading, only modules called
            `embed_tokens` or `lm_head` are known to be tied: the head's factors in the file are
            passed over.
            """,
        fix=(
            "Ask the model for its embeddings (get_input_embeddings, get_output_embeddings) "
            "instead of two names"
        ),
        right="""
            What is saved and loaded is the same function.
            """,
        consequence="""
            The logits are the base's head on adapted embeddings. A file that names both modules, as
            minilora writes it, is loaded whole; PEFT's own is refused here, as tensors would be
            left over.
            """,
        not_asked="no adapter of both uses of a table is asked of a model in a file",
        stored=Stored(
            _half_tied,
            "dropped",
            "the head, whose factors are the embedding's, is loaded without an adapter",
        ),
    ),
    Finding(
        id="peft.qwen2-replication",
        title="The layers of a Qwen2 cannot be replicated",
        severity="fails",
        seen=SEEN,
        since="0.14.0",
        cause=(
            "replicate_layers sets num_hidden_layers, and not layer_types (tuners/tuners_utils.py)"
        ),
        code="peft/tuners/tuners_utils.py:2588 replicate_layers",
        does="""
            `layer_replication` lengthens the model's list of layers, and not `layer_types` of its
            configuration, which Qwen2 reads by the layer's number.
            """,
        fix="Repeat config.layer_types by the same ranges where the configuration has them",
        right="""
            A copy of a layer is a layer of its kind.
            """,
        consequence="""
            None in numbers: the call fails. minilora refuses to write such an adapter.
            """,
        not_asked="no configuration replicates layers",
        stored=Stored(_replicated, "refused", "layer_replication of a Qwen2 fails"),
    ),
    Finding(
        id="peft.bias-shard-warning",
        title="A whole bias of B is taken for a shard",
        severity="nuisance",
        seen=SEEN,
        since="0.21.0",
        cause=(
            "every tensor whose name holds lora_B counts as a shard if it has one dimension, "
            "its bias too (utils/save_and_load.py)"
        ),
        code="peft/utils/save_and_load.py:78 _validate_lora_adapter_state_dict",
        does="""
            With `lora_bias=True`, saving warns that `lora_B.bias` has an invalid shape and that
            shards were not gathered: what is of one dimension counts as a shard, and a bias has one
            dimension.
            """,
        fix="Leave names that end in .bias out of the test for shards",
        right="""
            The bias is a vector of the layer's outputs; it is saved whole and comes back.
            """,
        consequence="""
            A false alarm at every save; where warnings are errors, no save.
            """,
        not_asked="it is a warning, and no number",
    ),
    Finding(
        id="peft.names-fit-nothing",
        title="The base is served where the names of an adapter fit nothing",
        severity="silent",
        seen=SEEN,
        since="0.14.0",
        code="peft/peft_model.py:1522 PeftModel.load_adapter",
        cause=(
            "load_adapter (peft_model.py) warns of tensors that are missing and says nothing "
            "of those left over: the base, or a part of the adapter, is served"
        ),
        does="""
            `PeftModel.from_pretrained` builds the adapter of `adapter_config.json`, fills in the
            tensors whose names fit, and leaves the others out: the factors B that it found nothing
            for stay 0. It warns of missing tensors; of tensors that are left over it says nothing.
            """,
        fix="Raise where no tensor of the file fits, and name those that are left over otherwise",
        right="""
            An adapter that does not fit is refused, or has its effect.
            """,
        consequence="""
            A checkpoint with other names (without the prefix, of another version of the model)
            answers as the base does, and one that fits in part as a mixture. Make the warning an
            error, and compare the names in the file with `get_peft_model_state_dict`.
            """,
        found_by=(
            "peft",
            "inference.names.prefix",
            "inference.names.adapter-name",
            "inference.names.misspelt",
            "inference.names.other-model",
            "inference.names.partial",
            "inference.deltas.names.prefix",
            "inference.deltas.names.misspelt",
            "inference.deltas.names.partial",
        ),
        stored=Stored(
            not_in_base,
            "dropped",
            "the base has no module of these names: their tensors are passed over without a word",
        ),
    ),
    Finding(
        id="peft.missing-factor",
        title="A missing factor A stays as it was drawn",
        severity="silent",
        seen=SEEN,
        code="peft/peft_model.py:627 PeftModel.from_pretrained",
        cause=(
            "from_pretrained (peft_model.py) warns of tensors that are missing, and goes on with "
            "what the adapter was initialized with: an A that is drawn"
        ),
        does="""
            `from_pretrained` warns that a key is missing and answers with the $A$ that Kaiming's
            rule drew beside the $B$ of the file; `load_adapter` does not warn.
            """,
        fix="Raise where a factor of a module that the file names is missing",
        right=FUNCTION_OF_FILE,
        consequence="""
            A file that was cut, or whose names fit in part, is another function in each process.
            Make the warning an error.
            """,
        found_by=("peft", "inference.names.missing-factor"),
        stored=FACTOR_AS_DRAWN,
    ),
)
