"""The modules that the settings of ``adapter_config.json`` select, and what they may not be."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.io.architectures import Architecture, architecture_of
from minilora.io.errors import FormatError, listed
from minilora.io.formats.peft.names import paths
from minilora.io.formats.peft.settings import variant_settings, variant_types
from minilora.io.formats.peft.starts import INIT_FROM_BASE
from minilora.io.formats.rules import Rule
from minilora.spec.lora import TABLES
from minilora.spec.models import Config
from minilora.spec.target_modules import (
    is_saved,
    is_target,
    matches,
    pattern_value,
    ties_head,
    with_parents,
)
from minilora.spec.variants import REGISTRY, extended

_TIED = ("embed_tokens", "lm_head")  # the bare names by which alone PEFT knows what may be tied


def variant_of(settings: Mapping[str, Any]) -> str:
    """The variant's name in `variants.REGISTRY`."""
    variant = variant_types().get(settings["peft_type"], "lora")
    return next((v for s, v in variant_settings().items() if settings.get(s)), variant)


@dataclass(frozen=True)
class Selected:
    """The modules that the settings select, for the rules that they have to keep."""

    c: Config
    settings: Mapping[str, Any]
    adapted: list[str]

    @property
    def a(self) -> Architecture:
        """The model's architecture."""
        return architecture_of(self.c)

    @property
    def init(self) -> Any:
        """The setting ``init_lora_weights``."""
        return self.settings.get("init_lora_weights")

    @property
    def saved(self) -> set[str]:
        """The modules that are trained in full."""
        wanted = self.settings["modules_to_save"]
        return {at for at, path in paths(self.c).items() if is_saved(path, wanted)}

    @property
    def variants(self) -> list[str]:
        """The settings that make it another variant than LoRA."""
        return [name for name in variant_settings() if self.settings.get(name)]

    @property
    def without_tables(self) -> str:
        """The setting with which PEFT adapts no embedding, if there is one."""
        variant = variant_of(self.settings)
        refuses = "embedding" in extended(REGISTRY[variant].equation).peft.refuses
        return (self.variants or [self.settings["peft_type"]])[0] if refuses else ""

    @property
    def saved_of_tie(self) -> set[str]:
        """What is trained in full of a tied embedding and head."""
        return self.saved & {"embed", "head"} if ties_head(self.c) else set()

    def paths(self, modules: Iterable[str]) -> list[str]:
        """The modules' paths."""
        return [paths(self.c)[at] for at in modules]

    def nested(self) -> set[str]:
        """The modules of ``modules_to_save`` that lie in another of them, by their ends."""
        every = {outer for path in paths(self.c).values() for outer in with_parents(path)}
        saved = {path for path in every if path.endswith(tuple(self.settings["modules_to_save"]))}
        return {path for path in saved if not saved.isdisjoint([*with_parents(path)][:-1])}

    def tie_is_kept(self) -> bool:
        """Whether PEFT trains a tied embedding in full and keeps the head tied to it."""
        ensured = self.settings["ensure_weight_tying"] and self.a.heeds_weight_tying
        return ensured and "head" not in self.adapted

    def transposed_by_start(self) -> bool:
        """Whether PEFT would start a transposed weight with the factors of its transpose."""
        return (
            self.init == "olora"
            and self.a.transposed
            and any(at.startswith("layers.") for at in self.adapted)
        )


def _by_end(names: Iterable[object]) -> str:
    found = listed(names)
    return found and f"{found}, by the end of the name"


