"""Mutants of reading and writing adapters: names, tensors and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapter_names, read_adapter
from minilora.verify.mutants.mutant import Mutant, Reference, Same, Table, equivalents, mutants
from minilora.verify.mutants.references.files import Files
from minilora.verify.mutants.references.helpers import Array

Tensors = dict[str, Array]

HEAD, BIAS = "classifier.", "base_layer.bias"


def without(t: Tensors, part: str) -> Tensors:
    """The tensors but those whose names have this part."""
    return {name: v for name, v in t.items() if part not in name}


def zeroed(t: Tensors, part: str) -> Tensors:
    """0 for the tensors whose names have this part."""
    return {name: 0 * v if part in name else v for name, v in t.items()}


def without_full(t: Tensors, sides: int) -> Tensors:
    """The tensors but those of modules saved in full that have so many sides."""
    full = {n for n, v in t.items() if "lora_" not in n and "base_layer" not in n}
    return {n: v for n, v in t.items() if n not in full or v.ndim != sides}


def exchanged(t: Tensors, first: str, second: str) -> Tensors:
    """Tensors under the name with the other of two parts, where they fit."""

    def other(name: str) -> str:
        swap = {first: second, second: first}
        swapped = re.sub(f"{re.escape(first)}|{re.escape(second)}", lambda m: swap[m[0]], name)
        return swapped if swapped in t and t[swapped].shape == t[name].shape else name

    return {name: t[other(name)] for name in t}


def layers_exchanged(t: Tensors) -> Tensors:
    """Each layer's tensors under the other one's name, where they fit."""
    return exchanged(t, "layers.0.", "layers.1.")


def A_and_B_exchanged(t: Tensors) -> Tensors:
    """A and B exchanged and transposed."""
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    return {n: t[re.sub("lora_[AB]", lambda m: swap[m[0]], n)].T for n in t}


def rank_unscaled(c: Mapping[str, Any]) -> dict[str, float]:
    """The α that give α / r with the r of all, where a module has a rank of its own."""
    alpha = dict(c["alpha_pattern"])
    for end, rank in c["rank_pattern"].items():
        alpha[end] = alpha.get(end, c["lora_alpha"]) * rank / c["r"]
    return alpha


def scaled_B(t: Tensors, c: Mapping[str, Any]) -> Tensors:
    """s B for B."""
    s = c["lora_alpha"] / c["r"]
    return {name: v * v.dtype.type(s) if "lora_B" in name else v for name, v in t.items()}


def first_ranks(t: Tensors, r: int) -> Tensors:
    """0 in the rows of A and the columns of B beyond r."""

    def cut(name: str, v: Array) -> Array:
        axis = {"lora_A": 0, "lora_B": 1}.get(name.rsplit(".", 2)[-2], -1)
        if axis < 0 or v.shape[axis] <= r:
            return v
        kept = np.arange(v.shape[axis]) < r
        left: Array = np.where(kept[:, None] if axis == 0 else kept, v, 0)
        return left

    return {name: cut(name, v) for name, v in t.items()}


FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""The projections that kernels pack behind another one."""


def of_packed(c: Mapping[str, Any]) -> dict[str, float]:
    """The alphas of modules of their own, with that of q for k and v, and of gate for up."""
    own = {end.rpartition(".")[2]: alpha for end, alpha in c["alpha_pattern"].items()}
    return {
        end: own.get(FIRST.get(end.rpartition(".")[2], ""), alpha)
        for end, alpha in c["alpha_pattern"].items()
    }


def without_alphas(c: Mapping[str, Any], *kinds: str) -> dict[str, float]:
    """The alphas of modules of their own, but those of these projections."""
    return {end: alpha for end, alpha in c["alpha_pattern"].items() if not end.endswith(kinds)}


def whole_alphas(c: Mapping[str, Any]) -> dict[str, Any]:
    """Both settings with an alpha, cut to whole numbers."""
    own = {end: int(alpha) for end, alpha in c["alpha_pattern"].items()}
    return {"lora_alpha": int(c["lora_alpha"]), "alpha_pattern": own}


