"""The steps of a session's checks: the law that each list shows, and what is done one by one."""

from __future__ import annotations

from minilora.verify.checks.session_inputs import KINDS, SPECIAL_KINDS
from minilora.verify.checks.session_run import Step

SUFFIXES = {kind: kind for kind in KINDS} | {"full": "modules-to-save"}
"""The suffix of a check's id for each kind."""

START: tuple[Step, ...] = (("add", "one"), ("add", "two"), ("activate", ["one"]))

SCRIPTS: dict[str, tuple[str, tuple[Step, ...]]] = {
    "add": (
        "Adding an adapter changes no output; activating it does.",
        (("add", "one"), ("activate", ["one"]), ("add", "two"), ("activate", ["two"])),
    ),
    "several": (
        "Several active adapters add up, in any order; with none active, the base applies.",
        (*START, ("activate", ["one", "two"]), ("activate", ["two", "one"]), ("activate", [])),
    ),
    "disable": (
        "While disabled, only the base applies, merged or not; activating ends it.",
        (*START, ("disable",), ("activate", ["one"]), ("merge",), ("disable",),
         ("activate", ["one"])),
    ),
    "scale": (
        "Setting an adapter's scale replaces the factor that was set before.",
        (*START, ("scale", "one", 2.0), ("scale", "one", 2.0), ("scale", "one", 0.5),
         ("scale", "one", -1.0), ("scale", "one", 0.0), ("scale", "two", 4.0),
         ("activate", ["two"]), ("scale", "one", 2.0), ("activate", ["one"]), ("merge",),
         ("unmerge",), ("activate", ["two", "one"])),
    ),
    "merge-twice": (
        "A second merge or a second unmerge changes nothing.",
        (*START, ("merge",), ("merge",), ("unmerge",), ("unmerge",)),
    ),
    "merge-several": (
        "Merging merges all active adapters and no other.",
        (*START, ("activate", ["two"]), ("merge",), ("unmerge",), ("activate", ["one", "two"]),
         ("merge",), ("unmerge",)),
    ),
    "scale-while-merged": (
        "A scale set while merged takes effect, and unmerging removes it.",
        (*START, ("merge",), ("scale", "one", 2.0), ("unmerge",), ("activate", ["two"])),
    ),
    "delete": (
        "A deleted adapter no longer applies, even if it was active.",
        (*START, ("add", "onetwo"), ("activate", ["one", "onetwo"]), ("delete", "one"),
         ("add", "one"), ("activate", ["one"]), ("activate", ["two"])),
    ),
    "delete-while-merged": (
        "Deleting a merged adapter removes its change from the weight.",
        (*START, ("merge",), ("delete", "one"), ("activate", ["two"])),
    ),
    "delete-inactive": (
        "Deleting another adapter changes nothing, merged or not.",
        (*START, ("add", "onetwo"), ("delete", "two"), ("merge",), ("delete", "onetwo"),
         ("unmerge",), ("merge",), ("add", "two"), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "delete-one-of-merged": (
        "Of several merged adapters, one is deleted and the others stay.",
        (*START, ("activate", ["one", "two"]), ("merge",), ("delete", "one"), ("unmerge",),
         ("add", "one"), ("activate", ["one", "two"]), ("merge",), ("activate", ["one"]),
         ("unmerge",)),
    ),
    "add-again": (
        "Under the name of a deleted adapter another one is another one.",
        (*START, ("activate", ["two"]), ("delete", "one"), ("add", "one", "-two"),
         ("activate", ["one"]), ("merge",), ("unmerge",), ("activate", ["two"]), ("delete", "one"),
         ("add", "one", "onetwo"), ("activate", ["one"]), ("merge",), ("activate", ["two"]),
         ("delete", "one"), ("add", "one", "-one"), ("scale", "one", 2.0), ("activate", ["one"]),
         ("merge",)),
    ),
    "many": (
        "More adapters than four keep apart.",
        (*START, ("add", "onetwo"), ("add", "four", "-one"), ("add", "five", "-two"),
         ("add", "six", "-onetwo"), ("add", "seven", "two"), ("scale", "seven", 2.0),
         ("activate", ["six"]), ("activate", ["five"]), ("merge",), ("unmerge",),
         ("activate", ["one"]), ("activate", ["seven", "five", "one", "onetwo", "six"]),
         ("delete", "five"), ("activate", ["seven"]), ("activate", ["four"]),
         ("activate", ["two"])),
    ),
    "activate-while-merged": (
        "Activating another adapter while one is merged applies the new one alone.",
        (*START, ("merge",), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "add-while-merged": (
        "Adding an adapter while another is merged changes no output.",
        (*START, ("merge",), ("add", "onetwo"), ("unmerge",), ("activate", ["onetwo"])),
    ),
    "train-eval": (
        "Without dropout, train and eval mode give the same output, merged or not.",
        (*START, ("train",), ("eval",), ("train",), ("merge",), ("eval",), ("train",), ("eval",),
         ("unmerge",)),
    ),
}  # fmt: skip
"""Steps of a linear layer, a check each: its law and its steps."""


ONE_ADAPTER: tuple[Step, ...] = (
    ("add", "one"), ("activate", ["one"]), ("merge",), ("merge",), ("unmerge",), ("unmerge",),
    ("train",), ("eval",), ("merge",), ("eval",), ("train",), ("eval",),
)  # fmt: skip
"""Steps of a layer that never has another adapter."""

EXCLUSIVE_STEPS: tuple[Step, ...] = (
    ("add", "one"), ("add", "onetwo"), ("activate", ["one"]), ("activate", ["onetwo"]),
    ("activate", ["one", "onetwo"]), ("disable",), ("activate", ["one"]), ("merge",), ("unmerge",),
    ("add", "two"), ("activate", ["two"]), ("activate", []),
)  # fmt: skip
SAVED: tuple[Step, ...] = (
    *START, ("save", "one"), ("save", "two"), ("anew",), ("load", "two", "two"),
    ("load", "one", "one"), ("activate", ["one"]), ("activate", ["two"]),
)  # fmt: skip


def _tied(name: str) -> tuple[Step, ...]:
    return (("add", name), ("activate", [name]), ("merge",), ("unmerge",), ("merge",), ("disable",),
            ("activate", [name]))  # fmt: skip


SPECIAL_SCRIPTS: dict[str, tuple[str, str, tuple[Step, ...]]] = {
    "single-adapter": (
        "linear",
        "One adapter is added, activated, merged and unmerged.",
        ONE_ADAPTER,
    ),
    **{
        f"single-adapter.{kind}": (
            kind,
            f"One adapter is added, activated, merged and unmerged{KINDS[kind]}.",
            ONE_ADAPTER,
        )
        for kind in ("conv1d", "embedding", "fused")
    },
    "tied.embedding": (
        "tied",
        "Merging an adapter of the embedding leaves the tied head unchanged.",
        _tied("one"),
    ),
    "tied.head": (
        "tied",
        "Merging an adapter of the tied head leaves the embedding unchanged.",
        _tied("two"),
    ),
    "tied.both": (
        "tied",
        "One adapter of both uses of a tied table applies once to each.",
        _tied("onetwo"),
    ),
    "bias": (
        "bias",
        "A trained bias applies while its adapter is active, and only then.",
        EXCLUSIVE_STEPS,
    ),
    "bias.scaled": (
        "bias",
        "Scaling an adapter scales its change, and not its trained bias.",
        (("add", "one"), ("activate", ["one"]), ("scale", "one", 2.0), ("scale", "one", 0.5)),
    ),
    "modules-to-save": (
        "full",
        "A module of modules_to_save applies while its adapter is active, and only then.",
        EXCLUSIVE_STEPS,
    ),
    "modules-to-save.delete": (
        "full",
        "Deleting an adapter removes its modules_to_save.",
        (*START, ("delete", "two"), ("delete", "one"), ("add", "two"), ("activate", ["two"])),
    ),
    "modules-to-save.scaled": (
        "full",
        "Scaling an adapter scales its change, and not its modules_to_save.",
        (("add", "one"), ("activate", ["one"]), ("scale", "one", 2.0), ("scale", "one", 0.5)),
    ),
    "lora-bias": (
        "lora-bias",
        "A bias of B is merged and unmerged with its adapter.",
        (*START, ("merge",), ("unmerge",), ("scale", "one", 2.0), ("merge",), ("unmerge",),
         ("activate", ["two", "one"]), ("merge",), ("disable",), ("activate", ["two"]),
         ("merge",), ("delete", "two"), ("activate", ["one"])),
    ),
    "dora": (
        "dora",
        "DoRA beside LoRA: each with its own options, summed, and merged one at a time.",
        (*START, ("activate", ["two"]), ("merge",), ("unmerge",), ("add", "onetwo"),
         ("activate", ["onetwo"]), ("merge",), ("unmerge",)),
    ),
    "dora.several": (
        "dora",
        "DoRA rescales the base and not another adapter's change, in any order, merged or not.",
        (*START, ("activate", ["one", "two"]), ("merge",), ("unmerge",),
         ("activate", ["two", "one"]), ("merge",), ("unmerge",)),
    ),
    "save": ("linear", "A saved adapter is the same in another session.", SAVED),
    **{
        f"save.{SUFFIXES[kind]}": (
            kind,
            f"A saved adapter is the same in another session{KINDS[kind]}.",
            SAVED,
        )
        for kind in SPECIAL_KINDS
    },
    "save.tied.both": (
        "tied",
        "A saved adapter of both uses of a tied table is the same in another session.",
        (("add", "onetwo"), ("activate", ["onetwo"]), ("save", "onetwo"), ("anew",),
         ("load", "onetwo", "onetwo"), ("activate", ["onetwo"])),
    ),
    "save-while-merged": (
        "linear",
        "Saving while merged saves the adapter itself.",
        (*START, ("merge",), ("save", "one"), ("save", "two"), ("unmerge",), ("anew",),
         ("load", "one", "one"), ("activate", ["one"]), ("load", "two", "two"),
         ("activate", ["two"])),
    ),
    "save-scaled": (
        "linear",
        "Saving a scaled adapter saves it as it was added.",
        (*START, ("scale", "one", 2.0), ("save", "one"), ("load", "onetwo", "one"),
         ("activate", ["onetwo"]), ("activate", ["one"]), ("anew",), ("load", "one", "one"),
         ("activate", ["one"])),
    ),
    "save-then-scale": (
        "linear",
        "A scale that is set after saving is the session's, and not the file's.",
        (*START, ("save", "one"), ("scale", "one", 2.0), ("load", "onetwo", "one"),
         ("activate", ["onetwo"]), ("activate", ["one"]), ("scale", "onetwo", 0.5), ("anew",),
         ("load", "one", "one"), ("activate", ["one"]), ("scale", "one", 2.0)),
    ),
    "load-after-delete": (
        "linear",
        "A loaded adapter is inactive, even if one of its name was active when it was deleted.",
        (*START, ("save", "one"), ("activate", ["one", "two"]), ("delete", "one"),
         ("load", "one", "one"), ("activate", ["one"])),
    ),
    "load-while-merged": (
        "linear",
        "Loading an adapter while another is merged changes no output.",
        (*START, ("save", "two"), ("delete", "two"), ("merge",), ("load", "onetwo", "two"),
         ("unmerge",), ("activate", ["onetwo"])),
    ),
    "load-while-merged.modules-to-save": (
        "full",
        "Loading an adapter with modules_to_save while another is merged changes no output.",
        (*START, ("save", "two"), ("delete", "two"), ("merge",), ("load", "two", "two"),
         ("unmerge",), ("activate", ["two"]), ("activate", [])),
    ),
}  # fmt: skip
"""Steps of special kinds, and of what not every session can do: kind, law and steps."""

STEPPED: tuple[Step, ...] = (*START, ("step",), ("activate", ["two"]), ("activate", ["one"]))
STEPPED_DORA: tuple[Step, ...] = (
    *START, ("activate", ["two"]), ("step",), ("merge",), ("unmerge",), ("activate", ["one"]),
    ("step",), ("activate", ["two"]),
)  # fmt: skip
REPLACED: tuple[Step, ...] = (
    *START, ("replace", "one", "onetwo"), ("merge",), ("unmerge",), ("activate", ["two"]),
    ("replace", "one", "-one"), ("activate", ["one"]), ("activate", ["two"]),
    ("replace", "two", "onetwo"), ("merge",), ("unmerge",),
)  # fmt: skip

TRAINED_SCRIPTS: dict[str, tuple[str, str, tuple[Step, ...]]] = {
    "step": (
        "linear",
        "A step of training changes the active adapter, and nothing else.",
        (*START, ("step",), ("activate", ["two"]), ("activate", ["one"]), ("step",), ("disable",),
         ("activate", ["two"])),
    ),
    "combine": (
        "linear",
        "A combined adapter is the sum of others, which stay as they are, saved or not.",
        (*START, ("combine", "four", ["one", "two"], [2.0, -0.5]), ("activate", ["four"]),
         ("activate", ["two"]), ("activate", ["one"]), ("step",), ("save", "one"),
         ("save", "four"), ("activate", ["two"]), ("delete", "one"), ("activate", ["four"]),
         ("merge",), ("unmerge",), ("anew",), ("load", "one", "one"), ("activate", ["one"]),
         ("load", "four", "four"), ("activate", ["four"])),
    ),
    "combine-scaled": (
        "linear",
        "Adapters are combined as they act, with their factors; that of the sum is 1.",
        (*START, ("scale", "one", 2.0), ("scale", "two", -0.5),
         ("combine", "four", ["one", "two"], [0.5, 4.0]), ("activate", ["four"]),
         ("activate", ["one"]), ("activate", ["two"]), ("scale", "one", 1.0), ("scale", "two", 1.0),
         ("activate", ["four"]), ("scale", "four", 2.0)),
    ),
    "step-several": (
        "linear",
        "A step of training changes all active adapters.",
        (*START, ("activate", ["two", "one"]), ("step",), ("activate", ["one"]),
         ("activate", ["two"])),
    ),
    "step-scaled": (
        "linear",
        "The gradients of a scaled adapter have its factor.",
        (*START, ("scale", "one", 0.5), ("step",), ("scale", "one", 1.0)),
    ),
    "step-between-merges": (
        "linear",
        "An adapter is merged, trained on after unmerging, and merged again.",
        (*START, ("merge",), ("unmerge",), ("step",), ("merge",), ("unmerge",), ("step",),
         ("merge",), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "step-while-merged": (
        "linear",
        "An adapter is trained beside a merged one, which unmerging takes out as it was.",
        (*START, ("merge",), ("activate", ["one", "two"]), ("step",), ("unmerge",),
         ("activate", ["one"]), ("activate", ["two"]), ("activate", [])),
    ),
    "step.save": (
        "linear",
        "A trained adapter is saved as it is by then, and trained on.",
        (*START, ("step",), ("save", "one"), ("step",), ("load", "onetwo", "one"),
         ("activate", ["onetwo"]), ("activate", ["one"]), ("anew",), ("load", "one", "one"),
         ("activate", ["one"])),
    ),
    "step-after-load": (
        "linear",
        "A loaded adapter is trained as one that was added.",
        (*START, ("save", "one"), ("load", "onetwo", "one"), ("activate", ["onetwo"]), ("step",),
         ("activate", ["one"]), ("anew",), ("load", "one", "one"), ("activate", ["one"]),
         ("step",)),
    ),
    "replace": (
        "linear",
        "An active adapter is replaced by one of another rank and scale, and stays active.",
        (*START, ("replace", "one", "onetwo"), ("replace", "one", "-two"),
         ("activate", ["two", "one"]), ("activate", ["two"]), ("replace", "two", "-two"),
         ("activate", ["one"]), ("step",)),
    ),
    "replace-inactive": (
        "linear",
        "An inactive adapter is replaced and stays inactive.",
        (*START, ("replace", "two", "onetwo"), ("merge",), ("unmerge",), ("activate", ["two"]),
         ("merge",), ("unmerge",)),
    ),
    "replace-similar": (
        "linear",
        "Replacing an adapter leaves those whose names contain its own.",
        (*START, ("add", "onetwo"), ("replace", "one", "two"), ("replace", "two", "-one"),
         ("activate", ["onetwo"]), ("activate", ["two"]), ("activate", ["one"])),
    ),
    "replace-scaled": (
        "linear",
        "An adapter that takes another's place has its own scale.",
        (*START, ("scale", "one", 2.0), ("replace", "one", "onetwo"), ("scale", "one", 0.5),
         ("replace", "one", "two"), ("scale", "one", 0.5)),
    ),
    "replace-while-merged": (
        "linear",
        "Replacing a merged adapter takes out what was added.",
        (*START, ("merge",), ("replace", "one", "onetwo"), ("unmerge",), ("activate", ["two"]),
         ("activate", ["one"])),
    ),
    "replace.save": (
        "linear",
        "What replaced an adapter is saved, with its rank and its scale.",
        (*START, ("replace", "one", "onetwo"), ("save", "one"), ("replace", "two", "-one"),
         ("save", "two"), ("anew",), ("load", "one", "one"), ("activate", ["one"]),
         ("load", "two", "two"), ("activate", ["two"])),
    ),
    **{
        f"step.{SUFFIXES[kind]}": (
            kind,
            f"A step of training changes the active adapter, and nothing else{KINDS[kind]}.",
            STEPPED_DORA if kind == "dora" else STEPPED,
        )
        for kind in KINDS
        if kind != "linear"
    },
    **{
        f"replace.{SUFFIXES[kind]}": (
            kind,
            f"An adapter is replaced by another one{KINDS[kind]}.",
            REPLACED,
        )
        for kind in KINDS
        if kind != "linear"
    },
}  # fmt: skip
"""Steps of training, and of adapters that take the place of others: kind, law and steps."""

WITH_GRADIENTS = ("delete-inactive", "step-after-load")
"""The scripts after each of whose steps the gradients are compared too."""

UNKNOWN: tuple[Step, ...] = (
    ("activate", ["three"]), ("activate", ["one", "three"]), ("activate", ["onetwo"]),
    ("activate", ["on"]), ("activate", ["One"]), ("activate", [""]), ("scale", "three", 2.0),
    ("delete", "three"), ("save", "three"), ("replace", "three", "two"), ("rows", ["one", "three"]),
)  # fmt: skip
"""Steps that name an adapter which there is not, beside "one" and "two"."""

ROWS_BETWEEN: tuple[Step, ...] = (
    ("activate", ["two"]), ("activate", ["one", "two"]), ("delete", "onetwo"),
    ("scale", "one", 2.0), ("activate", ["one"]),
)  # fmt: skip
"""Steps between the batches in which each row names its adapter."""