RULES = (
    Rule(
        "target_modules",
        lambda x: x.paths(at for at in x.adapted if at not in x.c.matrices()),
        "projections and embeddings only",
        "norms have no adapter of low rank",
    ),
    Rule(
        "target_modules",
        lambda x: x.without_tables and x.paths(at for at in x.adapted if at in TABLES),
        "projections only",
        "PEFT has no embedding with {x.without_tables}",
    ),
    Rule(
        "init_lora_weights",
        lambda x: (
            x.init in INIT_FROM_BASE
            and "head" in x.adapted
            and ties_head(x.c)
            and f"{x.init} of a tied head"
        ),
        "true",
        "PEFT takes the start out of the embedding too, to which the head is tied",
    ),
    Rule(
        "init_lora_weights",
        lambda x: x.transposed_by_start() and f"{x.init} of a {x.a.model_type}",
        "true",
        "PEFT starts Conv1D with the factors of the transpose",
    ),
    Rule(
        "{x.variants[0]}",
        lambda x: (
            {"embed", "head"} <= {*x.adapted}
            and ties_factors(x.c, x.settings)
            and x.variants
            and "it beside ensure_weight_tying"
        ),
        "neither",
        "the two share A and B, and nothing else",
    ),
    Rule(
        "modules_to_save",
        lambda x: _by_end(x.paths(x.saved.intersection(x.adapted))),
        "modules without adapters",
        "PEFT would save adapted modules in full: give whole names",
    ),
    Rule(
        "modules_to_save",
        lambda x: x.nested() and f"{_by_end(x.nested())}, in another of them",
        "no module in another",
        "PEFT saves a copy there that was not trained: name the outer ones alone, in full",
    ),
    Rule(
        "modules_to_save",
        lambda x: (
            x.saved_of_tie
            and not x.tie_is_kept()
            and f"{listed(x.paths(x.saved_of_tie))} of a tied model"
        ),
        "neither embedding nor head",
        "PEFT trains it apart from the other; ensure_weight_tying, which a Llama alone heeds, "
        "keeps them one",
    ),
)
"""What the selected modules may not be."""


def ties_factors(c: Config, settings: Mapping[str, Any]) -> bool:
    """Whether PEFT ties the head's factors to the embedding's: it goes by their bare names."""
    if not (settings["ensure_weight_tying"] and c.causal and ties_head(c)):
        return False
    if any(name.split(".")[-1] in _TIED for name in settings["modules_to_save"]):
        return False
    wanted = settings["target_modules"]
    if isinstance(wanted, str):
        return any(matches(name, wanted) for name in _TIED)
    return any(name.split(".")[-1] in _TIED for name in wanted)


def adapted_modules(path: Path, c: Config, settings: Mapping[str, Any]) -> list[str]:
    """The modules that the settings adapt.

    Errors: FormatError for an expression that is none, and if no module matches.
    """
    path_of, wanted = paths(c), settings["target_modules"]
    hit = {*selected(path, settings, path_of.values())}
    try:
        adapted = [at for at, key in path_of.items() if key in hit]
        if ties_factors(c, settings):
            adapted += [at for at in ("embed", "head") if at not in adapted]
    except _EXPRESSION_ERRORS as error:
        raise _expression_error(path, error) from None
    if not adapted:
        found = f"{json.dumps(wanted)}, which match no module"
        expected = f"some of {listed(path_of[at] for at in c.linears())}"
        raise FormatError(path, "target_modules", found, expected, "is it another model's?")
    return adapted


