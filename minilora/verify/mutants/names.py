"""Mutants of matching names: targets, patterns, and what is trained."""

from __future__ import annotations

from typing import Any

from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references import names as references


def as_list(wanted: Any) -> list[str]:
    """Names; an expression is taken for one."""
    return [wanted] if isinstance(wanted, str) else [*(wanted or ())]


def excludes_anywhere(excluded: Any, name: str) -> bool:
    """Whether an expression is the whole name, or one of the names stands somewhere in it."""
    if isinstance(excluded, str):
        return references.matches(excluded, name)
    return any(part in name for part in excluded)


def shortened(wanted: Any) -> Any:
    """The last parts of the names of a long list."""
    is_long = isinstance(wanted, list) and len(wanted) > 60
    return [name.rpartition(".")[2] for name in wanted] if is_long else wanted


NAMES = Reference(
    (
        references.matches,
        references.layer_of,
        references.is_in_layers,
        references.is_hit,
        references.own_value,
        references.require,
        references.Names,
    ),
    globals(),
)

ENDS = 'name == end or name.endswith("." + end) for end in wanted'

# fmt: off
TABLE: Table = {
    "names.targets.list": [
        ("part-of-word", "a target matches the end of a name, without a dot before it",
         {ENDS: "name.endswith(end) for end in wanted"}),
        ("anywhere", "a target matches anywhere in a name",
         {ENDS: "end in name for end in wanted"}),
        ("last-part", "only the last part of a target counts",
         {ENDS:
              'name.split(".")[-1] == end.split(".")[-1] for end in wanted'}),
        ("one-part", "only a target of one part matches as the end of a name",
         {ENDS:
              'name == end or name.split(".")[-1] == end for end in wanted'}),
        ("first-target", "only the first target counts",
         {"for end in wanted)": "for end in list(wanted)[:1])"}),
        ("no-embedding", "an embedding gets no adapter",
         {"# hit": 'hit = [n for n in hit if not n.endswith("embed_tokens")]'}),
        ("other-tower", "only the first tower is looked at",
         {"# hit": "hit = [n for n in hit if n.split('.')[:2] == hit[0].split('.')[:2]]"}),
    ],
    "names.targets.expression": [
        ("search", "an expression matches anywhere in a name",
         {"re.fullmatch(wanted, name)": "re.search(wanted, name)"}),
        ("beginning", "an expression matches the beginning of a name",
         {"re.fullmatch(wanted, name)": "re.match(wanted, name)"}),
        ("end-of-name", "an expression may match the dotted end of a name",
         {"re.fullmatch(wanted, name)": 're.fullmatch(rf"(.*\\.)?({wanted})", name)'}),
    ],
    "names.targets.layers": [
        ("layers-ignored", "layers_to_transform is ignored",
         {"if layers is None or layers == []:": "if True:"}),
        ("layers-pattern-ignored", "layers_pattern is ignored",
         {'config.get("layers_pattern") or []': "[]"}),
        ("layer-begins", "a layer's number is compared by its first digit",
         {'int(found["number"])': 'int(found["number"][:1])'}),
        ("layer-last", "the last number of a name is its layer",
         {r".*?\.[^.]*": r".*\.[^.]*"}),
        ("layer-from-1", "layers are counted from 1",
         {'int(found["number"])': 'int(found["number"]) + 1'}),
        ("layer-after", "the layer after each that is asked for",
         {'int(found["number"])': 'int(found["number"]) - 1'}),
        ("layers-without-pattern", "layers_to_transform is ignored without layers_pattern",
         {"if layers is None or layers == []:":
              'if layers is None or layers == [] or not config.get("layers_pattern"):'}),
        ("layers-first-pattern", "only the first of several layers_pattern counts",
         {"else patterns": "else patterns[:1]"}),
        ("layers-whole-names", "a whole name is bound to the layers, too",
         {"if not isinstance(wanted, str) and name in wanted:": "if False:"}),
        ("layers-outside", "what lies in no layer is adapted whatever the layers are",
         {'config.get("layers_pattern") or []) in layers':
              'config.get("layers_pattern") or []) in [*layers, None]'}),
    ],
    "names.targets.exclude": [
        ("exclude-ignored", "exclude_modules is ignored",
         {'config.get("exclude_modules") or []': "[]"}),
        ("exclude-whole", "exclude_modules names whole modules only",
         {'matches(config.get("exclude_modules") or [], name)':
              'name in (config.get("exclude_modules") or [])'}),
        ("exclude-anywhere", "a name of exclude_modules matches anywhere in a name",
         {'matches(config.get("exclude_modules") or [], name)':
              'excludes_anywhere(config.get("exclude_modules") or [], name)'}),
        ("exclude-after", "a target that is a whole name is not excluded",
         {'matches(config.get("exclude_modules") or [], name)':
              'matches(config.get("exclude_modules") or [], name) and name not in wanted'}),
        ("exclude-no-expression", "exclude_modules is no expression",
         {'matches(config.get("exclude_modules") or [], name)':
              'matches(as_list(config.get("exclude_modules")), name)'}),
    ],
    "names.targets.all-linear": [
        ("all-with-head", "all-linear adapts the head, too",
         {'("embed_tokens", "lm_head")': '("embed_tokens",)'}),
        ("all-with-embedding", "all-linear adapts embeddings, too",
         {'("embed_tokens", "lm_head")': '("lm_head",)'}),
        ("all-in-layers", "all-linear adapts what lies in blocks alone",
         {'and "norm" not in name': 'and "norm" not in name and layer_of(name, []) is not None'}),
    ],
    "names.targets.modules-to-save": [
        ("saved-adapted", "what is saved in full is adapted, too",
         {"# hit": "hit = [n for n in names if is_hit(n, {**c, 'modules_to_save': None})]"}),
        ("saved-whole", "modules_to_save names whole modules only",
         {'f".{name}.".find(f".{saved}.") >= 0': "name == saved"}),
        ("saved-part", "modules_to_save matches parts of words",
         {'f".{name}.".find(f".{saved}.") >= 0': "saved in name"}),
    ],
    "names.targets.many": [
        ("shortened", "long lists are shortened to the last parts of their names",
         {"require(c)": 'require(c); c["target_modules"] = shortened(c["target_modules"])'}),
    ],
    "names.targets.patterns": [
        ("pattern-last", "of several patterns the last counts",
         {"(patterns or {}).items()": "reversed((patterns or {}).items())"}),
        ("alpha-follows-rank", "a rank of its own changes alpha, too, without alpha_pattern",
         {"own_value(alphas, n, alpha)) for n in hit":
              "own_value(alphas, n, alpha if alphas else alpha * own_value(ranks, n, r) / r)) for "
              "n in hit"}),
        ("pattern-longest", "of several patterns the longest counts",
         {"(patterns or {}).items()":
              "sorted((patterns or {}).items(), key=lambda p: -len(p[0]))"}),
        ("pattern-end", "a pattern matches the end of a name, without a dot before it",
         {r'rf"(.*\.)?({pattern})$"': r'rf".*({pattern})$"'}),
        ("pattern-anywhere", "a pattern matches anywhere in a name",
         {r'rf"(.*\.)?({pattern})$"': r'rf".*({pattern})"'}),
        ("pattern-whole", "a pattern is for whole names",
         {r'rf"(.*\.)?({pattern})$"': r'rf"({pattern})$"'}),
        ("pattern-ungrouped", "only the last alternative of a pattern ends the name",
         {r'rf"(.*\.)?({pattern})$"': r'rf"(.*\.)?{pattern}$"'}),
        ("pattern-no-expression", "a pattern is no expression",
         {r'rf"(.*\.)?({pattern})$"': r'rf"(.*\.)?({re.escape(pattern)})$"'}),
        ("rank-pattern-ignored", "rank_pattern is ignored", {'c.get("rank_pattern")': "None"}),
        ("alpha-pattern-ignored", "alpha_pattern is ignored", {'c.get("alpha_pattern")': "None"}),
        ("alpha-with-rank", "alpha grows as a rank of its own does",
         {"own_value(alphas, n, alpha)":
              "own_value(alphas, n, alpha * own_value(ranks, n, r) / r)"}),
        ("alpha-by-rank-pattern", "the alpha of the pattern that gave the rank",
         {"own_value(alphas, n, alpha)":
              "(alphas or {}).get(own_value({p: p for p in ranks or {}}, n, None), alpha)"}),
    ],
    "names.targets.combined": [
        ("save-alone", "exclude_modules is ignored beside modules_to_save",
         {"require(c)":
              'require(c); c |= {"exclude_modules": []} if c.get("modules_to_save") else {}'}),
    ],
    "names.trainable.plain": [
        ("embedding-as-linear", "an embedding's factors are named as a projection's",
         {'at.endswith("embed_tokens")': "False"}),
        ("magnitude-untrained", "DoRA's magnitude is not trained",
         {'c.get("use_dora"):\n': "False:\n"}),
        ("bias-of-B-untrained", "the bias of B is not trained",
         {'c.get("lora_bias"):\n': "False:\n"}),
        ("A-untrained", "A is not trained",
         {"# trained": 'tensors = [n for n in tensors if ".lora_A" not in n]'}),
        ("prefix-lost", "names without base_model.model.",
         {'f"base_model.model.{name}" for': "name for"}),
        ("adapter-in-name", "the adapter's name stands in the tensors' names",
         {'f"base_model.model.{name}" for':
              'f"base_model.model.{name}".replace(".weight", ".default.weight") for'}),
    ],
    "names.trainable.bias": [
        ("bias-ignored", "no bias is trained", {'c.get("bias", "none")\n': '"none"\n'}),
        ("bias-of-all", "lora_only trains all biases",
         {'(bias == "lora_only" and at in adapted)': 'bias == "lora_only"'}),
        ("bias-of-adapted", "all trains the biases of adapted modules alone",
         {'bias == "all" or (': 'bias == "all" and at in adapted or ('}),
        ("bias-name", "a bias of an adapted module is named as the base's",
         {'f"{at}.base_layer.bias" if at in adapted else name': "name"}),
    ],
    "names.trainable.modules-to-save": [
        ("prefix-once", "base_model.model. is not put before a name that has it",
         {'f"base_model.model.{name}" for':
              'name if "base_model.model" in name else f"base_model.model.{name}" for'}),
        ("saved-ignored", "modules_to_save are not trained",
         {'at.endswith(tuple(c.get("modules_to_save") or ()))': "False"}),
        ("saved-first", "only the first of modules_to_save is trained",
         {'tuple(c.get("modules_to_save") or ())': 'tuple(c.get("modules_to_save") or ())[:1]'}),
        ("saved-whole-names", "only whole names of modules_to_save are trained",
         {'at.endswith(tuple(c.get("modules_to_save") or ()))':
              'at in (c.get("modules_to_save") or ())'}),
    ],
    "names.trainable.combined": [
        ("bias-beside-variant", "a bias is not trained beside a variant",
         {'c.get("bias", "none")\n':
              '"none" if c.get("use_dora") or c.get("lora_bias") else c.get("bias", "none")\n'}),
    ],
    "names.refused.targets": [
        ("nothing-passes", "what matches no module is accepted", {"if not hit:": "if False:"}),
        ("contradiction-passes", "settings that contradict each other are accepted",
         {"require(c)": ""}),
    ],
    "names.refused.trainable": [
        ("bias-unknown", "a bias that there is not is taken for none",
         {'raise ValueError("no such bias")': "pass"}),
    ],
}
SAME: Same = [
    ("plain", "the reference", {}),
    ("reversed", "names in another order",
     {"# hit": "hit = hit[::-1]", "# trained": "tensors = tensors[::-1]"}),
    ("end-as-expression", "the dotted end as an expression",
     {'name == end or name.endswith("." + end)': 're.search(rf"(^|\\.){re.escape(end)}$", name)'}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(NAMES, "NAMES", TABLE),
    *equivalents(NAMES, "names", SAME),
)
