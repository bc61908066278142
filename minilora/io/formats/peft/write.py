"""Writing an adapter folder: what PEFT would compute otherwise is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.io.architectures import Architecture, architecture_of, tensor_names, to_file_layout
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError, listed
from minilora.io.files import pack, pack_json, to_dtype
from minilora.io.formats.peft.config import trained_biases
from minilora.io.formats.peft.names import (
    CONFIG,
    PREFIX,
    PROJECTIONS,
    WEIGHTS,
    adapter_names,
    paths,
    vectors,
)
from minilora.io.formats.peft.settings import KINDS, NEWER, variant_flags
from minilora.io.formats.peft.starts import put_back
from minilora.io.formats.peft.targets import with_tied_table
from minilora.io.formats.peft.vera import join_projections
from minilora.io.formats.rules import Rule, check
from minilora.io.formats.values import is_number
from minilora.spec.initialization import INITIALIZATIONS
from minilora.spec.lora import LORA, TABLES, TrainableSpec, Weights, is_base, twin
from minilora.spec.models import Config
from minilora.spec.ops import Array
from minilora.spec.target_modules import (
    LoraConfig,
    ResolvedTargets,
    matches,
    resolve_targets,
    scales,
    ties_head,
)
from minilora.spec.variants import Peft, extended


@dataclass(frozen=True)
class _Adapter:
    """What is to be written, for the rules that it has to keep."""

    c: Config
    W: Weights
    lora: LoraConfig
    targets: ResolvedTargets

    @property
    def a(self) -> Architecture:
        return architecture_of(self.c)

    @property
    def peft(self) -> Peft:
        return extended(self.lora.equation).peft

    @property
    def count(self) -> int:
        return len(self.targets.parts())

    @property
    def unsupported(self) -> list[str]:
        """The settings that this ``peft_type`` does not have."""
        fields = ("trainable_token_indices", "layer_replication")
        known = KINDS[self.peft.peft_type].read
        return [name for name in fields if name not in known and getattr(self.lora, name)]

    def factors(self) -> str:
        wrong = {name for name in self.W if not is_base(name)} ^ self.targets.parts().keys()
        return f"{listed(wrong)} in one of the two" if wrong else ""

    def rows_of_adapted(self) -> str:
        tables = with_tied_table(self.c, self.targets.rank)
        both = tables & self.lora.trainable_token_indices.keys()
        return f"rows of {listed(both)}, which is adapted, or tied to what is" if both else ""

    def pruning(self) -> str:
        """What PEFT's pruning of AdaLoRA would compute otherwise."""
        if self.peft.peft_type != "ADALORA":
            return ""
        r, alpha, ranks = self.lora.r, self.lora.lora_alpha, self.targets.rank
        if above := [at for at, rank in ranks.items() if rank > r]:
            return f"more than r {r} of {listed(above)}"
        pruned = any(rank != r for rank in ranks.values())
        return f"alpha {alpha}" if pruned and not alpha > 0 else ""

    def untied(self) -> bool:
        """Whether the head's factors are others than the tied embedding's."""
        if not (self.lora.ensure_weight_tying and "head" in self.targets.rank):
            return False
        shared = zip("AB", twin(self.W["embed.A"], self.W["embed.B"]), strict=True)
        return not all(np.array_equal(self.W[f"head.{part}"], array) for part, array in shared)

    def replication(self) -> str:
        replicates = self.a.writes_replication and self.lora.bias == "none"
        if not self.lora.layer_replication or replicates:
            return ""
        return f"layer_replication with bias {self.lora.bias!r} of a {self.a.model_type}"


RULES = (
    Rule(
        "variant",
        lambda x: x.lora.entry.written_as and x.lora.variant,
        "{x.lora.entry.written_as}",
        "PEFT holds the norm constant in training: for inference write it as "
        "{x.lora.entry.written_as}",
    ),
    Rule(
        "{x.unsupported[0]}",
        lambda x: x.unsupported and f"it with {x.lora.variant}",
        "none",
        "PEFT has no such setting with {x.lora.variant}",
    ),
    Rule(
        "trainable_token_indices",
        _Adapter.rows_of_adapted,
        "those of another table",
        "PEFT trains a table in one way: adapt it, or train rows of it",
    ),
    Rule(
        "adapted",
        lambda x: "embedding" in x.peft.refuses and [at for at in x.targets.rank if at in TABLES],
        "projections only",
        "PEFT has no embedding with {x.lora.variant}",
    ),
    Rule(
        "variant",
        lambda x: x.lora.alora_invocation_tokens and not x.c.causal and x.lora.variant,
        "another for a classifier",
        "PEFT looks for the invocation in causal language models only",
    ),
    Rule(
        "rank_pattern",
        _Adapter.pruning,
        "ranks up to r, alpha above 0",
        "PEFT prunes from r on, and takes the rank for an alpha of 0",
    ),
    Rule(
        "head.A",
        lambda x: x.untied() and "other factors",
        "the embedding's, tied",
        "train them as one, by tied_gradients, or leave ensure_weight_tying out",
    ),
    Rule(
        "layer_replication",
        _Adapter.replication,
        "bias 'none', and a llama or bert",
        "PEFT's copies share one bias, and in gpt2 and qwen2 it finds no layers, or fails",
    ),
)
"""What PEFT has no place for, or would compute otherwise."""