def selected(path: Path, settings: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names of modules that the settings select.

    Errors: FormatError for an expression that is none.
    """
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    beside = {name: settings[name] for name in fields}
    try:
        return [name for name in names if is_target(name, settings["target_modules"], **beside)]
    except _EXPRESSION_ERRORS as error:
        raise _expression_error(path, error) from None


_EXPRESSION_ERRORS = (re.error, OverflowError, RecursionError)


def _expression_error(path: Path, error: Exception) -> FormatError:
    remedy = "correct the regular expression"
    return FormatError(path, "expressions", error, "what Python reads", remedy)


def own_values(
    path: Path, c: Config, settings: Mapping[str, Any], adapted: Sequence[str]
) -> tuple[dict[str, int], dict[str, Any]]:
    """The modules' own ranks and alphas; a rank of 0 where AdaLoRA has pruned all of it."""
    path_of = {at: paths(c)[at] for at in adapted}
    if settings["peft_type"] == "ADALORA":
        return _pruned_ranks(path, settings, path_of), {}
    if settings["peft_type"] != "LORA":
        return {}, {}

    ranks, alphas = settings["rank_pattern"], settings["alpha_pattern"]
    return own_of(path, ranks, path_of), own_of(path, alphas, path_of)


def own_of(path: Path, pattern: Mapping[str, Any], path_of: Mapping[str, str]) -> dict[str, Any]:
    """The values of the modules that a pattern names.

    Errors: FormatError for an expression that is none.
    """
    try:
        values = {at: pattern_value(pattern, key) for at, key in path_of.items()}
    except _EXPRESSION_ERRORS as error:
        raise _expression_error(path, error) from None
    return {at: value for at, value in values.items() if value is not None}


def _pruned_ranks(
    path: Path, settings: Mapping[str, Any], path_of: Mapping[str, str]
) -> dict[str, int]:
    """The rank that AdaLoRA's pruning has left of each module, 0 if nothing."""
    r, pattern = settings["init_r"], settings["rank_pattern"]
    module_of = {f"{key}.lora_E": at for at, key in path_of.items()}
    if wrong := pattern.keys() - module_of.keys():
        remedy = "PEFT names the singular values of adapted modules"
        expected = f"some of {listed(module_of)}"
        raise FormatError(path, "rank_pattern", listed(wrong), expected, remedy)
    if wrong := {name for name, row in pattern.items() if len(row) != r}:
        found = f"another length of {listed(wrong)}"
        remedy = "say of each singular value if it is left"
        raise FormatError(path, "rank_pattern", found, f"{r} entries, as init_r says", remedy)
    if pattern and settings["lora_alpha"] <= 0:
        remedy = "PEFT takes the rank for it, before pruning one and after it another"
        raise FormatError(path, "lora_alpha", settings["lora_alpha"], "more than 0", remedy)
    ranks = dict.fromkeys(path_of, r)
    ranks |= {module_of[name]: sum(row) for name, row in pattern.items()}
    if not any(ranks.values()):
        remedy = "nothing is left of the adapter: take the base"
        raise FormatError(path, "rank_pattern", "all pruned", "a singular value", remedy)
    return ranks


def with_tied_table(c: Config, adapted: Iterable[str]) -> set[str]:
    """The adapted modules, and the embedding that an adapted head is tied to."""
    modules = {*adapted}
    return modules | {"embed"} if "head" in modules and ties_head(c) else modules


def token_rows(path: Path, selected: Selected) -> dict[str, list[int]]:
    """The rows of tables that are trained alone, by internal names."""
    c, path_of = selected.c, paths(selected.c)
    tokens, field = selected.settings["trainable_token_indices"], "trainable_token_indices"
    if isinstance(tokens, list):
        tokens = {path_of["embed"]: tokens} if tokens else {}
    rows: dict[str, list[int]] = {}
    for name, ids in tokens.items():
        at, count = _table(path, c, name)
        if not ids or len({*ids}) < len(ids) or max(ids) >= count:
            expected = f"tokens from 0 to {count - 1}, each once"
            raise FormatError(path, field, ids, expected, "correct the list")
        rows[at] = ids
    of_head = rows.pop("head", None) if ties_head(c) else None
    if of_head not in (None, rows.get("embed")):
        remedy = "PEFT parts the two: name the embedding alone"
        expected = "the tokens of its embedding"
        raise FormatError(path, field, "a tied head's", expected, remedy)
    taken = selected.saved | with_tied_table(c, selected.adapted)
    if both := taken & rows.keys():
        found = (
            f"{listed(selected.paths(both))}, which is adapted, tied to what is, or saved in full"
        )
        raise FormatError(path, field, found, "another table", "train the table in one way")
    return rows


def _table(path: Path, c: Config, name: str) -> tuple[str, int]:
    """The table whose path ends with ``name``, and how many rows it has."""
    ending = {at: key for at, key in paths(c).items() if key.endswith(name)}
    at = next(iter(ending), "")
    count = c.tables().get(at, c.vocab if at == "head" and c.causal else 0)
    if len(ending) > 1 or not count:
        found = f"{name!r}, which ends {listed(ending.values()) or 'no name'}"
        remedy = "PEFT goes by the end of names: give the whole"
        raise FormatError(path, "trainable_token_indices", found, "one table", remedy)
    return at, count
