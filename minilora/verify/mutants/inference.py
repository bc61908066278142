"""Mutants of serving an adapter: settings ignored, tensors dropped, names that fit nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.io.files import read_json, read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import CONFIG, WEIGHTS, read_adapter
from minilora.spec.lora import TrainableSpec, merge
from minilora.spec.models import Batch, logits
from minilora.verify.mutants import files
from minilora.verify.mutants.files import OWN_ALPHAS, without
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references import inference
from minilora.verify.mutants.references.files import write_folder
from minilora.verify.mutants.references.helpers import Array, wide

Tensors = dict[str, Array]


def s_of(adapter_dir: Any) -> float:
    """The one scale of an adapter without patterns."""
    c = read_json(Path(adapter_dir) / CONFIG)
    return float(c["lora_alpha"] / c["r"])


def is_rslora(adapter_dir: Any) -> bool:
    """Whether the adapter asks for rsLoRA."""
    return bool(read_json(Path(adapter_dir) / CONFIG)["use_rslora"])


def of_first(d: Tensors) -> Tensors:
    """Each change that of the first module with its shape."""
    first: dict[tuple[int, ...], Array] = {}
    return {name: first.setdefault(v.shape, v) for name, v in d.items()}


def of_merged(model_dir: Any, adapter_dir: Any, ids: Array) -> Any:
    """The logits by merged weights, which are stored as the base's are."""
    c, W = read_model(model_dir)
    factors, tuning = read_adapter(adapter_dir, c, base=W)
    merged = merge({n: wide(w) for n, w in (W | factors).items()}, tuning)
    dtype = W["embed.weight"].dtype
    z, _ = logits(
        Batch(ids), {n: wide(w.astype(dtype)) for n, w in merged.items()}, c, TrainableSpec()
    )
    return z.T.reshape(*ids.shape, -1).astype(dtype)


def of_both(d: Tensors) -> Tensors:
    """The change of a table under the names of both uses."""
    tables = {name for name in d if name.endswith(("embed_tokens", "wte", "lm_head"))}
    change = d[tables.pop()]
    return {"lm_head": change, "transformer.wte": change, "model.embed_tokens": change, **d}


def without_module(t: Tensors, c: dict[str, Any], end: str) -> Tensors:
    """The tensors and the settings without the modules of this name."""
    c["target_modules"] = [name for name in c["target_modules"] if not name.endswith(end)]
    return {name: v for name, v in t.items() if f"{end}.lora_" not in name}


def without_saved(t: Tensors, c: dict[str, Any]) -> Tensors:
    """The tensors and the settings without what is saved in full."""
    saved, c["modules_to_save"] = c["modules_to_save"] or [], None
    return {n: v for n, v in t.items() if not any(f"{at}." in n for at in saved)}


def without_bias(t: Tensors, c: dict[str, Any]) -> Tensors:
    """The tensors and the settings without the base's trained biases."""
    c["bias"] = "none"
    saved = c["modules_to_save"] or []
    return {
        name: v
        for name, v in t.items()
        if not name.endswith(".bias") or "lora_" in name or any(f"{at}." in name for at in saved)
    }


def without_ranks(c: Mapping[str, Any]) -> dict[str, float]:
    """The alphas that give the scale of the one rank of all, where modules have their own."""
    root = 0.5 if c["use_rslora"] else 1.0
    alpha = dict(c["alpha_pattern"])
    for end, rank in c["rank_pattern"].items():
        alpha[end] = alpha.get(end, c["lora_alpha"]) * (rank / c["r"]) ** root
    return alpha


