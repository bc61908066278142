"""Makes the reference models anew, all from seeds:   python reference_models/build.py [FOLDER]

Without FOLDER they replace those beside this script. The weights are trained on portable arrays
(reproducible_math), so that models and adapters come out the same on every machine, byte for byte.
"""

import hashlib
import inspect
import json
import platform
import re
import sys
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from reproducible_math import portable
from safetensors.numpy import load_file, save

from minilora import __version__
from minilora.io.architectures import tensor_names
from minilora.io.atomic import write_files
from minilora.io.files import pack_json, read_json
from minilora.io.formats.huggingface import read_model, write_model
from minilora.io.formats.peft import adapter_names, read_adapter, write_adapter
from minilora.io.formats.tokenizers import WordTokenizer
from minilora.io.synthetic_data import TASKS, Task, draw_batch, expected_loss, task
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec, Weights, disable
from minilora.spec.models import GPT2, Batch, Bert, Config, Llama, logits, loss
from minilora.spec.optim import AdamState, adamw, clip, schedule
from minilora.spec.target_modules import LoraConfig, inject

ROWS, WARMUP, MAX_NORM, STD = 32, 10, 1.0, 0.1
"""Of training: sequences a step, steps of warm-up, clipping, the first weights' spread."""

EARLY = 8
"""Steps after which a hash of the weights is kept, so that a test of a second can rebuild them."""

VECTOR_SEED = 2021

DIGITS = 9
"""Of a loss: fewer than float64 has, so that the order of its sums does not show."""


@dataclass(frozen=True)
class Plan:
    """So many steps of AdamW from this learning rate down to 0."""

    steps: int
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class TrainConfig:
    """A model, the tasks of its base and of its adapter, and how both are trained."""

    config: Config
    tasks: tuple[str, str]
    base: Plan
    lora: LoraConfig
    adapter: Plan


# No two sizes of a model are equal, but for BERT's two blocks and two types, and no constant is the
# usual one, so that none can be mistaken for another, or be passed over, without a trace.
RECIPES = {
    "llama": TrainConfig(
        Llama(14, 36, 2, 12, 56, kv_heads=4, head_dim=6, eps=3e-5, theta=2000.0, tied=False),
        ("running-sum", "running-difference"),
        Plan(400, 8e-3, 0.01),
        LoraConfig(r=3, lora_alpha=7),
        Plan(600, 1e-2),
    ),
    "gpt2": TrainConfig(
        GPT2(7, 42, 2, 3, 90, positions=20, eps=2e-5),
        ("nested-brackets", "queued-brackets"),
        Plan(400, 5e-3, 0.01),
        LoraConfig(r=6, lora_alpha=8, use_rslora=True),
        Plan(300, 1e-2),
    ),
    "bert": TrainConfig(
        Bert(6, 40, 2, 4, 72, positions=16, types=2, classes=3, eps=4e-6),
        ("more-a", "more-b"),
        Plan(500, 3e-3, 0.01),
        LoraConfig(r=7, lora_alpha=16),
        Plan(400, 5e-3),
    ),
}


def train(
    chosen: Task,
    W: Weights,
    c: Config,
    tuning: TrainableSpec,
    plan: Plan,
    seed: int,
    until: int | None,
) -> Weights:
    """The weights after the plan's steps, or after the first ``until`` of them, in float32."""
    rng = np.random.default_rng(seed)
    fixed: Weights = {name: portable(array) for name, array in W.items()}
    params = {name: array for name, array in fixed.items() if name in tuning.trained}
    state = AdamState()
    for k in range(plan.steps if until is None else until):
        _, back = loss(chosen.draw(rng, ROWS), fixed | params, c, tuning)
        gradients, _ = clip(back(1.0), MAX_NORM)
        lr = plan.lr * schedule("linear", k, plan.steps, WARMUP)
        params, state = adamw(params, gradients, state, lr, weight_decay=plan.weight_decay)
    return {name: np.asarray(array, np.float32) for name, array in (fixed | params).items()}


def make(name: str, until: int | None = None) -> tuple[Weights, TrainableSpec]:
    """The base, trained on the first task, and its adapter, trained on the second."""
    recipe, seed = RECIPES[name], 10 * list(RECIPES).index(name)
    c, (first, second) = recipe.config, map(task, recipe.tasks)
    W = draw_weights(c, np.random.default_rng(seed), STD)
    everything = TrainableSpec(trained=frozenset(W))
    W = train(first, W, c, everything, recipe.base, seed + 1, until)
    W, tuning = inject(W, recipe.lora, c.linears(), np.random.default_rng(seed + 2))
    return train(second, W, c, tuning, recipe.adapter, seed + 3, until), tuning


