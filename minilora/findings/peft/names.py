"""Which modules PEFT adapts or saves for a name."""

from minilora.findings.finding import Finding, Stored
from minilora.findings.peft.release import SEEN
from minilora.findings.stored import StoredAdapter


def _nested(adapter: StoredAdapter) -> list[str]:
    """The saved modules that lie in another saved one."""
    saved = [m.name for m in adapter.modules if m.kind == "saved"]
    ends = tuple(adapter.config.get("modules_to_save") or ())
    outer = {name for name in saved for end in ends if name.endswith(end)}
    return [name for name in saved if any(name.startswith(f"{o}.") for o in outer - {name})]


FINDINGS = (
    Finding(
        id="peft.outermost-layers",
        title="Layers are counted by their experts where they are outermost",
        severity="silent",
        seen=SEEN,
        since="0.20.0",
        cause=(
            "the number is what follows any part of the name but its first (tuners/tuners_utils.py)"
        ),
        code="peft/tuners/tuners_utils.py:2391 check_target_module_exists",
        does="""
            `layers_to_transform` keeps the modules of some layers. Without `layers_pattern` the
            number is the first one that follows any part of the name but its first: in a bare
            model, whose names start with `layers.`, that of the expert. [PEFT
            3318](https://github.com/huggingface/peft/pull/3318) let the first number count, and
            [PEFT 3610](https://github.com/huggingface/peft/issues/3610) is the same of
            `layers_pattern`, where it is mended.
            """,
        fix="Take the first number after `layers`, wherever that stands in the name",
        right="""
            A module lies in the same layer, whatever the model lies in.
            """,
        consequence="""
            Other modules are adapted than were asked for, without a word; in a bare model without
            experts none is, which is an error. Give `layers_pattern="layers"`.
            """,
        not_asked="all names are drawn inside a tower, so that no layers are outermost",
    ),
    Finding(
        id="peft.all-linear-head",
        title="The head is adapted where another projection bears the end of its name",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause=(
            "the head is left out by name, and what is left is compared by the last words of "
            "names (tuners/tuners_utils.py)"
        ),
        code="peft/tuners/tuners_utils.py:2465 _maybe_include_all_linear_layers",
        does="""
            "all-linear" is resolved to the names of all projections but the output head. These then
            match as any list does: a whole name or its dotted end.
            """,
        fix=(
            "Compare modules, not the last words of their names: exclude the module that "
            "get_output_embeddings returns by its full name"
        ),
        right="""
            "all-linear" leaves the output head out.
            """,
        consequence="""
            It needs a projection outside all blocks with such a name. Name the head in
            `exclude_modules`, which comes first.
            """,
        not_asked="no projection is drawn whose name ends like that of the head",
    ),
    Finding(
        id="peft.saved-by-ending",
        title="What only ends like a module to save is trained in full",
        severity="silent",
        seen=SEEN,
        since="0.9.0",
        cause="a name is compared by endswith, with no dot before it (utils/other.py)",
        code="peft/utils/other.py:1088 _set_trainable",
        does="""
            `modules_to_save` is compared with the end of each name, with no dot before it, where a
            target is compared with a dotted end. In [PEFT
            1917](https://github.com/huggingface/peft/issues/1917) it met a user.
            """,
        fix='Compare name == key or name.endswith("." + key), as for target_modules',
        right="""
            A name in a list means one thing: the module of that name or of that dotted end.
            """,
        consequence="""
            Another module is trained and saved as a whole, without a word; if it is adapted, PEFT
            stops with an error. Give whole names. [`is_saved`](spec/target_modules.md#is_saved)
            says what is hit.
            """,
        not_asked="no name is drawn that ends like a module to save without a dot before it",
    ),
    Finding(
        id="peft.saved-inside-saved",
        title="A module to save inside another is not trained, nor is the other",
        severity="silent",
        seen=SEEN,
        since="0.16.0",
        cause=(
            "the copy that is made of the outer module is wrapped once more for the inner one"
            " (utils/other.py)"
        ),
        code="peft/utils/other.py:653 ModulesToSaveWrapper.update",
        does="""
            `modules_to_save` is gone through module by module. One that lies in another is wrapped
            in the copy that the other's wrapper has made, which freezes that copy: what the model
            computes with is trained by nobody, and the file cannot be loaded. It takes no more than
            a name whose end fits both, such as `embeddings` of a BERT.
            """,
        fix="Skip names inside a module that is already wrapped, as the outer copy trains them",
        right="""
            What is named is trained, once.
            """,
        consequence="""
            Name the outer module alone, in full. minilora refuses to read such an adapter.
            """,
        not_asked="no module to save is drawn inside another",
        stored=Stored(
            _nested,
            "other",
            "of these modules one lies in another that is saved: what acts was not trained",
        ),
    ),
)