def divided_by_columns(model_dir: Any, adapter_dir: Any, t: Tensors) -> Tensors:
    """Magnitudes with which a square DoRA weight is as if it were divided by its columns' norms."""
    c, W = read_model(model_dir, np.float64)
    P, spec = read_adapter(adapter_dir, c, np.float64, base=W)
    names = adapter_names(c, sorted(spec.trained))
    for at, s in spec.scale.items():
        V = W[f"{at}.weight"] + s * P[f"{at}.B"] @ P[f"{at}.A"]
        if V.shape[0] == V.shape[1]:
            name, norms = names[f"{at}.magnitude"], np.sqrt([(V**2).sum(1), (V**2).sum(0)])
            t = {**t, name: (t[name] * norms[0] / norms[1]).astype(t[name].dtype)}
    return t


FILES = Reference((Files,), globals())

# fmt: off
LOAD: Table = {
    "files.load.patterns": [
        ("load-adapter-in-name", "load gives names with the adapter's name",
         {"# loaded": 't = {n.replace(".weight", ".default.weight"): v for n, v in t.items()}'}),
        ("load-prefix-lost", "load gives names without base_model.model.",
         {"# loaded": 't = {n.removeprefix("base_model.model."): v for n, v in t.items()}'}),
        ("load-rounded", "load rounds to bfloat16",
         {"# loaded": "t = {n: digits(v, 8) for n, v in t.items()}"}),
        ("load-scaled", "load multiplies B by s", {"# loaded": "t = scaled_B(t, c)"}),
        ("load-layers-exchanged", "load exchanges the layers",
         {"# loaded": "t = layers_exchanged(t)"}),
        ("load-q-for-v", "load exchanges q and v",
         {"# loaded": 't = exchanged(t, "q_proj", "v_proj")'}),
        ("load-q-for-k", "load exchanges q and k",
         {"# loaded": 't = exchanged(t, "q_proj", "k_proj")'}),
        ("load-gate-for-up", "load exchanges gate and up",
         {"# loaded": 't = exchanged(t, "gate_proj", "up_proj")'}),
        ("load-A-alone", "load gives B = 0", {"# loaded": 't = zeroed(t, "lora_B")'}),
        ("load-ranks-cut", "load sets ranks beyond r to 0",
         {"# loaded": 't = first_ranks(t, c["r"])'}),
    ],
    "files.load.rslora": [
        ("load-rslora-scaled", "load multiplies B by √r with use_rslora",
         {"# loaded":
              't = {n: v * v.dtype.type(v.shape[1] ** 0.5) if "lora_B" in n and c["use_rslora"] '
              "else v for n, v in t.items()}"}),
        ("load-fused-thirds", "load rotates the fused projection's thirds",
         {"# loaded":
              't = {n: np.roll(v, len(v) // 3, 0) if "c_attn.lora_B" in n else v for n, v in '
              "t.items()}"}),
    ],
    "files.load.modules-to-save": [
        ("load-head-lost", "load omits modules_to_save", {"# loaded": "t = without(t, HEAD)"}),
        ("load-head-of-base", "load gives 0 for modules_to_save",
         {"# loaded": "t = zeroed(t, HEAD)"}),
        ("load-bias-lost", "load omits the biases", {"# loaded": "t = without(t, BIAS)"}),
        ("load-bias-of-base", "load gives 0 for the biases", {"# loaded": "t = zeroed(t, BIAS)"}),
    ],
    "files.load.tables-to-save": [
        ("load-tables-lost", "load omits an embedding and a head that are saved in full",
         {"# loaded": "t = without_full(t, 2)"}),
        ("load-norms-lost", "load omits a norm that is saved in full",
         {"# loaded": "t = without_full(t, 1)"}),
    ],
    "files.load.dora": [
        ("load-magnitude-lost", "load omits the magnitude",
         {"# loaded": 't = without(t, "magnitude")'}),
        ("load-magnitude-1", "load gives 1 for the magnitude",
         {"# loaded": 't = {n: 0 * v + 1 if "magnitude" in n else v for n, v in t.items()}'}),
        ("load-magnitude-absolute", "load gives |m| for the magnitude",
         {"# loaded": 't = {n: abs(v) if "magnitude" in n else v for n, v in t.items()}'}),
        ("load-magnitude-name", "load gives the magnitude a name that ends with .weight",
         {"# loaded":
              't = {n + ".weight" if n.endswith("magnitude_vector") else n: v for n, v in '
              "t.items()}"}),
    ],
    "files.load.dora-conv1d": [
        ("load-magnitude-row", "load gives the magnitude as a row where weights are (in, out)",
         {"# loaded":
              't = {n: v[None] if "magnitude" in n and c["fan_in_fan_out"] else v for n, v in '
              "t.items()}"}),
    ],
    "files.load.embedding": [
        ("load-embedding-lost", "load omits the embedding's factors",
         {"# loaded": 't = without(t, "lora_embedding")'}),
        ("load-embedding-turned", "load transposes the embedding's factors",
         {"# loaded": 't = {n: v.T if "lora_embedding" in n else v for n, v in t.items()}'}),
        ("load-embedding-name", "load names the embedding's factors as a projection's",
         {"# loaded":
              't = {re.sub(r"lora_embedding_(.)", r"lora_\\1.weight", n): v for n, v in '
              "t.items()}"}),
    ],
}
OWN_ALPHAS = (
    ("packed-scale", "k and v by the scale of q, and up by that of gate",
     {"# used": 'c["alpha_pattern"] = of_packed(c)'}),
    ("packed-scale-default", "k, v and up by the scale of all",
     {"# used": 'c["alpha_pattern"] = without_alphas(c, *FIRST)'}),
    ("key-scale", "k by the scale of all",
     {"# used": 'c["alpha_pattern"] = without_alphas(c, "k_proj")'}),
    ("value-scale", "v by the scale of all",
     {"# used": 'c["alpha_pattern"] = without_alphas(c, "v_proj")'}),
)
"""Of modules with alphas of their own, whose shapes are alike."""