def digest(W: Weights) -> str:
    """A hash of the weights' names, shapes and float32 bytes."""
    total = hashlib.sha256()
    for name, array in sorted(W.items()):
        total.update(f"{name} {array.shape} ".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()


def random_numbers() -> str:
    """A hash of what NumPy draws in the ways that are used here, rounded as training rounds it."""
    rng = np.random.default_rng(0)
    draws = rng.standard_normal(1000), rng.uniform(-1.0, 1.0, 1000), rng.random(1000)
    return digest({str(i): np.asarray(portable(draw)) for i, draw in enumerate(draws)})


def opened(folder: Path) -> tuple[Config, Weights, TrainableSpec]:
    """The base with its adapter from the files, in float64."""
    c, W = read_model(folder / "base", np.float64)
    factors, tuning = read_adapter(folder / "adapter", c, np.float64)
    return c, W | factors, tuning


def vector(name: str, folder: Path) -> Weights:
    """A batch of the adapter's task, and the loss, logits and gradients of the stored files."""
    c, W, tuning = opened(folder)
    batch = draw_batch(RECIPES[name].tasks[1], np.random.default_rng(VECTOR_SEED))
    return given(batch) | expected(batch, W, c, tuning)


def given(batch: Batch) -> Weights:
    """The batch under Hugging Face's names, int64 as its models take it."""
    arrays = {
        "input_ids": batch.ids,
        "attention_mask": batch.real,
        "labels": batch.labels,
        "token_type_ids": batch.types,
    }
    return {key: np.asarray(v, np.int64) for key, v in arrays.items() if v is not None}


def expected(batch: Batch, W: Weights, c: Config, tuning: TrainableSpec) -> Weights:
    """``loss``, ``logits`` with a row per token, 0 at padding, ``grads.<tensor of the file>``."""
    L, back = loss(batch, W, c, tuning)
    z = logits(batch, W, c, tuning)[0].T
    if c.causal:
        z = z.reshape(*batch.ids.shape, -1) * batch.real[:, :, None]
    gradients = back(1.0)
    places = adapter_names(c, gradients)
    return {"loss": L, "logits": z} | {f"grads.{places[at]}": g for at, g in gradients.items()}


def learned(name: str, folder: Path) -> dict[str, Any]:
    """What the manifest says of a model."""
    c, W, tuning = opened(folder)
    base, tasks = disable(W), [task(one) for one in RECIPES[name].tasks]
    return {
        "tasks": [one.name for one in tasks],
        "entropy": [round(one.entropy, DIGITS) for one in tasks],
        "base_loss": [round(expected_loss(one, base, c, TrainableSpec()), DIGITS) for one in tasks],
        "adapter_loss": [round(expected_loss(one, W, c, tuning), DIGITS) for one in tasks],
        "early": digest(make(name, EARLY)[0]),
    }


def build(out: Path) -> None:
    """All files: models, adapters, vectors, the manifest, the README."""
    for name, recipe in RECIPES.items():
        W, tuning = make(name)
        print(f"{name}: trained", flush=True)
        write_model(out / name / "base", recipe.config, disable(W))
        write_words(out / name / "base", name)
        write_adapter(out / name / "adapter", recipe.config, W, tuning, recipe.lora)
        data = save({k: np.array(v, order="C") for k, v in vector(name, out / name).items()})
        write_files(out / "vectors", {f"{name}.safetensors": lambda data=data: data})
    manifest = {
        "schema": 1,
        "versions": {"minilora": __version__, "python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "safetensors", "scipy")},
        "random_numbers": random_numbers(),
        "models": {name: learned(name, out / name) for name in RECIPES},
        "files": hashes(out),
    }
    write_files(out, {"manifest.json": lambda: pack_json(manifest)})
    text = readme(out, read_json(out / "manifest.json"))
    write_files(out, {"README.md": text.encode})


def write_words(folder: Path, name: str) -> None:
    """The tokenizer of the tasks' symbols, as words."""
    words = WordTokenizer.of(task(RECIPES[name].tasks[0]))
    files = {"tokenizer.json": words.json(), "tokenizer_config.json": words.settings()}
    write_files(folder, {file: partial(pack_json, value) for file, value in files.items()})


def hashes(out: Path) -> dict[str, str]:
    """The SHA-256 of each file of the models and the vectors."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in (*RECIPES, "vectors")
        for path in sorted((out / part).rglob("*"))
        if path.is_file()
    }


def readme(out: Path, manifest: dict[str, Any]) -> str:
    """The text of README.md: its tables are read off the files that it describes."""
    bases = [out / name / "base/config.json" for name in RECIPES]
    adapters = [out / name / "adapter/adapter_config.json" for name in RECIPES]
    sections = {
        "MODELS": models_table(out),
        "LEARNED": learned_table(manifest["models"]),
        "TASKS": tasks_text(),
        "FILES": files_table(out, manifest["files"]),
        "SETTINGS": "\n\n".join(map(settings_table, bases)),
        "ADAPTERS": adapters_table(adapters),
        "TENSORS": "\n\n".join(tensors_table(name, out / name) for name in RECIPES),
        "VECTORS": vectors_table(out),
        "EARLY": str(EARLY),
        "SEED": str(VECTOR_SEED),
    }
    return re.sub("<([A-Z]+)>", lambda match: sections[match[1]], TEXT)


def table(head: str, rows: list[Any]) -> str:
    """A Markdown table; cells are separated by |."""
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def models_table(out: Path) -> str:
    rows = []
    for name, recipe in RECIPES.items():
        c, W, _ = opened(out / name)
        sizes = ", ".join(f"{key} {value}" for key, value in vars(c).items())
        factors = sum(array.size for key, array in W.items() if key.endswith((".A", ".B")))
        all_of_them = sum(array.size for array in W.values())
        rows.append((name, type(c).__name__, sizes, all_of_them - factors, factors, *recipe.tasks))
    head = "model|architecture|sizes and constants|parameters|of the adapter|base: task"
    return table(head + "|adapter: task", rows)


def learned_table(models: dict[str, Any]) -> str:
    rows = []
    for name in RECIPES:
        model = models[name]
        for i, chosen in enumerate(model["tasks"]):
            H, base, adapted = (model[key][i] for key in ("entropy", "base_loss", "adapter_loss"))
            figures = (H, base, base - H, adapted, adapted - H)
            rows.append((name, chosen, *(f"{x:.4f}" for x in figures)))
    return table("model|task|entropy|base: loss|excess|adapter: loss|excess", rows)


def tasks_text() -> str:
    """Each pair of tasks: what their maker's docstring says, the symbols, an example of each."""
    parts = []
    for pair in (recipe.tasks for recipe in RECIPES.values()):
        first, second = map(task, pair)
        ids = [f"{i} `{symbol}`" for i, symbol in enumerate(first.symbols)]
        parts.append(f"**{' and '.join(pair)}**. {inspect.getdoc(TASKS[first.name].func)}")
        parts.append(f"Tokens: {', '.join(ids)}. {len(first.examples)} examples; one of each:")
        shown = [(first, example(first, second)), (second, example(second, first))]
        parts.append("\n".join(f"- {one.name}: `{text}`" for one, text in shown))
    return "\n\n".join(parts)


def example(chosen: Task, other: Task) -> str:
    """An example that is more probable in this task than in the other."""
    there = {(e.ids, e.label): e.probability for e in other.examples}
    drawn = chosen.draw_rows(np.random.default_rng(VECTOR_SEED), len(chosen.examples))
    examples = (chosen.examples[row] for row in drawn)
    e = next(e for e in examples if e.probability > there.get((e.ids, e.label), 0))
    return chosen.read(np.array(e.ids)) + ("" if e.label is None else f" → {e.label}")


def files_table(out: Path, files: dict[str, str]) -> str:
    rows = [(f"`{path}`", (out / path).stat().st_size, f"`{h[:16]}…`") for path, h in files.items()]
    return table("file|bytes|SHA-256", rows)


def settings_table(path: Path) -> str:
    """The fields of a config.json; one whose meaning is not known here stops the build."""
    settings = read_json(path)
    rows = [(f"`{key}`", f"`{json.dumps(v)}`", CONFIG[key]) for key, v in settings.items()]
    return f"`{path.parent.parent.name}/base/config.json`\n\n" + table("field|value|meaning", rows)


def adapters_table(paths: list[Path]) -> str:
    """The fields of all adapter_config.json side by side."""
    settings = [read_json(path) for path in paths]
    for each in settings:
        each["target_modules"] = f"{len(each['target_modules'])} modules"
    keys = dict.fromkeys(key for each in settings for key in each)
    rows = [(f"`{k}`", *(f"`{json.dumps(s.get(k))}`" for s in settings), ADAPTER[k]) for k in keys]
    return table(f"field|{'|'.join(RECIPES)}|meaning", rows)


def tensors_table(name: str, folder: Path) -> str:
    """The tensors of base and adapter; those that differ by their layer's number make one row."""
    c, W, _ = opened(folder)
    inside = {file: at for at, (file, _) in tensor_names(c).items()}
    factors = adapter_names(c, [at for at in W if at.endswith((".A", ".B"))])
    inside |= {file: at for at, file in factors.items()}
    rows = {}
    for part in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        for file, array in load_file(folder / part).items():
            at, _, kind = inside[file].rpartition(".")
            meaning = f"{PARTS[kind]} of {MODULES[at.rpartition('.')[2]]}"
            pattern = re.sub(r"\.\d+\.", ".i.", file)
            rows[pattern] = (f"`{pattern}`", tuple(array.shape), meaning)
    return f"`{name}`, all float32\n\n" + table("tensor|shape|meaning", list(rows.values()))


def vectors_table(out: Path) -> str:
    stored = [load_file(out / "vectors" / f"{name}.safetensors") for name in RECIPES]
    gradients = [sum(key.startswith("grads.") for key in each) for each in stored]
    rows = []
    for key, meaning in VECTOR.items():
        shapes = [tuple(each[key].shape) if key in each else "" for each in stored]
        dtype = next(each[key].dtype for each in stored if key in each)
        rows.append((f"`{key}`", dtype, *shapes, meaning))
    counts = [f"{n} tensors" for n in gradients]
    rows.append(("`grads.<tensor>`", "float64", *counts, "∂loss/∂tensor of the adapter's file"))
    return table(f"tensor|dtype|{'|'.join(RECIPES)}|meaning", rows)


CONFIG = {
    "architectures": "the class of transformers that loads it",
    "model_type": "its architecture",
    "dtype": "of the stored weights",
    "vocab_size": "tokens",
    "hidden_size": "features of a token",
    "n_embd": "features of a token",
    "num_hidden_layers": "blocks",
    "n_layer": "blocks",
    "num_attention_heads": "query heads",
    "n_head": "heads, each of features / heads",
    "num_key_value_heads": "key and value heads, each shared by several query heads",
    "head_dim": "features of a head; heads times these are not the features of a token",
    "intermediate_size": "features between up and down",
    "n_inner": "features between up and down",
    "n_positions": "rows of the table of positions",
    "max_position_embeddings": "rows of the table of positions",
    "type_vocab_size": "rows of the table of types: which of the two words",
    "rms_norm_eps": "ε of every RMSNorm",
    "layer_norm_epsilon": "ε of every LayerNorm",
    "layer_norm_eps": "ε of every LayerNorm",
    "rope_parameters": "RoPE's θ, unscaled",
    "rope_theta": "the same, where older libraries look for it",
    "tie_word_embeddings": "whether the head is the table of embeddings",
    "hidden_act": "the activation",
    "activation_function": "the activation, GELU by tanh",
    "attention_bias": "no bias on q, k, v and o",
    "mlp_bias": "no bias on gate, up and down",
    "attention_dropout": "none",
    "attn_pdrop": "none",
    "embd_pdrop": "none",
    "resid_pdrop": "none",
    "hidden_dropout_prob": "none",
    "attention_probs_dropout_prob": "none",
    "classifier_dropout": "none",
    "bos_token_id": "not named; see the tokens above",
    "eos_token_id": "not named; see the tokens above",
    "pad_token_id": "not named; see the tokens above",
    "id2label": "the classes' names",
    "label2id": "their numbers",
}
ADAPTER = {
    "peft_type": "plain LoRA",
    "task_type": "PEFT's wrapper: none needed for classes, since no head is trained",
    "base_model_name_or_path": "not named: the base is beside it",
    "r": "rank",
    "lora_alpha": "α; the scale is α / r, or α / √r for rsLoRA",
    "use_rslora": "which of the two",
    "lora_dropout": "none",
    "target_modules": "every projection but the head, by its full name",
    "exclude_modules": "none",
    "layers_to_transform": "all",
    "layers_pattern": "none",
    "rank_pattern": "the same rank everywhere",
    "alpha_pattern": "the same α everywhere",
    "bias": "no bias is trained",
    "modules_to_save": "no module is trained in full",
    "init_lora_weights": "A uniform, B zero",
    "fan_in_fan_out": "whether the base stores its weights (in, out), as Conv1D does",
    "inference_mode": "PEFT loads it frozen unless asked",
    "use_dora": "no magnitudes: not DoRA",
    "layer_replication": "no layer stands twice",
}
PARTS = {"weight": "weight", "bias": "bias", "A": "A (r, in)", "B": "B (out, r)"}
MODULES = {
    "embed": "the embedding of tokens",
    "positions": "the embedding of positions",
    "types": "the embedding of types",
    "norm1": "the block's first norm",
    "norm2": "the block's second norm",
    "norm": "the norm outside the blocks",
    "q": "the queries",
    "k": "the keys",
    "v": "the values",
    "qkv": "queries, keys and values in one",
    "o": "the attention's output",
    "gate": "SwiGLU's gate",
    "up": "the way up",
    "down": "the way down",
    "pooler": "the pooler",
    "head": "the head",
}
VECTOR = {
    "input_ids": "tokens",
    "attention_mask": "1 at real tokens, 0 at padding, left or right",
    "token_type_ids": "which word a token belongs to",
    "labels": "what is to be predicted, -100 to ignore; a language model shifts them itself",
    "loss": "mean cross-entropy over the labels that count",
    "logits": "before the softmax; 0 at padding, where they mean nothing",
}

TEXT = """\
# Reference models

Tiny transformers that have really learned something, to check implementations of LoRA on: a base in
Hugging Face format, an adapter in PEFT format, and vectors: a batch with the loss, the logits and
every gradient of the adapter. All of it, this text included, is written by `build.py` from seeds.

<MODELS>

Within a model all sizes differ (but for BERT's blocks and types), so that none can be mistaken for
another; constants are not the usual ones, so that none can be passed over; the scales are
fractions. The adapters' B, the biases and the norms' weights are trained, so that no term drops
out.

## What they have learned

The tasks are distributions over finitely many examples with rational probabilities
(`synthetic_data`), so entropy and expected loss are finite sums, exact, in nats a label. What the
loss exceeds the entropy by is a Kullback-Leibler divergence: 0 would be perfect. The base has
learned the first task; with the adapter, trained on the second only, it has learned that and
forgotten the first, which the second contradicts.

<LEARNED>

<TASKS>

## What is there, field by field

`<model>/base` is a model folder, whose tokenizer has the symbols above as words;
`<model>/adapter` is an adapter folder, `vectors/<model>.safetensors` what is expected of both
together, and `manifest.json` holds

- `schema`: the version of this layout;
- `versions`: of what it was built with;
- `random_numbers`: a hash of some that NumPy drew, to tell when a new NumPy draws others;
- `models`: of each model its `tasks`, their `entropy`, the `base_loss` and `adapter_loss` on both
  as in the table above, and `early`: a hash of the weights after the first <EARLY> steps of both
  trainings;
- `files`: the SHA-256 of each file.

<FILES>

### The bases' settings

<SETTINGS>

### The adapters' settings

<ADAPTERS>

### Tensors

`i` is the number of a block, from 0.

<TENSORS>

### Vectors

The batch is `synthetic_data.draw_batch` of the adapter's task with seed <SEED>: rows padded on the
left and on the right, ignored labels, unequal counts of labels; for classes, padding on the right
and one ignored label. The rest is computed in float64 from the float32 files.

<VECTORS>

## Making them anew

`python reference_models/build.py [FOLDER]`, one process. Training runs the package's own equations
on portable arrays (`reproducible_math`): no sum and no product of matrices rounds, and what else
there is rounds as IEEE 754 says, so that neither the processor, nor the linear algebra library, nor
the number of threads changes a bit. The random numbers are those of NumPy's `default_rng`, which
NumPy may change with a new version, and seldom does. So models and adapters come out byte for byte
the same, and the losses of the manifest digit for digit; the vectors are float64 sums in the
machine's own order, the same to within rounding.
"""


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
