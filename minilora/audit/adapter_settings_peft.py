"""The settings of PEFT's folders against their tensors: what one says and the other lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from minilora.audit.result import Entry
from minilora.audit.stored.module import OpenAdapter
from minilora.audit.stored.peft import COPY
from minilora.io.errors import listed
from minilora.io.formats.peft.names import PREFIX, PROJECTIONS
from minilora.io.formats.peft.settings import KINDS
from minilora.io.formats.peft.starts import INIT_FROM_BASE
from minilora.spec.target_modules import is_target, with_parents

HEADS = ("classifier", "score")
"""What PEFT adds to modules_to_save of a classifier, whatever of it there is."""


Check = Callable[[OpenAdapter], Iterator[Entry]]


def _ranks(adapter: OpenAdapter) -> Iterator[Entry]:
    """The rank of each module is the settings'."""
    for module in adapter.adapted:
        told = module.config.get("r")
        if adapter.settings.get("peft_type", "LORA") == "LORA" and module.rank != told:
            text = f"A has rank {module.rank}, and the settings say {told}: PEFT refuses to load it"
            yield Entry(module.name, "wrong", text, {"module": module.name}, "rank")


def _patterns(adapter: OpenAdapter) -> Iterator[Entry]:
    """Each pattern fits a module, and no module two with other values."""
    if adapter.settings.get("peft_type", "LORA") != "LORA":
        return
    names = [module.name for module in adapter.modules if {"A", "B"} & module.parts.keys()]
    for setting in ("rank_pattern", "alpha_pattern"):
        patterns: Mapping[str, Any] = adapter.settings.get(setting) or {}
        fitting = {p: [n for n in names if re.match(rf"(.*\.)?({p})$", n)] for p in patterns}
        for pattern, of in fitting.items():
            if not of:
                text = f"{pattern!r} of {setting} fits no module that has an adapter"
                yield Entry(setting, "doubtful", text, mistake="pattern-fits-nothing")
        twice = [n for n in names if len({patterns[p] for p in patterns if n in fitting[p]}) > 1]
        if twice:
            text = (
                f"several patterns of {setting} fit {listed(twice)}: the first in the file counts"
            )
            yield Entry(setting, "doubtful", text, {"modules": len(twice)}, "pattern-fits-two")


def _targets(adapter: OpenAdapter) -> Iterator[Entry]:
    """The settings select the modules that have tensors, and each target has a module."""
    wanted = adapter.settings.get("target_modules")
    names = [m.name for m in adapter.modules if {"A", "B"} & m.parts.keys() and m.kind != "shared"]
    if wanted is None or str(wanted).lower() == "all-linear" or not names:
        return
    try:
        missed = _not_selected(adapter.settings, names)
    except (re.error, RecursionError) as error:
        text = f"target_modules is no regular expression: {error}"
        yield Entry("target_modules", "wrong", text, mistake="targets")
        return
    if missed:
        text = f"target_modules does not select {listed(missed)}: a library that builds its layers "
        text += "by the settings passes over these tensors"
        yield Entry("target_modules", "wrong", text, {"modules": len(missed)}, "not-targeted")
    unused = [] if isinstance(wanted, str) else [w for w in wanted if not _hits(w, names)]
    if unused:
        text = f"{listed(unused)} of target_modules fit no module that has tensors"
        yield Entry("target_modules", "doubtful", text, mistake="target-fits-nothing")


