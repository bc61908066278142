"""minilora itself as an implementation: what is verified where no target is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

import minilora
from minilora.io.architectures import architecture_of, tensor_names, to_file_layout
from minilora.io.atomic import write_files, write_tensors
from minilora.io.files import pack_json, read_json, read_tensors
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import (
    CONFIG,
    WEIGHTS,
    adapted_names,
    adapter_names,
    read_adapter,
    read_lora_config,
    trained_names,
    write_adapter,
)
from minilora.spec.initialization import INITIALIZATIONS, draw_dropout, input_shapes
from minilora.spec.lora import (
    LORA,
    TrainableSpec,
    Variant,
    Weights,
    merge,
    merge_weight,
    scale,
)
from minilora.spec.models import Batch, Config, logits, loss, shifted_labels
from minilora.spec.multi_adapter import (
    Adapter,
    combine,
    combine_linear,
    combine_svd,
    dare,
    multi_linear,
    ties,
    trim,
)
from minilora.spec.ops import IGNORED
from minilora.spec.optim import run
from minilora.spec.variants import DORA, LORA_BIAS
from minilora.spec.variants.dora import row_norm
from minilora.verify.core.dtypes import DTYPES
from minilora.verify.implementation import modules
from minilora.verify.implementation.modules import columns
from minilora.verify.implementation.quantized import QuantizedSession, widened
from minilora.verify.implementation.sessions import LayerState

Array = np.ndarray


class Minilora:
    """The specification behind the contract's methods.

    NumPy has no products of bfloat16 or float16 worth the name, so those are computed in float32
    and rounded once at the end.
    """

    conventions: ClassVar = {
        "dora_norm": "detached",
        "dora_dropout": "difference",
        "conv_groups": "blocks",
    }
    name = "minilora"
    version = minilora.__version__
    dtypes: ClassVar = ("float64", "float32", "bfloat16", "float16")
    precision: ClassVar = {
        half: {"storage": half, "accumulation": "float32"} for half in ("bfloat16", "float16")
    }

    mixed: ClassVar = (
        *({"x": h, "W": h, "adapters": "float32"} for h in ("bfloat16", "float16")),
        {"x": "float16", "W": "bfloat16", "adapters": "float32"},
        *({"x": x, "W": "bfloat16", "adapters": x} for x in ("float64", "float32")),
        {"x": "float32", "W": "float32", "adapters": "float32", "autocast": "bfloat16"},
    )

    def lora_linear(self, x: Array, W: Array, A: Array, B: Array, **options: Any) -> Array:
        """y = W x + b + s B A (K ∘ x)."""
        return self._layer(x, W, A, B, **options)[0]

    def lora_linear_vjp(
        self, x: Array, W: Array, A: Array, B: Array, dy: Array, **options: Any
    ) -> dict[str, Array]:
        """y, dx, dA, dB, and dbias where there is a bias."""
        y, back = self._layer(x, W, A, B, **options)
        answer, of = {"y": y, **back(dy)}, {"y": y, "dx": x, "dA": A, "dB": B}
        if options.get("bias") is not None:
            answer["dbias"], of["dbias"] = widened(dy).reshape(-1, len(W)).sum(0), W
        return {name: array.astype(of.get(name, x).dtype) for name, array in answer.items()}

    def _layer(
        self,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        *,
        alpha: float,
        r: int,
        bias: Array | None = None,
        keep: Array | None = None,
        p: float = 0.0,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        autocast: str | None = None,
        **settings: Any,
    ) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
        """y, and the gradients by the contract's names."""
        cast = None if autocast is None else DTYPES[autocast]
        x_, W_, A_, B_ = (widened(v if cast is None else v.astype(cast)) for v in (x, W, A, B))
        K = None if keep is None else columns(keep.astype(x_.dtype)) / (1 - p)
        b = None if bias is None else widened(bias)[:, None]
        variant, parts = _variant(settings)
        s = scale(alpha, r, use_rslora)
        y, back = variant.linear(columns(x_), W_, b, A_, B_, *parts.values(), s, K)

        def gradients(dy: Array) -> dict[str, Array]:
            dx, dA, dB, *of_parts = back(columns(widened(dy)))
            named = zip(parts, of_parts, strict=True)
            return {
                "dx": dx.T.reshape(x.shape),
                "dA": dA,
                "dB": dB,
                **{f"d{name}": gradient[:, 0] for name, gradient in named},
            }

        return y.T.reshape(*x.shape[:-1], len(W)).astype(cast or x.dtype), gradients

    def merge(
        self,
        W: Array,
        A: Array,
        B: Array,
        *,
        alpha: float,
        r: int,
        bias: Array | None = None,
        use_rslora: bool = False,
        fan_in_fan_out: bool = False,
        **settings: Any,
    ) -> Any:
        """W' = W + s B A, or its variant's; with a bias (W', b')."""
        s = scale(alpha, r, use_rslora)
        variant, parts = _variant(settings)
        b = None if bias is None else widened(bias)[:, None]
        merged, b = variant.merge(widened(W), b, widened(A), widened(B), *parts.values(), s)
        W_merged = merged.astype(W.dtype)
        return W_merged if bias is None or b is None else (W_merged, b[:, 0].astype(W.dtype))

    def unmerge(self, W_merged: Array, A: Array, B: Array, **options: Any) -> Array:
        """W' - s B A. (`minilora.unmerge` keeps the original instead, and gives back its bits.)"""
        W: Array = self.merge(W_merged, A, -B, **options)
        return W

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> Array:
        """Σ w s B A, or with ``combination_type="svd"`` the best change of rank ``svd_rank``."""
        if unknown := settings.keys() - {"combination_type", "svd_rank", "density"}:
            raise NotImplementedError(f"no settings {', '.join(sorted(unknown))}")
        dtype = adapters[0]["A"].dtype
        triples = [_triple(adapter) for adapter in adapters]
        kind = settings.get("combination_type", "cat")
        way, is_svd = kind.removesuffix("_svd"), kind.endswith("svd")
        if kind in ("cat", "svd"):
            A, B = combine(triples, weights)
            change: Array = B @ A
        elif way == "linear" and not is_svd:
            A, B = combine_linear(triples, weights)
            change = B @ A
        elif is_svd:
            changes = [s * (B @ A) for A, B, s in triples]
            change = _combined_arrays(way, changes, weights, settings["density"])
        else:
            products = [w * s for w, (_, _, s) in zip(weights, triples, strict=True)]
            roots = [abs(p) ** 0.5 for p in products]
            signed = [-root if p < 0 else root for p, root in zip(products, roots, strict=True)]
            A, B = (
                _combined_arrays(way, [t[i] for t in triples], w, settings["density"])
                for i, w in enumerate((signed, roots))
            )
            change = B @ A
        if is_svd:
            A, B, _ = combine_svd([change], [1.0], settings["svd_rank"])
            change = B @ A
        return change.astype(dtype)

    def multi_adapter(
        self, x: Array, W: Array, adapters: Sequence[Mapping[str, Any]], index: Array
    ) -> Array:
        """y = x Wᵀ + s x Aᵀ Bᵀ, each row with its own adapter; -1 is none."""
        several = [Adapter((A, B), s) for A, B, s in map(_triple, adapters)]
        y, *_ = multi_linear(widened(x).T, widened(W), None, several, np.asarray(index))
        rows: Array = y.T.astype(x.dtype)
        return rows

    def session(self, layer: Mapping[str, Any]) -> MiniloraSession | QuantizedSession:
        """A session with a layer, without adapters."""
        return (QuantizedSession if layer["kind"] == "quantized" else MiniloraSession)(layer)

    def model_loss(
        self, model_dir: str | Path, adapter_dir: str | Path, batch: Mapping[str, Array]
    ) -> dict[str, Any]:
        """Loss, logits with a row for each token, and the gradients by their names in the file."""
        c, W = read_model(model_dir)
        factors, tuning = read_adapter(adapter_dir, c)
        dtype = W["embed.weight"].dtype
        given = batch_of(batch)
        wide = {name: widened(array) for name, array in (W | factors).items()}
        L, back = loss(given, wide, c, tuning)
        gradients, z = back(1.0), logits(given, wide, c, tuning)[0].T
        flat = {name: in_file(name, g) for name, g in gradients.items()}
        return {
            "loss": L.astype(dtype),
            "logits": z.reshape(*given.ids.shape[: 1 + c.causal], -1).astype(dtype),
            "grads": {
                theirs: flat[own].astype(dtype)
                for own, theirs in adapter_names(c, gradients).items()
            },
        }

    def save(
        self,
        model_dir: str | Path,
        adapter_arrays: Mapping[str, Array],
        settings: Mapping[str, Any],
        out_dir: str | Path,
    ) -> None:
        """A PEFT folder of the tensors and the settings, by way of what they mean."""
        c, W = read_model(model_dir)
        with TemporaryDirectory(prefix="minilora-") as name:
            folder = Path(name)
            write_tensors(folder / WEIGHTS, dict(adapter_arrays), {"format": "pt"})
            write_files(folder, {CONFIG: partial(pack_json, settings)})
            factors, tuning = read_adapter(folder, c, base=W)
            lora = read_lora_config(folder, c)
        write_adapter(out_dir, c, W | factors, tuning, lora, base=W)

    def load(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, Array]:
        """The adapter's tensors as they lie in its file."""
        c, W = read_model(model_dir)
        factors, _ = read_adapter(adapter_dir, c, base=W)
        transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
        return {
            theirs: in_file(name, to_file_layout(name, factors[name], transposed.get(name, False)))
            for name, theirs in adapter_names(c, sorted(factors)).items()
        }

    def logits(self, model_dir: str | Path, adapter_dir: str | Path, input_ids: Array) -> Array:
        """The logits, a row for each token."""
        c, W, tuning, dtype = _adapted(model_dir, adapter_dir)
        z = logits(Batch(input_ids), W, c, tuning)[0].T
        rows: Array = z.reshape(*input_ids.shape, -1).astype(dtype)
        return rows

    def deltas(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, Array]:
        """What merging adds to each parameter, by its module's path."""
        c, W, tuning, dtype = _adapted(model_dir, adapter_dir)
        base = {name: widened(array) for name, array in read_model(model_dir)[1].items()}
        merged, paths = merge(W, tuning), architecture_of(c).paths(c)
        base.setdefault("head.weight", base["embed.weight"])
        deltas = {}
        for name, array in merged.items():
            at, _, part = name.rpartition(".")
            change = array - base[name] if name in base else array
            if change.any():
                key = paths[at] + (".bias" if part == "bias" else "")
                deltas[key] = in_file(name, change.astype(dtype))
        return deltas

    def targets(
        self, config: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, tuple[int, float]]:
        """The adapted modules, each with its rank and alpha."""
        return adapted_names(config, names)

    def trainable(self, config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
        """The trained tensors by their names in the adapter's file."""
        return trained_names(config, names)

    def optimizer_steps(
        self, params: Mapping[str, Array], gradients: Sequence[Any], settings: Mapping[str, Any]
    ) -> list[dict[str, Array]]:
        """The parameters after each step; a half precision has its master weights in float32."""
        dtype = next(iter(params.values())).dtype

        def wide(g: Mapping[str, Array]) -> dict[str, Array]:
            return {name: widened(array) for name, array in g.items()}

        parts = [
            wide(g) if isinstance(g, Mapping) else [(n, wide(part)) for n, part in g]
            for g in gradients
        ]
        steps = run(wide(params), parts, settings)
        return [{name: array.astype(dtype) for name, array in step.items()} for step in steps]

    def init(
        self,
        W: Array,
        *,
        r: int,
        alpha: float,
        seed: int,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        fan_in_fan_out: bool = False,
        **settings: Any,
    ) -> dict[str, Array]:
        """The initial A and B, the base weight beside them, and what a variant has besides."""
        name = settings.pop("init_lora_weights", True)
        name = "kaiming" if name is True else name
        if settings or name not in INITIALIZATIONS:
            raise NotImplementedError(f"no initialization {name!r}, no settings {sorted(settings)}")
        rng, s = np.random.default_rng(seed), scale(alpha, r, use_rslora)
        base, A, B = INITIALIZATIONS[name].start(rng, widened(W), r, s)
        answer = {"A": A, "B": B, "W": base}
        if use_dora:
            answer["magnitude"] = row_norm(merge_weight(base, A, B, s))[0][:, 0]
        if lora_bias:
            answer["lora_bias"] = np.zeros(len(W))
        return {key: array.astype(W.dtype) for key, array in answer.items()}

    def module(
        self,
        layer: Mapping[str, Any],
        adapter: Mapping[str, Any],
        x: Array,
        *,
        mode: str,
        dy: Array | None = None,
        index: Array | None = None,
    ) -> dict[str, Array]:
        """y of any layer, with dy the gradients, and merged the weight and the bias."""
        settings = {k: v for k, v in adapter.items() if k in _OF_VARIANTS}
        variant, parts = _variant(settings)
        s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
        p, K = adapter.get("p", 0.0), None
        if mode == "train" and p:
            K = widened((np.random.default_rng().random(x.shape) >= p).astype(layer["W"].dtype))
            K = K / (1 - p)
        given = (
            wide_entries(layer),
            wide_entries(adapter),
            widened(x) if x.dtype.kind != "i" else x,
        )
        of = modules.Adapted(*given, variant, parts, s, index, K)
        dtype = layer["W"].dtype
        if mode == "merged":
            now = wide_entries(modules.merged_layer(of))
            answer = {"y": modules.base_output(replace(of, layer=now)), "W": now["W"]}
            answer |= {"bias": now["bias"]} if "bias" in now else {}
        else:
            y, back = modules.ADAPTED[layer["kind"]](of)
            answer = {"y": y} | ({} if dy is None else back(widened(dy)))
        return {name: array.astype(dtype) for name, array in answer.items()}

    def train(
        self,
        model_dir: str | Path,
        adapter_dir: str | Path,
        batches: Sequence[Sequence[Mapping[str, Array]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, Array]]:
        """The adapter after each step, by the names in its file.

        Gradient checkpointing saves memory and changes no number: here there is nothing to save.
        """
        c, W = read_model(model_dir)
        factors, tuning = read_adapter(adapter_dir, c, base=W)
        p = read_lora_config(adapter_dir, c).lora_dropout
        steps = [[batch_of(batch) for batch in step] for step in batches]
        numerical = {k: v for k, v in settings.items() if k != "gradient_checkpointing"}
        names = adapter_names(c, sorted(tuning.trained))
        return [
            {theirs: in_file(name, after[name]) for name, theirs in names.items()}
            for after in trained(c, W | factors, tuning, steps, numerical, p)
        ]


def trained(
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    steps: Sequence[Sequence[Batch]],
    settings: Mapping[str, Any],
    p: float = 0.0,
) -> list[Weights]:
    """The trained parameters after each step; its gradient is the mean over its labels.

    ``settings`` are those of `optim.run`. With p > 0 each batch has a mask drawn.
    """
    start = {name: W[name] for name in sorted(tuning.trained)}
    rng = np.random.default_rng(0)
    now, gradients, history = start, [], []
    for step in steps:
        gradients.append(micro_batch_gradients(c, W | now, tuning, step, p, rng))
        now = run(start, gradients, {"total_steps": len(steps), **settings})[-1]
        history.append(now)
    return history


def micro_batch_gradients(
    c: Config,
    W: Weights,
    tuning: TrainableSpec,
    step: Sequence[Batch],
    p: float = 0.0,
    rng: np.random.Generator | None = None,
) -> list[tuple[int, Weights]]:
    """nᵢ and gᵢ of each micro-batch: how many labels count, and the gradient of their mean.

    A micro-batch in which none counts has no mean, and is worth nothing.
    """
    parts = []
    for batch in step:
        if not (count := int((shifted_labels(batch, c) != IGNORED).sum())):
            continue
        if p and rng is not None:
            shapes = {
                at: n for at, n in input_shapes(c, *batch.ids.shape).items() if at in tuning.scale
            }
            keep = draw_dropout(rng, p, shapes, W["embed.weight"].dtype)
            tuning = replace(tuning, dropout_scale=keep)
        _, back = loss(batch, W, c, tuning)
        parts.append((count, back(1.0)))
    return parts


class MiniloraSession:
    """A `sessions.LayerState` that is replaced at each step; half precisions are held in float32.

    ``rates`` has the dropout rate of the adapters that have one.
    """

    def __init__(self, layer: Mapping[str, Any]) -> None:
        self.dtype = layer["W"].dtype
        self.layer = LayerState.of(_wide_entries(layer))
        self.rates: dict[str, float] = {}
        self.training = False
        self.rng = np.random.default_rng(0)

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Adds an adapter, not active yet."""
        self.layer = self.layer.add(name, self._without_rate(name, adapter))

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Puts another adapter in its place."""
        self.layer = self.layer.swap(name, self._without_rate(name, adapter))

    def combine(self, name: str, names: Sequence[str], weights: Sequence[float]) -> None:
        """Adds the weighted sum of other adapters."""
        self.layer = self.layer.combine(name, names, weights)
        self.rates[name] = 0.0

    def _without_rate(self, name: str, adapter: Mapping[str, Any]) -> dict[str, Any]:
        """The adapter in float32 at least, after its rate of dropout is held."""
        entries = _wide_entries(adapter)
        p = entries.pop("p", 0.0)
        if p and self.layer.kind in ("embedding", "tied"):
            raise NotImplementedError("no dropout of token ids")
        self.rates[name] = p
        return entries

    def activate(self, names: Sequence[str]) -> None:
        """Makes these adapters active, and no other."""
        self.layer = self.layer.activate(names)

    def disable(self) -> None:
        """Applies the base alone, until the next activation."""
        self.layer = self.layer.disable()

    def scale(self, name: str, factor: float) -> None:
        """Sets s = factor · α / r."""
        self.layer = self.layer.scale(name, factor)

    def merge(self) -> None:
        """Merges the active adapters into the weight."""
        self.layer = self.layer.merge()

    def unmerge(self) -> None:
        """Takes them out again."""
        self.layer = self.layer.unmerge()

    def delete(self, name: str) -> None:
        """Removes an adapter."""
        self.layer = self.layer.delete(name)

    def save(self, name: str, folder: str | Path) -> None:
        """The adapter's arrays and settings, as they are now; the factor of `scale` is not one."""
        if name not in self.layer.adapters:
            raise ValueError(f"no adapter {name!r}: expected one of {[*self.layer.adapters]}")
        adapter = flat(self.layer.adapters[name]) | {"p": self.rates[name]}
        arrays = {k: v.astype(self.dtype) for k, v in adapter.items() if isinstance(v, np.ndarray)}
        settings = {k: v for k, v in adapter.items() if k not in arrays}
        write_tensors(Path(folder) / WEIGHTS, arrays)
        write_files(folder, {CONFIG: partial(pack_json, settings)})

    def load(self, name: str, folder: str | Path) -> None:
        """Adds a saved adapter."""
        files = read_tensors(Path(folder) / WEIGHTS), read_json(Path(folder) / CONFIG)
        adapter: dict[str, Any] = {}
        for path, value in (files[0] | files[1]).items():
            *outer, last = path.split(".")
            into = adapter
            for key in outer:
                into = into.setdefault(key, {})
            into[last] = value
        self.add(name, adapter)

    def train(self) -> None:
        """Dropout acts from now on."""
        self.training = True

    def eval(self) -> None:
        """It acts no more."""
        self.training = False

    def _forward(self, x: Array) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
        """y and its gradients, with masks of dropout in training."""
        x = widened(x) if x.dtype.kind != "i" else x
        keep = {}
        for state in self.layer.states.values():
            for name in state.active if self.training and not state.disabled else ():
                if (p := self.rates[name]) and name not in state.merged:
                    keep[name] = (self.rng.random(x.shape) >= p).astype(x.dtype) / (1 - p)
        return self.layer.forward(x, keep)

    def forward(self, x: Array) -> Array:
        """y, tokens in rows."""
        return self._forward(x)[0].astype(self.dtype)

    def rows(self, x: Array, names: Sequence[str]) -> Array:
        """y, each row with the adapter that is named for it, or none for ""."""
        answer = np.stack([self._alone(name, x[[j]]) for j, name in enumerate(names)])
        return answer.astype(self.dtype)

    def _alone(self, name: str, x: Array) -> Array:
        """y of one row with one adapter, or none."""
        row: Array = self.layer.activate([name] if name else []).forward(x)[0][0]
        return row

    def gradients(self, x: Array, dy: Array) -> dict[str, Array]:
        """dx, and the gradients of the adapters that are active and not merged."""
        gradients = self._forward(x)[1](widened(dy))
        return {name: array.astype(self.dtype) for name, array in gradients.items()}

    def step(self, x: Array, dy: Array, lr: float) -> None:
        """One step of gradient descent, without dropout."""
        self.layer = self.layer.step(x, dy, lr)

    def weight(self) -> Array:
        """The weight as it is stored."""
        return self.layer.stored().astype(self.dtype)


def _wide_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries with float16 and bfloat16 as float32."""
    return {
        key: _wide_entries(value)
        if isinstance(value, Mapping)
        else widened(value)
        if isinstance(value, np.ndarray)
        else value
        for key, value in entries.items()
    }


def _combined_arrays(
    way: str, arrays: Sequence[Array], weights: Sequence[float], density: float
) -> Array:
    """TIES, DARE or magnitude pruning of arrays."""
    if way in ("dare_linear", "dare_ties"):
        kept = [(np.random.default_rng().random(D.shape) < density).astype(D.dtype) for D in arrays]
        arrays = [dare(D, keep, 1 - density) for D, keep in zip(arrays, kept, strict=True)]
        density = 1
    if way in ("ties", "dare_ties"):
        return ties(arrays, weights, density)
    if way not in ("magnitude_prune", "dare_linear"):
        raise NotImplementedError(f"no combination {way!r}")
    terms = [w * trim(D, density) for w, D in zip(weights, arrays, strict=True)]
    total: Array = np.sum(terms, axis=0)
    return total


def flat(adapter: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """An adapter's entries, those of an inner dict under ``outer.inner``."""
    entries: dict[str, Any] = {}
    for key, value in adapter.items():
        entries |= (
            flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
        )
    return entries


def _adapted(
    model_dir: str | Path, adapter_dir: str | Path
) -> tuple[Config, Weights, TrainableSpec, Any]:
    """The model with its adapter, half precisions as float32, and the dtype of its files."""
    c, W = read_model(model_dir)
    factors, tuning = read_adapter(adapter_dir, c, base=W)
    wide = {name: widened(array) for name, array in (W | factors).items()}
    return c, wide, tuning, W["embed.weight"].dtype


_OF_VARIANTS = ("use_dora", "magnitude", "lora_bias")


def wide_entries(given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries, arrays of float16 and bfloat16 as float32, in inner dicts too."""

    def wide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return wide_entries(value)
        return widened(value) if isinstance(value, np.ndarray) else value

    return {name: wide(value) for name, value in given.items()}


def _variant(settings: Mapping[str, Any]) -> tuple[Variant, dict[str, Array]]:
    """The variant that settings of the contract ask for, and its further parameters as columns."""
    variants = {(): LORA, ("magnitude",): DORA, ("lora_bias",): LORA_BIAS}
    names = tuple(name for name in ("magnitude", "lora_bias") if name in settings)
    unknown = settings.keys() - {*names, "use_dora"}
    is_dora = settings.get("use_dora", False)
    if unknown or names not in variants or is_dora != ("magnitude" in names):
        raise NotImplementedError(f"no settings {', '.join(sorted(settings))}")
    return variants[names], {name: widened(settings[name])[:, None] for name in names}


def _triple(adapter: Mapping[str, Any]) -> tuple[Array, Array, Any]:
    """A, B and s of an adapter of the contract."""
    s = scale(adapter["alpha"], adapter["r"], adapter.get("use_rslora", False))
    return widened(adapter["A"]), widened(adapter["B"]), s


def batch_of(given: Mapping[str, Array]) -> Batch:
    """A batch of the contract, as the specification has it."""
    return Batch(
        given["input_ids"],
        given["labels"],
        given["attention_mask"].astype(bool),
        types=given.get("token_type_ids"),
    )


def in_file(name: str, array: Array) -> Array:
    """A parameter as it lies in a file: vectors have one axis."""
    matrix = name.endswith((".A", ".B")) or array.ndim < 2 or array.shape[1] > 1
    return array if matrix else array[:, 0]


def implementation() -> object:
    """The default target of ``minilora verify``."""
    return Minilora()