def squares_exchanged(t: Tensors) -> Tensors:
    """A for B and B for A, where both are square."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}

    def other(name: str) -> str:
        return re.sub("lora_[AB]", lambda found: swap[found[0]], name)

    fits = {n for n in t if other(n) in t and t[other(n)].shape == t[n].shape == t[n].T.shape}
    return {name: t[other(name)] if name in fits else v for name, v in t.items()}


def magnitude_unused(t: Tensors, c: dict[str, Any]) -> Tensors:
    """The tensors and settings of plain LoRA."""
    c["use_dora"] = False
    return without(t, "magnitude")


def bias_unused(t: Tensors, c: dict[str, Any]) -> Tensors:
    """The tensors and settings without the bias of B."""
    c["lora_bias"] = False
    return without(t, "lora_B.bias")


def fitting(t: Tensors, c: dict[str, Any]) -> Tensors:
    """The tensors and the settings of the layers that the model has."""
    kept = {n: v for n, v in t.items() if "layers.7." not in n}
    at = {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in kept}
    c["target_modules"] = [name for name in c["target_modules"] if name in at]
    return kept


def completed(t: Tensors) -> Tensors:
    """With the A of another layer for one that is missing."""
    wanted = {n.replace("lora_B", "lora_A") for n in t if ".lora_B." in n}
    return t | {n: t[n.replace("layers.1.", "layers.0.")] for n in wanted - t.keys()}


def refitted(folder: str) -> str:
    """The folder, with what fits alone."""
    c = read_json(Path(folder) / CONFIG)
    write_folder(folder, fitting(read_tensors(Path(folder) / WEIGHTS), c), c)
    return folder


def has_names(adapter_dir: Any, part: str) -> bool:
    """Whether a tensor's name has this part."""
    return any(part in name for name in read_tensors(Path(adapter_dir) / WEIGHTS))


SERVER = Reference((inference.of_base, inference.Server), {**vars(files), **globals()})

SERVE_BASE = "return of_base(model_dir, input_ids)"