def _not_selected(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the modules that the settings do not select; what is tied comes unasked."""
    if settings.get("target_parameters"):
        return []
    others = ("exclude_modules", "layers_to_transform", "layers_pattern")
    beside = {key: settings.get(key) or () for key in others}
    tied = settings.get("ensure_weight_tying")
    return [
        name
        for name in names
        if not is_target(name.replace(".base_layer", ""), settings["target_modules"], **beside)
        and not (tied and _may_be_tied(name))
    ]


def _hits(target: str, names: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _may_be_tied(name: str) -> bool:
    return name.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte")


def _saved(adapter: OpenAdapter) -> Iterator[Entry]:
    """What modules_to_save names has tensors."""
    wanted = list(dict.fromkeys(adapter.settings.get("modules_to_save") or ()))
    saved = [m.name for m in adapter.modules if m.kind == "saved"]
    tables = [m.name for m in adapter.modules if "base weight" in m.parts]
    reached = {*saved, *tables}
    of_a_head = any(_ends(name, HEADS) for name in reached)
    for name in wanted:
        if not any(_ends(at, (name,)) for at in reached) and not (name in HEADS and of_a_head):
            text = f"modules_to_save names {name}, and the file has no tensor of it: it is the "
            text += "base's, or as it is drawn anew"
            yield Entry("modules_to_save", "wrong", text, mistake="saved-missing")


def _named(adapter: OpenAdapter) -> Iterator[Entry]:
    """What is saved is named."""
    wanted = tuple(adapter.settings.get("modules_to_save") or ())
    bias = adapter.settings.get("bias", "none")
    for module in adapter.modules:
        tied = bool(adapter.settings.get("ensure_weight_tying")) and _may_be_tied(module.name)
        named = tied or _ends(module.name, wanted)
        has_bias = "bias" in module.parts and "weight" not in module.parts
        if has_bias and not named and bias in (None, "none"):
            text = f"the file has its bias, and the setting bias is {json.dumps(bias)}"
            yield Entry(module.name, "wrong", text, {"module": module.name}, "bias-untold")
        elif "weight" in module.parts and not named:
            text = "it is saved in full, and modules_to_save does not name it"
            yield Entry(module.name, "wrong", text, {"module": module.name}, "saved-untold")


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(parent.endswith(ends) for parent in with_parents(name)) if ends else False


def _variants(adapter: OpenAdapter) -> Iterator[Entry]:
    """The tensors of a variant are there if the settings turn it on, and only then."""
    kind = str(adapter.settings.get("peft_type") or "LORA").upper()
    told = {
        "magnitude": ("use_dora", bool(adapter.settings.get("use_dora"))),
        "lora_bias": ("lora_bias", bool(adapter.settings.get("lora_bias"))),
        "E": ("peft_type ADALORA", kind == "ADALORA"),
        "lambda_b": ("peft_type VERA", kind == "VERA"),
    }
    for part, (setting, on) in told.items():
        having = [m.name for m in adapter.modules if part in m.parts]
        lacking = [m.name for m in adapter.adapted if part not in m.parts]
        if on and lacking:
            text = f"{setting} is set, and {listed(lacking)} have no {part}"
            yield Entry(setting, "wrong", text, {"modules": len(lacking)}, "variant")
        if having and not on:
            text = f"the file has {part} of {len(having)} modules, and {setting} is not set"
            yield Entry(setting, "wrong", text, {"modules": len(having)}, "variant")
    projects = kind == "VERA" and adapter.settings.get("save_projection", True)
    if projects and "base_model" not in adapter.by_name:
        text = f"save_projection is set, and the file has no {listed(PROJECTIONS.values())}"
        yield Entry("save_projection", "wrong", text, mistake="variant")


def _names(adapter: OpenAdapter) -> Iterator[Entry]:
    """The tensors have the names that PEFT looks for."""
    names = [held.name for module in adapter.modules for held in module.parts.values()]
    bare = [n for n in names if not n.startswith("base_model.")]
    if bare:
        text = f"{len(bare)} names, as {bare[0]}, do not begin with {PREFIX}: PEFT looks for that, "
        text += "and passes over the others"
        yield Entry("names", "wrong", text, {"tensors": len(bare)}, "prefix")
    marked = [n for n in names if _has_adapter_name(n)]
    if marked:
        text = f"{len(marked)} names, as {marked[0]}, hold an adapter's name: PEFT leaves it out, "
        text += "and does not find them"
        yield Entry("names", "wrong", text, {"tensors": len(marked)}, "adapter-name")


_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module")
"""Parts of names in modules that DataParallel, torch.compile, FSDP or DeepSpeed has wrapped."""


def _wrapped(adapter: OpenAdapter) -> Iterator[Entry]:
    """No name has a part that a wrapper put in."""
    names = [held.name for module in adapter.modules for held in module.parts.values()]
    for wrapper in _WRAPPERS:
        within = [n for n in names if f".{wrapper}." in f".{n}"]
        if within:
            text = (
                f"{len(within)} names, as {within[0]}, hold {wrapper!r}, as in a wrapped module: "
            )
            text += "PEFT finds no such module, and serves the base"
            yield Entry("names", "wrong", text, {"tensors": len(within)}, "wrapped")


def _has_adapter_name(name: str) -> bool:
    ends = r"lora_[AB]\.[^.]+\.(weight|bias)|lora_embedding_[AB]\.[^.]+"
    return bool(re.search(rf"\.({ends}|modules_to_save\.[^.]+\.(weight|bias))$", name))


def _told(adapter: OpenAdapter) -> Iterator[Entry]:
    """Settings that are not known, and those that say more than factors."""
    if not adapter.settings.get("peft_type"):
        text = 'there is none: PEFT and transformers refuse to load it; add "peft_type": "LORA"'
        yield Entry("peft_type", "wrong", text, mistake="no-peft-type")
    kind = KINDS.get(str(adapter.settings.get("peft_type") or "LORA").upper())
    if kind is None:
        text = f"peft_type is {adapter.settings.get('peft_type')}: its equation is not known here"
        yield Entry("peft_type", "undecided", text)
        return
    known = {*kind.read, *kind.fixed, *kind.inert.split(), "peft_type"}
    for key, value in adapter.settings.items():
        nothing = value in (None, False, [], {}, "")
        if key in kind.fixed and value not in kind.fixed[key] and key != "target_parameters":
            text = f"{key} is {json.dumps(value)}: the function is another one than is known here"
            yield Entry(key, "undecided", text)
        elif key not in known and not nothing and not key.startswith(("use_dora", "lora_bias")):
            text = f"{key} is {json.dumps(value)}: a setting that is not known here"
            yield Entry(key, "told", text, mistake="unknown-setting")
    init = adapter.settings.get("init_lora_weights")
    if isinstance(init, str) and init.startswith((*INIT_FROM_BASE, "corda", "loftq", "lora_ga")):
        text = f"it is {init}: A and B belong to a base that their start was taken out of. PEFT "
        text += "takes it out when it loads; others add to the base as it is"
        yield Entry("init_lora_weights", "doubtful", text, mistake="start")
    if adapter.settings.get("alora_invocation_tokens"):
        text = "the adapter acts after its invocation alone; merged, it acts on every token"
        yield Entry("alora_invocation_tokens", "told", text)


def _copies(adapter: OpenAdapter) -> Iterator[Entry]:
    """Copies of the base's weights beside the adapter."""
    copies = [m for m in adapter.modules if any(part.startswith("base ") for part in m.parts)]
    if copies:
        size = sum(h.nbytes for m in copies for p, h in m.parts.items() if p.startswith("base "))
        text = (
            f"it holds the base's weights of {listed(m.name for m in copies)} ({COPY.strip('.')}, "
        )
        text += f"{size} bytes), as PEFT saves them of adapted or resized tables"
        yield Entry("base weights", "told", text, mistake="copies")


CHECKS: tuple[Check, ...] = (
    _names,
    _wrapped,
    _ranks,
    _patterns,
    _targets,
    _saved,
    _named,
    _variants,
    _told,
    _copies,
)
