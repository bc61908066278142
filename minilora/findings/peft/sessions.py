"""Adapters that are added, activated, swapped and deleted in a model of PEFT."""

from minilora.findings.conditions import settings
from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN

FINDINGS = (
    Finding(
        id="peft.trained-bias",
        title="A trained bias stays in the base",
        severity="silent",
        seen=SEEN,
        since="0.21.0",
        code="peft/tuners/tuners_utils.py:526 BaseTuner._mark_only_adapters_as_trainable",
        cause=(
            "bias='lora_only' and 'all' train the base's own bias: it acts from when it is "
            "there, also while disabled, of which the library warns, and only one adapter may"
            " have one"
        ),
        does="""
            `bias="all"` and `"lora_only"` train the base's own biases. A file's bias acts as soon
            as it is loaded, whichever adapter is active, and while all are disabled, of which [the
            library warns](https://github.com/huggingface/peft/pull/741); a second adapter with one
            is refused.
            """,
        fix=(
            "Keep the base's bias beside the adapter's (as modules_to_save does) and switch with "
            "the adapter"
        ),
        right="""
            Where each adapter has its own, loading changes no output and disabling gives the
            base's.
            """,
        consequence="""
            The base is gone once such an adapter is trained or loaded. `lora_bias=True` trains a
            bias that comes and goes with its adapter.
            """,
        found_by=("peft", "lifecycle.bias", "lifecycle.bias.scaled", "lifecycle.save.bias"),
        stored=Stored(
            settings("bias"),
            "use",
            "the trained biases replace the base's: they act while the adapter is disabled too",
        ),
    ),
    Finding(
        id="peft.merged-beside-active",
        title="Beside a merged adapter the other active ones do not act",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        cause=(
            "a layer that has merged any adapter computes the base layer alone "
            "(tuners/lora/layer.py)"
        ),
        code="peft/tuners/lora/layer.py:1085 Linear.forward",
        does="""
            Once a layer has merged an adapter, its forward is the merged weight's alone. The others
            are still reported as active; [PEFT
            3756](https://github.com/huggingface/peft/issues/3756).
            """,
        fix="Add the active adapters that are not merged to the base layer's output",
        right=r"""
            Merging changes no output: $(W + \Delta W_1) x + \Delta W_2 x$ is what it was before.
            """,
        consequence="""
            `merge_adapter` with a part of the active adapters switches off the rest. Merge all that
            are active, or none.
            """,
        not_asked="a session's `merge` merges all adapters that are active",
    ),
    Finding(
        id="peft.last-deleted",
        title="A model whose last adapter is deleted fails",
        severity="fails",
        seen=SEEN,
        since="0.19.1",
        code="peft/tuners/tuners_utils.py:589 BaseTuner.delete_adapter",
        cause="a model without adapters fails with a KeyError in its forward",
        does="""
            `delete_adapter` leaves the name of the deleted adapter as the active one, and the
            model's forward looks up its configuration; the layers themselves are the base's again.
            """,
        fix="Answer as the base where no adapter is left, in PeftModel.forward too",
        right="""
            Without adapters a model is its base.
            """,
        consequence="""
            A server that unloads its last adapter stops answering. Disable adapters first, or use
            `unload`.
            """,
        found_by=("peft", "lifecycle.modules-to-save.delete", "lifecycle.random-steps"),
    ),
    Finding(
        id="peft.deleted-activates",
        title="Another adapter acts for a deleted one",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/tuners/tuners_utils.py:2118 BaseTunerLayer.delete_adapter",
        cause=(
            "deleting the active adapter (tuners/lora/model.py, delete_adapter) activates "
            "another one, whose module to save acts from when the next adapter is added, also"
            " while adapters are disabled"
        ),
        does="""
            Deleting the only active adapter activates the first of those that are left, with a
            warning.
            """,
        fix=(
            "Leave no adapter active where the active one is deleted, or ask for the next one by "
            "name"
        ),
        right="""
            That is a choice: minilora's `AdaptedLayer` has none act in the stead of one that is
            gone, since nobody asked for it.
            """,
        consequence="""
            The function after a deletion depends on the order in which adapters were added.
            """,
        found_by=("peft", "lifecycle.random-steps"),
    ),
    Finding(
        id="peft.added-drops",
        title="An adapter that is added in evaluation drops",
        severity="silent",
        seen=SEEN,
        code="peft/tuners/lora/layer.py:219 LoraLayer.update_layer",
        cause=(
            "update_layer (tuners/lora/layer.py) makes the dropout of a new adapter in training "
            "mode, and add_adapter leaves it so in a model that is in evaluation"
        ),
        does="""
            After `model.eval()`, `add_adapter`, and `load_adapter` with `is_trainable=True`, add an
            adapter whose dropout is in training mode, while `model.training` is False: two forwards
            of one input differ.
            """,
        fix="Put what update_layer makes into the mode of the layer: self.train(self.training)",
        right="""
            What is added to a module takes part in its mode: dropout is the identity in evaluation.
            """,
        consequence="""
            Evaluation is random until the next `eval()`. Call `model.eval()` after an adapter is
            added.
            """,
        found_by=("peft", "lifecycle.dropout.added"),
    ),
    Finding(
        id="peft.hotswap-similar",
        title="Hot-swapping an adapter empties others whose names contain its own",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/utils/hotswap.py:472 hotswap_adapter_from_state_dict",
        cause=(
            "hot-swapping (utils/hotswap.py) fills with 0 every adapter whose name contains "
            "the name of the replaced one"
        ),
        does="""
            `hotswap_adapter_from_state_dict` fills with 0 whatever tensor has the adapter's name
            somewhere in its own and no new value: those of `two` too, where `tw` is swapped.
            """,
        fix="Compare the adapter's name with whole parts of the tensor's name",
        right="""
            Another adapter stays as it is.
            """,
        consequence="""
            With the adapters `v1` and `v10`, swapping `v1` makes `v10` the base, without a word.
            Give no adapter a name that contains another's.
            """,
        found_by=("peft", "lifecycle.replace-similar"),
    ),
    Finding(
        id="peft.hotswap-scale",
        title="A hot-swapped adapter is scaled and saved by the numbers of the one before",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/utils/hotswap.py:521 hotswap_adapter_from_state_dict",
        cause=(
            "hot-swapping (utils/hotswap.py) sets the layers' scaling, and neither their r "
            "and lora_alpha nor the configuration: a scale that is set later and a file that "
            "is saved later have those of the replaced adapter"
        ),
        does="""
            Hot-swapping sets the layers' `scaling`. Their `r` and `lora_alpha`, which `set_scale`
            takes, and the configuration, which is saved, stay those of the adapter that was
            replaced.
            """,
        fix="Set the layers' r and lora_alpha and the model's peft_config with the scaling",
        right="""
            The scale of an adapter is its own alpha over its own rank.
            """,
        consequence="""
            A scale that is set after a swap, and a file that is saved after it, are off by the
            ratio of both scales; where the ranks differ, the file cannot be loaded. Load the
            adapter anew before you save or scale it.
            """,
        found_by=("peft", "lifecycle.replace-scaled", "lifecycle.replace.save"),
    ),
    Finding(
        id="peft.unknown-adapter",
        title="An unknown adapter is passed over where several are activated",
        severity="silent",
        seen=SEEN,
        since="0.19.1",
        code="peft/tuners/tuners_utils.py:2615 set_adapter",
        cause=(
            "LoraModel.set_adapter (tuners/tuners_utils.py), which takes several names, "
            "passes over those that it lacks, without a word: the others act, or the base "
            "alone"
        ),
        does="""
            `PeftModel.set_adapter` takes one name and refuses one that it does not know.
            `set_adapter` of the model below, which takes several, passes over what its layers lack.
            """,
        fix="Refuse a name that no layer has, as PeftModel.set_adapter does for one name",
        right="""
            A name that there is not is an error.
            """,
        consequence="""
            A misspelt name makes the others act, or the base alone, without a word.
            """,
        found_by=("peft", "lifecycle.unknown"),
    ),
    Finding(
        id="peft.hotswap-embedding",
        title="The adapter of an embedding cannot be hot-swapped",
        severity="fails",
        seen=SEEN,
        since="0.15.2",
        code="peft/utils/hotswap.py:501 hotswap_adapter_from_state_dict",
        cause=(
            "hot-swapping (utils/hotswap.py) takes the last three words off the name of a "
            "tensor to find its layer; the name of an embedding's has no .weight, and the "
            "AttributeError is that of the layer above"
        ),
        does="""
            The layer of a tensor is found by taking the last three words off its name. The factors
            of an embedding are no modules, and their names have no `.weight`: the layer above is
            found instead.
            """,
        fix="Take lora_embedding_A and lora_embedding_B by their own names, which have no .weight",
        right="""
            An embedding's adapter is replaced as a linear layer's is.
            """,
        consequence="""
            An AttributeError, from which nothing is lost but the cause.
            """,
        found_by=("peft", "lifecycle.replace.embedding"),
    ),
)