# fmt: off
SETTINGS: Table = {
    "inference.logits.plain": [
        ("alpha-ignored", "lora_alpha is ignored: α = r", {"# used": 'c["lora_alpha"] = c["r"]'}),
        ("alpha-default", "lora_alpha is ignored: α = 8", {"# used": 'c["lora_alpha"] = 8'}),
        ("alpha-is-scale", "s = α", {"# used": 'c["lora_alpha"] *= c["r"]'}),
        ("alpha-absolute", "the sign of alpha is lost",
         {"# used": 'c["lora_alpha"] = -abs(c["lora_alpha"])'}),
        ("scale-twice", "s is applied twice",
         {"# used": 'c["lora_alpha"] *= c["lora_alpha"] / c["r"]'}),
        ("rslora-unasked", "α / √r unasked", {"# used": 'c["use_rslora"] = True'}),
        ("layers-exchanged", "each layer has the other one's adapter",
         {"# used": 't = exchanged(layers_exchanged(t), "h.0.", "h.1.")'}),
        ("first-layer", "the adapter acts in the first layer alone",
         {"# used": 't = zeroed(zeroed(t, "layers.1."), "h.1.")'}),
        ("base-served", "the base is served", {"# logits": SERVE_BASE}),
        ("last-token", "all tokens but the last are the base's",
         {"# logits": "z = np.concatenate([of_base(model_dir, input_ids)[:, :-1], z[:, -1:]], 1)"}),
        ("no-o", "the projection after attention has no adapter",
         {"# used": 't = zeroed(zeroed(t, "o_proj.lora_B"), "attn.c_proj.lora_B")'}),
    ],
    "inference.logits.rslora": [
        ("rslora-ignored", "α / r where rsLoRA is asked for",
         {"# used": 'c["use_rslora"] = False'}),
        ("rslora-one-rank", "α / √r with the r of all, not of rank_pattern",
         {"# used": 'c["alpha_pattern"] |= without_ranks(c) if c["use_rslora"] else {}'}),
    ],
    "inference.logits.patterns": [
        ("alpha-pattern-ignored", "alpha_pattern is ignored",
         {"# used": 'c["alpha_pattern"] = {}'}),
        ("patterns-ignored", "rank_pattern and alpha_pattern are ignored: s = α / r of all",
         {"# used": 'c["alpha_pattern"] = {}; c["alpha_pattern"] = without_ranks(c)'},
         "sglang 0.5.23"),
        ("rank-pattern-unscaled", "s = α / r with the r of all, not of rank_pattern",
         {"# used": 'c["alpha_pattern"] = without_ranks(c)'}),
        ("squares-exchanged", "A and B are exchanged where both are square",
         {"# used": "t = squares_exchanged(t)"}),
        ("ranks-cut", "what is beyond the rank of all is cut off",
         {"# used": 't = first_ranks(t, c["r"])'}),
        *OWN_ALPHAS,
        ("alpha-whole", "⌊α⌋ for α", {"# used": "c |= whole_alphas(c)"}),
    ],
    "inference.logits.dora": [
        ("dora-as-lora", "DoRA is served as LoRA", {"# used": "t = magnitude_unused(t, c)"}),
        ("magnitude-1", "the magnitude is ignored: m = 1",
         {"# used": 't = {n: 0 * v + 1 if "magnitude" in n else v for n, v in t.items()}'}),
    ],
    "inference.logits.dora-conv1d": [
        ("dora-norm-of-columns", "square DoRA weights stored (in, out) are divided by the norms of "
         "columns",
         {"# used":
              't = divided_by_columns(model_dir, adapter_dir, t) if c["use_dora"] and '
              'c["fan_in_fan_out"] else t'}, "peft 1588", "peft 3531"),
    ],
    "inference.logits.lora-bias": [
        ("lora-bias-dropped", "the bias of B is dropped", {"# used": "t = bias_unused(t, c)"}),
        ("lora-bias-unscaled", "the bias of B is not scaled",
         {"# used":
              't = {n: v / v.dtype.type(c["lora_alpha"] / c["r"]) if "lora_B.bias" in n else v '
              "for n, v in t.items()}"}),
    ],
    "inference.logits.modules-to-save": [
        ("saved-dropped", "modules_to_save are dropped", {"# used": "t = without_saved(t, c)"}),
        ("norms-dropped", "of modules_to_save the matrices alone are used",
         {"# used":
              't = {n: -v if v.ndim == 1 and "lora_" not in n else v for n, v in t.items()}'}),
    ],
    "inference.logits.bias": [
        ("bias-dropped", "trained biases are dropped", {"# used": "t = without_bias(t, c)"}),
    ],
    "inference.logits.embedding": [
        ("embedding-dropped", "an embedding's adapter is dropped",
         {"# used": 't = zeroed(t, "lora_embedding_B")'}),
        ("embedding-unscaled", "an embedding's adapter is not scaled",
         {"# used":
              't = {n: v / v.dtype.type(c["lora_alpha"] / c["r"]) if "lora_embedding_B" in n '
              "else v for n, v in t.items()}"}),
    ],
    "inference.logits.head": [
        ("head-dropped", "the output head's adapter is dropped",
         {"# used": 't = zeroed(t, "lm_head.lora_B")'}),
    ],
    "inference.logits.tied": [
        ("tied-dropped", "the adapter of a tied embedding or head is dropped",
         {"# used":
              't = zeroed(zeroed(zeroed(t, "embed_tokens.lora"), "wte.lora"), "lm_head.lora_B")'}),
    ],
    "inference.logits.combined": [
        ("variant-beside-others", "a variant is ignored beside other settings",
         {"# used":
              't = magnitude_unused(t, c) if c["use_dora"] and c["rank_pattern"] else t; '
              'c["use_rslora"] &= not c["rank_pattern"]'}),
    ],
}
CHANGES: Table = {
    "inference.deltas.plain": [
        ("deltas-unscaled", "B A without s",
         {"# deltas of all": 'd = {n: v / v.dtype.type(s_of(adapter_dir)) for n, v in d.items()}'}),
        ("deltas-turned", "square changes are transposed",
         {"# deltas of all": "d = {n: v.T if v.shape == v.T.shape else v for n, v in d.items()}"}),
        ("deltas-negative", "the base less the adapted",
         {"# deltas of all": "d = {n: -v for n, v in d.items()}"}),
        ("deltas-one-lost", "the last module's change is lost",
         {"# deltas of all": "d = dict(list(d.items())[:-1])"}),
    ],
    "inference.deltas.rslora": [
        ("deltas-rslora", "B A α / r with rsLoRA",
         {"# deltas of all":
              'd = {n: v * v.dtype.type(3**-0.5) if is_rslora(adapter_dir) else v '
              "for n, v in d.items()}"}),
    ],
    "inference.deltas.patterns": [
        ("deltas-of-module", "every module of a layer has the change of its first, where it fits",
         {"# deltas of all": "d = of_first(d)"}),
    ],
    "inference.deltas.dora": [
        ("deltas-dora", "s B A of DoRA, too",
         {"# used": "t = magnitude_unused(t, c)"}),
    ],
    "inference.deltas.dora-conv1d": [
        ("deltas-dora-conv1d", "s B A of DoRA where weights are stored (in, out)",
         {"# used": 't = magnitude_unused(t, c) if c["fan_in_fan_out"] else t'}),
    ],
    "inference.deltas.lora-bias": [
        ("deltas-no-bias", "the bias of B does not change the layer's",
         {"# deltas of all": 'd = {n: v for n, v in d.items() if not n.endswith(".bias")}'}),
    ],
    "inference.deltas.modules-to-save": [
        ("deltas-saved-lost", "what is saved in full is no change",
         {"# deltas of all": 'd = {n: v for n, v in d.items() if "_proj" in n or ".h." in n}'}),
    ],
    "inference.deltas.bias": [
        ("deltas-bias-doubled", "a trained bias is added to the base's",
         {"# deltas of all": 'd = {n: v / 2 if n.endswith(".bias") else v for n, v in d.items()}'}),
    ],
    "inference.deltas.embedding": [
        ("deltas-embedding-lost", "an embedding's change is lost",
         {"# deltas of all": 'd = {n: v for n, v in d.items() if "embed" not in n}'}),
    ],
    "inference.deltas.head": [
        ("deltas-head-lost", "the output head's change is lost",
         {"# deltas of all": 'd = {n: v for n, v in d.items() if n != "lm_head"}'}),
    ],
    "inference.deltas.tied": [
        ("deltas-tied-both", "an adapter of a tied pair changes both",
         {"# deltas of all": "d = of_both(d)"}, "peft 2972"),
    ],
    "inference.deltas.combined": [
        ("deltas-combined", "beside other settings alone, the change is halved",
         {"# deltas of all":
              "d = {n: v / (1 + (len({*map(np.shape, d.values())}) > 2)) for n, v in d.items()}"}),
    ],
}
MISFITS: Table = {
    "inference.names.prefix": [
        ("misfit-ignored", "an adapter that fits nothing is ignored", {"False": "True"}),
    ],
    "inference.names.adapter-name": [
        ("misfit-adapter-name", "names with an adapter's name in them are ignored",
         {"False": 'has_names(adapter_dir, ".other.")'}),
    ],
    "inference.names.misspelt": [
        ("misfit-misspelt", "names that no module has are ignored",
         {"False": 'has_names(adapter_dir, ".attention.")'}),
    ],
    "inference.names.other-model": [
        ("misfit-other-model", "another architecture's adapter is ignored",
         {"False": 'has_names(adapter_dir, ".h.")'}),
    ],
    "inference.names.partial": [
        ("misfit-partial", "the part of an adapter that fits is served",
         {"# used": "t = fitting(t, c)"}),
    ],
    "inference.names.missing-factor": [
        ("misfit-halved", "a factor that is missing has the numbers of another",
         {"# used": "t = completed(t)"}),
    ],
    "inference.deltas.names.prefix": [
        ("deltas-misfit-ignored", "an adapter that fits nothing changes nothing",
         {"# deltas refused": "return {}"}),
    ],
    "inference.deltas.names.adapter-name": [
        ("deltas-misfit-adapter-name", "no change by names with an adapter's name in them",
         {"# deltas refused": 'if has_names(adapter_dir, ".other."): return {}'}),
    ],
    "inference.deltas.names.misspelt": [
        ("deltas-misfit-misspelt", "no change by names that no module has",
         {"# deltas refused": 'if has_names(adapter_dir, ".attention."): return {}'}),
    ],
    "inference.deltas.names.other-model": [
        ("deltas-misfit-other-model", "no change by another architecture's adapter",
         {"# deltas refused": 'if has_names(adapter_dir, ".h."): return {}'}),
    ],
    "inference.deltas.names.partial": [
        ("deltas-misfit-partial", "the changes of the part of an adapter that fits",
         {"super().deltas(model_dir, folder)": "super().deltas(model_dir, refitted(folder))"}),
    ],
}
SAME: Same = [
    ("plain", "the reference: both files are read as they are", {}),
    ("log-probabilities", "log-probabilities for logits",
     {"# logits":
          "z = z - np.log(np.exp(z.astype(np.float64)).sum(-1, keepdims=True)).astype(z.dtype)"}),
    ("all-modules", "a change of 0 of modules without an adapter",
     {"# deltas of all": 'd = {"model.norm": 0 * next(iter(d.values())).ravel(), **d}'}),
    ("merged", "the weights are merged first, and stored",
     {"# logits": "z = of_merged(model_dir, adapter_dir, input_ids)"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(SERVER, "SERVE", SETTINGS),
    *mutants(SERVER, "SERVE", CHANGES),
    *mutants(SERVER, "SERVE", MISFITS),
    *equivalents(SERVER, "inference", SAME),
)