def write_adapter(
    path: Path | str,
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    lora: LoraConfig,
    *,
    dtype: Any = None,
    base: Mapping[str, Array] | None = None,
    name_or_path: str | None = None,
) -> None:
    """Write the adapter of W, in ``dtype`` or its own, to the folder ``path``.

    Beside the adapter goes what else ``tuning`` trains. Modules are named in full, one by one, in
    the settings. Where the start changed the weights that it was put beside ("pissa", "olora",
    "loftq"), ``base`` says on which the folder will be loaded: on those of W as they are, or on
    those from before the start, for which the adapter is written at the doubled rank.
    ``name_or_path`` names the model as ``from_pretrained`` takes it, so that PEFT's
    ``AutoPeftModel`` finds it. The same input gives the same bytes.

    Errors: FormatError if ``lora``, ``tuning`` and W do not agree; for what PEFT has no place or
    another function for; if a part of a module is trained that PEFT saves as a whole, or GPT-2's
    embedding, which PEFT cannot tie to its head; if the folder holds another adapter's weights,
    in PEFT's format or MLX's.
    """
    folder = Path(path)
    targets = resolve_targets(lora, _possible_targets(c, W, lora))
    adapter = _Adapter(c, W, lora, targets)
    _check_agreement(folder, adapter, tuning)
    check(folder, RULES, adapter)
    lora, targets, W = put_back(folder, W, lora, targets, base)
    beside = _trained_beside(tuning, lora, targets)
    saved = _saved_in_full(folder, c, lora, targets, beside)
    tensors = _tensors(folder, _Adapter(c, W, lora, targets), beside, dtype)
    if "embed" in saved and ties_head(c):
        head, embed = (f"{PREFIX}{paths(c)[at]}.weight" for at in ("head", "embed"))
        tensors[head] = tensors[embed]
    settings = _settings(folder, c, lora, targets, saved)
    settings["base_model_name_or_path"] = name_or_path
    files = {
        WEIGHTS: partial(pack, folder / WEIGHTS, tensors, {"format": "pt"}),
        CONFIG: partial(pack_json, settings),
    }
    write_files(folder, files, stale=r"(adapter_model|adapters)\..*")


def _possible_targets(c: Config, W: Weights, lora: LoraConfig) -> dict[str, tuple[int, int]]:
    """The modules that ``lora`` is asked about: projections, and tables that have an adapter."""
    exclude, linears = lora.exclude_modules, c.linears()
    return {
        at: shape
        for at, shape in c.matrices().items()
        if at in linears or f"{at}.A" in W or (exclude and matches(at, exclude))
    }


def _check_agreement(folder: Path, x: _Adapter, tuning: TrainableSpec) -> None:
    """Refuse W or a `TrainableSpec` that another `LoraConfig` has made."""
    remedy = "give the LoraConfig that the adapter was made with"
    expected = "the {x.count} parameters that lora chooses"
    check(folder, [Rule("factors", _Adapter.factors, expected, remedy)], x)
    for at, s in scales(x.lora, x.targets).items():
        if tuning.scale.get(at) != s:
            raise FormatError(folder, f"scale of {at}", tuning.scale.get(at), s, remedy)
        if tuning.variant.get(at, LORA) != x.lora.equation:
            found = "another equation"
            raise FormatError(folder, f"variant of {at}", found, x.lora.variant, remedy)


def _trained_beside(
    tuning: TrainableSpec, lora: LoraConfig, targets: ResolvedTargets
) -> frozenset[str]:
    """What is trained beside the adapters' parameters and single rows of tables."""
    of_adapters = {f"{at}.{part}" for at in targets.rank for part in lora.equation.parts}
    return tuning.trained - of_adapters - {f"{at}.weight" for at in lora.trainable_token_indices}


def _tensors(folder: Path, x: _Adapter, beside: frozenset[str], dtype: Any) -> Weights:
    """The file's tensors."""
    c, tokens = x.c, x.lora.trainable_token_indices
    rows = {f"{at}.tokens": x.W[f"{at}.weight"][[*ids]] for at, ids in tokens.items()}
    W, parts = {**x.W, **rows}, x.targets.parts()
    shapes = c.shapes() | parts | {f"{at}.tokens": (len(ids), c.d) for at, ids in tokens.items()}
    transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
    tensors: Weights = {}
    for name, place in adapter_names(c, [*parts, *rows, *sorted(beside)]).items():
        if name not in W or W[name].shape != shapes[name]:
            found = f"shape {W[name].shape}" if name in W else "none"
            raise FormatError(folder, name, found, f"shape {shapes[name]}", "check it against c")
        array = to_file_layout(name, W[name], transposed.get(name, False))
        array = array[:, 0] if name.endswith(vectors(x.lora.equation)) else array
        tensors[place] = to_dtype(folder, name, array, dtype)
    if x.peft.peft_type == "VERA":
        for part, array in join_projections(folder, W, x.targets).items():
            tensors[PROJECTIONS[part]] = to_dtype(folder, f"vera_{part}", array, dtype)
    return tensors