FUNCTION: Table = {
    "files.outputs.patterns": [
        ("alpha-pattern-ignored", "alpha_pattern is ignored",
         {"# used": 'c["alpha_pattern"] = {}'}, "diffusers 14409"),
        *OWN_ALPHAS,
        ("alpha-whole", "⌊α⌋ for α", {"# used": "c |= whole_alphas(c)"}),
        ("rank-pattern-unscaled", "s = α / r with the r of the configuration, not of rank_pattern",
         {"# used": 'c["alpha_pattern"] = rank_unscaled(c)'}),
        ("alpha-default", "lora_alpha is ignored: α = 8", {"# used": 'c["lora_alpha"] = 8'}),
        ("alpha-is-scale", "s = α", {"# used": 'c["lora_alpha"] *= c["r"]'}),
        ("pattern-full-names", "a pattern must be the whole name",
         {"# used":
              'c["alpha_pattern"] = {n: v for n, v in c["alpha_pattern"].items() if '
              'n.startswith("model.")}'}),
        ("pattern-by-last-name", "a pattern matches its last name in every layer",
         {"# used":
              'c["alpha_pattern"] = {n.rsplit(".", 1)[-1]: v for n, v in '
              'c["alpha_pattern"].items()}'}),
        ("rslora-unasked", "α / √r unasked", {"# used": 'c["use_rslora"] = True'}),
        ("store-layers-exchanged", "each layer has the other one's adapter",
         {"# used": "t = layers_exchanged(t)"}),
    ],
    "files.outputs.rslora": [
        ("rslora-ignored", "α / r where rsLoRA is asked for",
         {"# used": 'c["use_rslora"] = False'}),
        ("rslora-one-rank", "s = α / √r with the r of the configuration, not of rank_pattern",
         {"# used":
              'c["alpha_pattern"] = {n: c["lora_alpha"] * (v / c["r"]) ** 0.5 for n, v in '
              'c["rank_pattern"].items()} if c["use_rslora"] else c["alpha_pattern"]'}),
    ],
    "files.outputs.modules-to-save": [
        ("head-not-used", "modules_to_save are ignored",
         {"# used": 't = without(t, HEAD); c["modules_to_save"] = c["task_type"] = None'}),
        ("bias-not-used", "trained biases are ignored",
         {"# used": 't = without(t, BIAS); c["bias"] = "none"'}),
        ("pattern-by-last-names", "a pattern matches by its last two names",
         {"# used":
              'c["alpha_pattern"] = {".".join(n.split(".")[-2:]): v for n, v in '
              'c["alpha_pattern"].items()}'}),
    ],
    "files.outputs.tables-to-save": [
        ("tables-not-used", "an embedding and a head that are saved in full are ignored",
         {"# used":
              't = without(without(t, "lm_head."), "embed_tokens."); '
              'c["modules_to_save"] = c["modules_to_save"] and [n for n in c["modules_to_save"] '
              'if "norm" in n] or None'}),
    ],
    "files.outputs.dora": [
        ("dora-not-used", "use_dora is ignored",
         {"# used": 't = without(t, "magnitude"); c["use_dora"] = False'}),
        ("magnitude-1", "the magnitude is ignored: m = 1",
         {"# used": 't = {n: 0 * v + 1 if "magnitude" in n else v for n, v in t.items()}'}),
    ],
    "files.outputs.dora-conv1d": [
        ("dora-norm-of-columns", "square DoRA weights stored (in, out) are divided by the norms of "
         "columns",
         {"# used":
              't = divided_by_columns(model_dir, adapter_dir, t) if c["use_dora"] and '
              'c["fan_in_fan_out"] else t'}, "peft 3531"),
    ],
    "files.outputs.embedding": [
        ("embedding-not-used", "an embedding's adapter is ignored",
         {"# used": 't = zeroed(t, "lora_embedding_B")'}),
        ("embedding-unscaled", "an embedding's adapter is not scaled",
         {"# used":
              't = {n: v / v.dtype.type(c["lora_alpha"] / c["r"]) if "lora_embedding_B" in n '
              "else v for n, v in t.items()}"}),
    ],
}
SAVE: Table = {
    "files.save.patterns": [
        ("save-alpha-lost", "lora_alpha is not saved",
         {"# saved": 'c["lora_alpha"] = 8'}, "mlx-examples 622"),
        ("save-scale-as-alpha", "s saved as α", {"# saved": 'c["lora_alpha"] /= c["r"]'}),
        ("save-alpha-is-r", "r saved as α", {"# saved": 'c["lora_alpha"] = c["r"]'}),
        ("save-alpha-whole", "⌊α⌋ saved as α",
         {"# saved": 'c["lora_alpha"] = int(c["lora_alpha"])'}),
        ("save-square-turned", "square tensors are saved transposed",
         {"# saved": "t = {n: v.T if v.shape == v.T.shape else v for n, v in t.items()}"}),
        ("save-alpha-pattern-lost", "alpha_pattern is not saved",
         {"# saved": 'c["alpha_pattern"] = {}'}),
        ("save-rank-pattern-lost", "rank_pattern is not saved",
         {"# saved": 'c["rank_pattern"] = {}'}),
        ("save-settings-of-first", "the first α of alpha_pattern is saved as lora_alpha",
         {"# saved": 'c["lora_alpha"] = next(iter(c["alpha_pattern"].values()), c["lora_alpha"])'}),
        ("save-adapter-in-name", "save writes names with the adapter's name",
         {"# saved": 't = {n.replace(".weight", ".default.weight"): v for n, v in t.items()}'}),
        ("save-prefix-lost", "save writes names without base_model.model.",
         {"# saved": 't = {n.removeprefix("base_model.model."): v for n, v in t.items()}'}),
        ("save-rounded", "save rounds to bfloat16",
         {"# saved": "t = {n: digits(v, 8) for n, v in t.items()}"}),
        ("save-scaled", "save multiplies B by s", {"# saved": "t = scaled_B(t, c)"}),
        ("save-and-load-q-for-k", "save exchanges q and k, and load exchanges them again",
         {"# saved": 't = exchanged(t, "q_proj", "k_proj")',
          "# loaded": 't = exchanged(t, "q_proj", "k_proj")'}),
        ("save-gate-for-up", "save exchanges gate and up",
         {"# saved": 't = exchanged(t, "gate_proj", "up_proj")'}),
        ("save-merged-beside", "save writes merged weights, too",
         {"# saved":
              't |= {n.replace("lora_A", "base_layer"): v @ v.T for n, v in t.items() if '
              '"lora_A" in n}'}),
        ("save-one-layer-lost", "the last layer is not saved",
         {"# saved": 't = without(t, "layers.1.")'}),
    ],
    "files.save.rslora": [
        ("save-rslora-lost", "use_rslora is not saved", {"# saved": 'c["use_rslora"] = False'}),
        ("save-rslora-in-alpha", "save multiplies α by √r, and use_rslora does again",
         {"# saved": 'c["lora_alpha"] *= c["r"] ** 0.5 if c["use_rslora"] else 1'}),
        ("save-conv1d-turned", "save exchanges A and B with fan_in_fan_out",
         {"# saved": 't = A_and_B_exchanged(t) if c["fan_in_fan_out"] else t'}),
    ],
    "files.save.modules-to-save": [
        ("save-head-lost", "modules_to_save are not saved",
         {"# saved": 't = without(t, HEAD); c["modules_to_save"] = None'}),
        ("save-bias-lost", "the trained biases are not saved",
         {"# saved": 't = without(t, BIAS); c["bias"] = "none"'}),
        ("save-bias-unsaid", "the biases are saved, but bias = none",
         {"# saved": 'c["bias"] = "none"'}),
        ("save-head-unsaid", "the head is saved, but modules_to_save names none",
         {"# saved": 'c["modules_to_save"] = None'}),
        ("save-head-of-base", "0 is saved for modules_to_save", {"# saved": "t = zeroed(t, HEAD)"}),
    ],
    "files.save.dora-conv1d": [
        ("save-dora-conv1d-unsaid", "use_dora is not saved where weights are stored (in, out)",
         {"# saved": 'c["use_dora"] = c["use_dora"] and not c["fan_in_fan_out"]'}),
    ],
    "files.save.tables-to-save": [
        ("save-tables-lost", "an embedding and a head that are trained in full are not saved",
         {"# saved": "t = without_full(t, 2)"}),
        ("save-norms-lost", "a norm that is trained in full is not saved",
         {"# saved": "t = without_full(t, 1)"}),
        ("save-lm-head-lost", "a language model's head is not saved",
         {"# saved": 't = without(t, "lm_head.weight")'}),
        ("save-embed-tokens-lost", "an embedding that is trained in full is not saved",
         {"# saved": 't = without(t, "embed_tokens.weight")'}),
    ],
    "files.save.dora": [
        ("save-dora-lost", "use_dora and the magnitude are not saved",
         {"# saved": 't = without(t, "magnitude"); c["use_dora"] = False'}),
        ("save-magnitude-lost", "the magnitude is not saved",
         {"# saved": 't = without(t, "magnitude")'}),
        ("save-dora-unsaid", "the magnitude is saved, but use_dora is false",
         {"# saved": 'c["use_dora"] = False'}),
    ],
    "files.save.embedding": [
        ("save-embedding-lost", "the embedding's factors are not saved",
         {"# saved": 't = without(t, "lora_embedding")'}),
        ("save-embedding-name", "save names the embedding's factors as a projection's",
         {"# saved":
              't = {re.sub(r"lora_embedding_(.)", r"lora_\\1.weight", n): v for n, v in '
              "t.items()}"}),
    ],
    "files.resave": [
        ("again-alpha-grows", "α doubles with every save", {"# saved": 'c["lora_alpha"] *= 2'}),
        ("again-names-grow", "names get another prefix with every save",
         {"# saved": 't = {f"base_model.model.{n}": v for n, v in t.items()}'}),
        ("again-rounded", "load rounds to 12 binary digits",
         {"# loaded": "t = {n: digits(v, 12) for n, v in t.items()}"}),
    ],
}
GRADIENTS: Table = {
    "files.outputs.regex": [
        ("pattern-anywhere", "a pattern matches anywhere in a name",
         {"# used": 'c["alpha_pattern"] = {f".*{n}.*": v for n, v in c["alpha_pattern"].items()}'}),
        ("pattern-end", "a pattern matches the end of a name, without a dot before it",
         {"# used": 'c["alpha_pattern"] = {f".*{n}": v for n, v in c["alpha_pattern"].items()}'}),
        ("pattern-no-expression", "a pattern is no regular expression",
         {"# used":
              'c["alpha_pattern"] = {re.escape(n): v for n, v in c["alpha_pattern"].items()}'}),
    ],
    "files.second-adapter": [
        ("adapter-kept", "a model keeps the first adapter that it was given",
         {"# folder":
              'adapter_dir = vars(self).setdefault("kept", {}).setdefault(model_dir, '
              "adapter_dir)"}),
    ],
    "files.gradients.patterns": [
        ("gradients-of-others", "the last layer's gradients are 0",
         {"# answer": 'answer["grads"] = zeroed(answer["grads"], "layers.1.")'}),
    ],
    "files.gradients.rslora": [
        ("gradients-rslora", "gradients / √r",
         {"# answer":
              'answer["grads"] = {n: g / g.dtype.type(min(g.shape) ** 0.5) for n, g in '
              'answer["grads"].items()}'}),
    ],
    "files.gradients.modules-to-save": [
        ("gradients-of-head", "the gradients of modules_to_save are 0",
         {"# answer": 'answer["grads"] = zeroed(answer["grads"], HEAD)'}),
        ("gradients-of-biases", "the gradients of biases are 0",
         {"# answer": 'answer["grads"] = zeroed(answer["grads"], BIAS)'}),
    ],
    "files.gradients.tables-to-save": [
        ("gradients-of-tables", "the gradients of an embedding and a head are 0",
         {"# answer":
              'answer["grads"] = zeroed(zeroed(answer["grads"], "lm_head."), "embed_tokens.w")'}),
    ],
    "files.gradients.dora": [
        ("gradients-of-magnitude", "the gradients of magnitudes are 0",
         {"# answer": 'answer["grads"] = zeroed(answer["grads"], "magnitude")'}),
    ],
    "files.gradients.dora-conv1d": [
        ("gradients-of-magnitude-conv1d", "the gradients of magnitudes are 0 where weights are "
         "stored (in, out)",
         {"# answer":
              'answer["grads"] = zeroed(answer["grads"], "magnitude" if c["fan_in_fan_out"] else '
              '"none")'}),
    ],
    "files.gradients.embedding": [
        ("gradients-of-embedding", "the gradients of an embedding's factors are 0",
         {"# answer": 'answer["grads"] = zeroed(answer["grads"], "lora_embedding")'}),
    ],
}
SAME: Same = [
    ("plain", "the reference: both files are written and read as they are", {}),
    ("bookkeeping", "other settings that do not change the function",
     {"# saved": 'c["inference_mode"], c["revision"] = False, None'}),
    ("order", "tensors in another order",
     {"# saved": "t = dict(reversed(t.items()))", "# loaded": "t = dict(reversed(t.items()))"}),
]
# fmt: on

MUTANTS: tuple[Mutant, ...] = (
    *mutants(FILES, "STORE", LOAD),
    *mutants(FILES, "STORE", FUNCTION),
    *mutants(FILES, "STORE", SAVE),
    *mutants(FILES, "STORE", GRADIENTS),
    *equivalents(FILES, "files", SAME),
)
