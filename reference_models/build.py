"""Makes the reference models anew, all from seeds:   python reference_models/build.py [FOLDER]

Without FOLDER they replace those beside this script. The weights are trained on portable arrays
(minilora.portable), so every file but the vectors comes out the same on every machine, byte for byte.
"""

import hashlib
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from minilora import __version__
from minilora.formats.files import pack_json, read_json, write_files
from minilora.formats.huggingface import names, read_model, write_model
from minilora.formats.peft import adapter_names, read_adapter, write_adapter
from minilora.lora import Tuning, Weights
from minilora.models import GPT2, Batch, Bert, Config, Llama, draw_weights, logits, loss
from minilora.optim import AdamState, adamw, clip, schedule
from minilora.portable import portable
from minilora.targets import Lora, adapt
from minilora.tasks import Task, draw_batch, expected_loss, task

ROWS, WARMUP, MAX_NORM, STD = 32, 10, 1.0, 0.1
"""Of training: sequences a step, steps of warm-up, the gradient's norm, the first weights' spread."""

EARLY = 8
"""Steps after which a hash of the weights is kept, so that a test of a second can rebuild them."""

VECTOR_SEED = 2021


@dataclass(frozen=True)
class Plan:
    """So many steps of AdamW from this learning rate down to 0."""

    steps: int
    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A model, the tasks of its base and of its adapter, and how both are trained."""

    config: Config
    tasks: tuple[str, str]
    base: Plan
    lora: Lora
    adapter: Plan


# No two sizes of a model are equal and no setting has its usual value, so that none can be mistaken
# for another, or be passed over, without a trace.
RECIPES = {
    "llama": Recipe(
        Llama(14, 40, 2, 12, 56, kv_heads=4, head_dim=6, eps=3e-5, theta=2000.0, tied=False),
        ("running-sum", "running-difference"),
        Plan(400, 8e-3, 0.01),
        Lora(r=3, alpha=7),
        Plan(500, 1.5e-2),
    ),
    "gpt2": Recipe(
        GPT2(7, 42, 2, 3, 90, positions=20, eps=2e-5),
        ("nested-brackets", "queued-brackets"),
        Plan(400, 5e-3, 0.01),
        Lora(r=6, alpha=8, rslora=True),
        Plan(300, 1e-2),
    ),
    "bert": Recipe(
        Bert(6, 40, 2, 4, 72, positions=16, types=2, classes=3, eps=4e-6),
        ("more-a", "more-b"),
        Plan(500, 3e-3, 0.01),
        Lora(r=7, alpha=16),
        Plan(400, 5e-3),
    ),
}


def train(
    chosen: Task, W: Weights, c: Config, tuning: Tuning, plan: Plan, seed: int, until: int | None
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


def make(name: str, until: int | None = None) -> tuple[Weights, Tuning]:
    """The base, trained on the first task, and its adapter, trained on the second."""
    recipe, seed = RECIPES[name], 10 * list(RECIPES).index(name)
    c, (first, second) = recipe.config, map(task, recipe.tasks)
    W = draw_weights(c, np.random.default_rng(seed), STD)
    everything = Tuning(trained=frozenset(W))
    W = train(first, W, c, everything, recipe.base, seed + 1, until)
    W, tuning = adapt(W, recipe.lora, c.linears(), np.random.default_rng(seed + 2))
    return train(second, W, c, tuning, recipe.adapter, seed + 3, until), tuning


def digest(W: Weights) -> str:
    """A hash of the weights' names, shapes and float32 bytes."""
    total = hashlib.sha256()
    for name, array in sorted(W.items()):
        total.update(f"{name} {array.shape} ".encode() + array.astype("<f4").tobytes())
    return total.hexdigest()


def opened(folder: Path) -> tuple[Config, Weights, Tuning]:
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


def expected(batch: Batch, W: Weights, c: Config, tuning: Tuning) -> Weights:
    """loss, logits with a row per token, 0 at padding, and grads.<the tensor's name in its file>."""
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
    tasks = [task(one) for one in RECIPES[name].tasks]
    return {
        "tasks": [one.name for one in tasks],
        "entropy": [one.entropy for one in tasks],
        "base_loss": [expected_loss(one, W, c, Tuning()) for one in tasks],
        "adapter_loss": [expected_loss(one, W, c, tuning) for one in tasks],
        "early": digest(make(name, EARLY)[0]),
    }


def build(out: Path) -> None:
    """All files: models, adapters, vectors, the manifest, the README."""
    for name, recipe in RECIPES.items():
        W, tuning = make(name)
        print(f"{name}: trained", flush=True)
        base = {key: array for key, array in W.items() if not key.endswith((".A", ".B"))}
        write_model(out / name / "base", recipe.config, base)
        write_adapter(out / name / "adapter", recipe.config, W, tuning, recipe.lora)
        data = save({k: np.ascontiguousarray(v) for k, v in vector(name, out / name).items()})
        write_files(out / "vectors", {f"{name}.safetensors": lambda data=data: data})
    manifest = {
        "schema": 1,
        "versions": {"minilora": __version__, "python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "safetensors", "scipy")},
        "models": {name: learned(name, out / name) for name in RECIPES},
        "files": {
            path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for part in (*RECIPES, "vectors")
            for path in sorted((out / part).rglob("*"))
            if path.is_file()
        },
    }
    write_files(out, {"manifest.json": lambda: pack_json(manifest)})
    text = readme(out, manifest)
    write_files(out, {"README.md": text.encode})