def _saved_in_full(
    folder: Path, c: Config, lora: LoraConfig, targets: ResolvedTargets, beside: frozenset[str]
) -> set[str]:
    """The modules that hold what is trained beside the factors and their biases."""
    biases = trained_biases(lora, targets, c)
    saved = {name.rpartition(".")[0] for name in beside - biases}
    needed = biases | {name for name in c.shapes() if name.rpartition(".")[0] in saved}
    if needed != beside or saved & targets.rank.keys():
        wrong = listed(needed ^ beside or saved & targets.rank.keys())
        expected = f"bias {lora.bias!r} and whole modules that are not adapted"
        remedy = "PEFT trains all biases of a kind and all parameters of a module, or none"
        raise FormatError(folder, "trained", f"{wrong} left out or over", expected, remedy)
    apart = not architecture_of(c).heeds_weight_tying or "head" in targets.rank
    if "embed" in saved and ties_head(c) and apart:
        remedy = "PEFT would leave the head on the base's embedding: do not train it"
        raise FormatError(folder, "trained", "the tied embedding", "no tied embedding", remedy)
    return saved


def _settings(
    folder: Path, c: Config, lora: LoraConfig, targets: ResolvedTargets, saved: set[str]
) -> dict[str, Any]:
    """The settings that reading resolves to these targets."""
    path_of, kind = paths(c), extended(lora.equation).peft.peft_type
    settings: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM" if c.causal else "SEQ_CLS" if "head" in saved else None,
        "inference_mode": True,
        "target_modules": sorted(path_of[at] for at in targets.rank),
        "modules_to_save": sorted(path_of[at] for at in saved) or None,
        "bias": lora.bias,
        "fan_in_fan_out": architecture_of(c).transposed,
    }
    if kind == "VERA":
        return settings | _vera_settings(lora)
    tied = "embed" in saved or (lora.ensure_weight_tying and "head" in targets.rank)
    tokens = {path_of[at]: [*map(int, ids)] for at, ids in lora.trainable_token_indices.items()}
    settings |= {
        "lora_alpha": _number(folder, lora.lora_alpha),
        "lora_dropout": lora.lora_dropout,
        "trainable_token_indices": tokens or None,
        "layer_replication": [[*pair] for pair in lora.layer_replication] or None,
        "ensure_weight_tying": ties_head(c) and tied,
    }
    if kind == "ADALORA":
        return settings | _adalora_settings(lora, targets, path_of)
    settings |= _lora_settings(folder, lora, targets, path_of)
    # An older PEFT refuses a name that it does not know, whatever its value.
    return {key: value for key, value in settings.items() if value or key not in NEWER}


def _vera_settings(lora: LoraConfig) -> dict[str, Any]:
    return {
        "r": lora.r,
        "vera_dropout": lora.lora_dropout,
        "bias": lora.bias.replace("lora", "vera"),
        "save_projection": True,
        "projection_prng_key": 0,
    }


def _adalora_settings(
    lora: LoraConfig, targets: ResolvedTargets, path_of: Mapping[str, str]
) -> dict[str, Any]:
    """Pruned to the ranks; of the schedule, which PEFT asks for, one that is over."""
    pruned = {
        f"{path_of[at]}.lora_E": [i < r for i in range(lora.r)]
        for at, r in targets.rank.items()
        if r != lora.r
    }
    schedule = {"total_step": 1, "tinit": 0, "tfinal": 0}
    return schedule | {"init_r": lora.r, "target_r": lora.r, "rank_pattern": pruned or None}


def _lora_settings(
    folder: Path, lora: LoraConfig, targets: ResolvedTargets, path_of: Mapping[str, str]
) -> dict[str, Any]:
    init = INITIALIZATIONS[lora.init_lora_weights]
    takes_init = extended(lora.equation).peft.takes_init
    drawn = init.in_peft and init.base == "kept" and takes_init
    return {
        "r": lora.r,
        "use_rslora": lora.use_rslora,
        "rank_pattern": {path_of[at]: r for at, r in targets.rank.items() if r != lora.r},
        "alpha_pattern": {
            path_of[at]: _number(folder, alpha)
            for at, alpha in targets.alpha.items()
            if alpha != lora.lora_alpha
        },
        "init_lora_weights": lora.init_lora_weights if drawn else True,
        **{flag: flag == extended(lora.equation).peft.setting for flag in variant_flags()},
        "alora_invocation_tokens": [*map(int, lora.alora_invocation_tokens)] or None,
    }


def _number(folder: Path, alpha: Any) -> int | float:
    """Alpha as a number that JSON has."""
    value = alpha.item() if isinstance(alpha, np.generic) else alpha
    if not is_number(value):
        raise FormatError(folder, "alpha", repr(alpha), "an int or a float", "convert it")
    number: int | float = value
    return number
