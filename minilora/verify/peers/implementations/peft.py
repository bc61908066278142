"""Hugging Face PEFT, driven through get_peft_model, LoraConfig and PeftModel."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from minilora.verify.peers._peft import Layer
from minilora.verify.peers._torch import (
    OPTIMIZERS,
    compute_again,
    fill,
    load_base,
    loss_and_gradients,
    plain_number,
    plain_optimizer,
    schedule_of,
    step_by_step,
    stored_dtype,
    to_numpy,
    to_torch,
)
from minilora.verify.peers.peft import PEER

_OPTIMIZER_SETTINGS = {
    "optimizer", "lr", "betas", "eps", "weight_decay", "momentum", "max_grad_norm",
    "schedule", "warmup_steps", "total_steps", "loraplus_lr_ratio",
}  # fmt: skip


@PEER.describes
class Peft(Layer):
    """Each call builds the library's own layer or model anew, so no state is left between calls."""

    def _frozen(self, W: np.ndarray, biased: bool, fan_in_fan_out: bool) -> Any:
        m, n = W.shape
        frozen = Conv1D(m, n) if fan_in_fan_out else torch.nn.Linear(n, m, bias=biased)
        return frozen.to(to_torch(W).dtype)

    def _hold(self, frozen: Any, W: np.ndarray) -> None:
        fill(frozen.weight, to_torch(W.T if isinstance(frozen, Conv1D) else W))

    def _weight(self, layer: Any) -> np.ndarray:
        weight = layer.get_base_layer().weight
        return to_numpy(weight.T if layer.fan_in_fan_out else weight)

    def combine(
        self, adapters: Sequence[Mapping[str, Any]], weights: Sequence[float], **settings: Any
    ) -> np.ndarray:
        """The change of add_weighted_adapter, by concatenation unless another way is asked for."""
        kind = {"combination_type": "cat"} | settings
        if unknown := kind.keys() - {"combination_type", "svd_rank"}:
            raise NotImplementedError(f"the peft peer has no settings {', '.join(sorted(unknown))}")
        A, B = adapters[0]["A"], adapters[0]["B"]
        model, layer = self._with_adapters(np.zeros((len(B), A.shape[1]), A.dtype), adapters)
        names = [f"a{i}" for i in range(len(adapters))]
        with torch.no_grad():
            model.base_model.add_weighted_adapter(names, list(weights), "all", **kind)
            return to_numpy(layer.get_delta_weight("all"))

    def session(self, layer: Mapping[str, Any]) -> Session:
        """A layer whose adapters come and go."""
        if layer["kind"] not in _TARGETS:
            raise NotImplementedError(f"the peft peer has no layer of kind {layer['kind']}")
        return Session(layer)

    def init(
        self, W: np.ndarray, *, r: int, alpha: float, seed: int, **settings: Any
    ) -> dict[str, np.ndarray]:
        """A, B and the base's weight after get_peft_model, from torch's generator."""
        if unknown := settings.keys() - {"init_lora_weights", "use_rslora"}:
            raise NotImplementedError(f"the peft peer has no settings {', '.join(sorted(unknown))}")
        m, n = W.shape
        linear = torch.nn.Linear(n, m, bias=False).to(to_torch(W).dtype)
        fill(linear.weight, to_torch(W))
        config = peft.LoraConfig(
            r=r, lora_alpha=plain_number(alpha), target_modules=["0"], **settings
        )
        torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(
                torch.nn.Sequential(linear), config, autocast_adapter_dtype=False
            )
        except TypeError as refused:  # PiSSA and OLoRA take no float64
            raise NotImplementedError(str(refused)) from refused
        layer = model.get_submodule("base_model.model.0")
        factors = {"A": layer.lora_A, "B": layer.lora_B}
        return {"W": self._weight(layer)} | {
            name: to_numpy(factor["default"].weight) for name, factor in factors.items()
        }

    def model_loss(
        self, model_dir: str | Path, adapter_dir: str | Path, batch: Mapping[str, np.ndarray]
    ) -> dict[str, Any]:
        """Loss, logits and the gradient of every tensor that the adapter's file holds."""
        model = _opened(model_dir, adapter_dir)
        return loss_and_gradients(model, batch, _trained(model, adapter_dir))

    def save(
        self,
        model_dir: str | Path,
        adapter_arrays: Mapping[str, np.ndarray],
        settings: Mapping[str, Any],
        out_dir: str | Path,
    ) -> None:
        """save_pretrained of a model whose adapter is filled by set_peft_model_state_dict."""
        # A copy: a classifier's model adds the heads that it knows to the list modules_to_save.
        config = peft.LoraConfig.from_peft_type(**copy.deepcopy(dict(settings)))
        with _without_news():
            model = peft.get_peft_model(load_base(model_dir), config, autocast_adapter_dtype=False)
        tensors = {name: to_torch(array) for name, array in adapter_arrays.items()}
        result = peft.set_peft_model_state_dict(model, tensors)
        if result.unexpected_keys:
            raise ValueError(f"the library has no place for {', '.join(result.unexpected_keys)}")
        model.save_pretrained(str(out_dir), save_embedding_layers=False)

    def load(self, model_dir: str | Path, adapter_dir: str | Path) -> dict[str, np.ndarray]:
        """get_peft_model_state_dict after from_pretrained."""
        model = _opened(model_dir, adapter_dir)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: to_numpy(tensor) for name, tensor in state.items()}

    def train(
        self,
        model_dir: str | Path,
        adapter_dir: str | Path,
        batches: Sequence[Sequence[Mapping[str, np.ndarray]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, np.ndarray]]:
        """A training loop as one writes it, over torch.optim and transformers' schedule."""
        settings = dict(settings)
        checkpointing = settings.pop("gradient_checkpointing", False)
        model = _opened(model_dir, adapter_dir, checkpointing)
        trained = _trained(model, adapter_dir)
        ends = {".lora_A.weight": ".A", ".lora_B.weight": ".B"}
        tensors = {}
        for name, tensor in trained.items():
            end = next((end for end in ends if name.endswith(end)), "")
            tensors[name.removesuffix(end) + ends.get(end, "")] = tensor
        optimizer = _optimizer(tensors, settings)
        scheduler = schedule_of(optimizer, settings, len(batches))
        return step_by_step(
            model, trained, optimizer, scheduler, batches, settings.get("max_grad_norm")
        )

    def optimizer_steps(
        self,
        params: Mapping[str, np.ndarray],
        gradients: Sequence[Mapping[str, np.ndarray] | Sequence[tuple[int, Mapping[str, Any]]]],
        settings: Mapping[str, Any],
    ) -> list[dict[str, np.ndarray]]:
        """Parameters after each step of torch.optim under transformers' schedule.

        A step's gradients are one dict, or pairs (tokens, dict), one per micro-batch, of which the
        average weighted by tokens is taken: a training loop scales each loss by tokens / total.
        """
        tensors = {name: torch.nn.Parameter(to_torch(value)) for name, value in params.items()}
        optimizer = _optimizer(tensors, settings)
        scheduler = schedule_of(optimizer, settings, len(gradients))
        after = []
        for step in gradients:
            optimizer.zero_grad()
            batches = [(1, step)] if isinstance(step, Mapping) else step
            total = sum(tokens for tokens, _ in batches)
            for tokens, gradient in batches:
                for name, value in gradient.items():
                    share = to_torch(value) * (tokens / total)
                    so_far = tensors[name].grad
                    tensors[name].grad = share if so_far is None else so_far + share
            if settings.get("max_grad_norm") is not None:
                torch.nn.utils.clip_grad_norm_(tensors.values(), settings["max_grad_norm"])
            optimizer.step()
            scheduler.step()
            after.append({name: to_numpy(tensor) for name, tensor in tensors.items()})
        return after


class _Tied(torch.nn.Module):
    """Logits of the embedded, by one table; named as the library knows an embedding and a head."""

    config: ClassVar = {"tie_word_embeddings": True}
    _tied_weights_keys: ClassVar = ["lm_head.weight"]

    def __init__(self, v: int, d: int) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(v, d)
        self.lm_head = torch.nn.Linear(d, v, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.embed_tokens(ids))
        return logits


_TARGETS = {"linear": ["0"], "conv1d": ["0"], "embedding": ["0"], "bias": ["0"], "full": ["0"]} | {
    "tied": ["embed_tokens"]
}
"""The modules of each kind's model that are adapted where the adapter does not say."""

_ON: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


class Session:
    """One layer in a PeftModel, or two, whose own methods do what is asked.

    A model has its first adapter from the beginning; until one is activated, adapters are disabled.
    """

    def __init__(self, layer: Mapping[str, Any]) -> None:
        self._kind, W, bias = layer["kind"], layer["W"], layer.get("bias")
        m, n = W.shape
        if self._kind == "tied":
            self._model: Any = _Tied(m, n).to(to_torch(W).dtype)
            self._base = self._model.embed_tokens
            fill(self._base.weight, to_torch(W))
            return
        base: Any = {
            "conv1d": lambda: Conv1D(m, n),
            "embedding": lambda: torch.nn.Embedding(m, n),
        }.get(self._kind, lambda: torch.nn.Linear(n, m, bias=bias is not None))()
        self._base, layers = base, [base]
        if self._kind == "full":
            head = layer["head"]
            layers.append(torch.nn.Linear(*head["W"].shape[::-1]))
        self._model = torch.nn.Sequential(*layers).to(to_torch(W).dtype)
        fill(base.weight, to_torch(W.T if self._kind == "conv1d" else W))
        if bias is not None:
            fill(base.bias, to_torch(bias))
        if self._kind == "full":
            _fill_module(layers[1], head)

    def _module(self, name: str) -> Any:
        return self._model.get_submodule(f"base_model.model.{name}")

    def _factors(self, name: str) -> dict[str, list[tuple[torch.Tensor, bool]]]:
        """The adapter's A and B wherever they are, and whether transposed there."""
        found: dict[str, list[tuple[torch.Tensor, bool]]] = {"A": [], "B": []}
        for place in ("embed_tokens", "lm_head") if self._kind == "tied" else ("0",):
            layer = self._module(place)
            for part, other in zip("AB", "BA", strict=True):
                if name in getattr(layer, f"lora_embedding_{part}", {}):
                    found[part].append((getattr(layer, f"lora_embedding_{part}")[name], False))
                if name in getattr(layer, f"lora_{part}", {}):
                    tensor = getattr(layer, f"lora_{part}")[name].weight
                    twin = bool(found["B"])
                    found[other if twin else part].append((tensor, twin))
        return found

    def add(self, name: str, adapter: Mapping[str, Any]) -> None:
        """get_peft_model, or add_adapter."""
        own: dict[str, Any] = {"target_modules": _TARGETS[self._kind]}
        own |= _ON[adapter["on"]] if "on" in adapter else {}
        own |= {"modules_to_save": ["1"]} if "head" in adapter else {}
        own |= {"bias": "lora_only"} if "bias" in adapter else {}
        config = peft.LoraConfig(
            r=adapter["r"],
            lora_alpha=plain_number(adapter["alpha"]),
            use_rslora=adapter.get("use_rslora", False),
            use_dora=adapter.get("use_dora", False),
            fan_in_fan_out=self._kind == "conv1d",
            **own,
        )
        if isinstance(self._model, peft.PeftModel):
            self._model.add_adapter(name, config, autocast_adapter_dtype=False)
        else:
            self._model = peft.get_peft_model(
                self._model, config, adapter_name=name, autocast_adapter_dtype=False
            )
            self._model.base_model.disable_adapter_layers()
        for part, places in self._factors(name).items():
            for tensor, turned in places:
                fill(tensor, to_torch(adapter[part].T if turned else adapter[part]))
        if "magnitude" in adapter:
            magnitude = self._module("0").lora_magnitude_vector[name].weight
            fill(magnitude, to_torch(adapter["magnitude"]))
        if "head" in adapter:
            _fill_module(self._module("1").modules_to_save[name], adapter["head"])
        if "bias" in adapter:  # which the library trains in the base itself
            fill(self._base.bias, to_torch(adapter["bias"]))

    def activate(self, names: Sequence[str]) -> None:
        """set_adapter of the base model, which takes several; none disables."""
        if names:
            self._model.base_model.enable_adapter_layers()
            self._model.base_model.set_adapter(list(names))
        else:
            self.disable()

    def disable(self) -> None:
        """disable_adapter_layers."""
        self._model.base_model.disable_adapter_layers()

    def scale(self, name: str, factor: float) -> None:
        """set_scale of the layers that have it, a factor on alpha / r."""
        for place in ("embed_tokens", "lm_head") if self._kind == "tied" else ("0",):
            if name in getattr(self._module(place), "scaling", {}):
                self._module(place).set_scale(name, factor)

    def merge(self) -> None:
        """merge_adapter."""
        self._model.merge_adapter()

    def unmerge(self) -> None:
        """unmerge_adapter."""
        self._model.unmerge_adapter()

    def delete(self, name: str) -> None:
        """delete_adapter."""
        self._model.delete_adapter(name)

    def train(self) -> None:
        """Training."""
        self._model.train()

    def eval(self) -> None:
        """Evaluation."""
        self._model.eval()

    def save(self, name: str, folder: str) -> None:
        """save_pretrained of this adapter alone, which makes a folder of its name."""
        with _without_news():
            self._model.save_pretrained(
                folder, selected_adapters=[name], save_embedding_layers=False
            )

    def load(self, name: str, folder: str) -> None:
        """from_pretrained, or load_adapter."""
        (saved,) = (str(path) for path in Path(folder).iterdir() if path.is_dir())
        how = {"is_trainable": True, "autocast_adapter_dtype": False}
        if isinstance(self._model, peft.PeftModel):
            self._model.load_adapter(saved, name, **how)
        else:
            self._model = peft.PeftModel.from_pretrained(
                self._model, saved, adapter_name=name, **how
            )
            self._model.base_model.disable_adapter_layers()

    def forward(self, x: np.ndarray) -> np.ndarray:
        """y."""
        with torch.no_grad():
            return to_numpy(self._model(to_torch(x)))

    def gradients(self, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
        """Those of ⟨dy, y⟩ by autograd, of whatever is trained."""
        tensors: dict[str, list[tuple[torch.Tensor, bool]]] = {}
        given = to_torch(x)
        if x.dtype.kind == "f":
            tensors["dx"] = [(given.requires_grad_(), False)]
        for name, config in self._model.peft_config.items():
            tensors |= {f"{name}.{part}": own for part, own in self._factors(name).items()}
            if config.use_dora:
                magnitude = self._module("0").lora_magnitude_vector[name].weight
                tensors[f"{name}.magnitude"] = [(magnitude, False)]
            if config.modules_to_save:
                module = self._module("1").modules_to_save[name]
                tensors |= {
                    f"{name}.head.W": [(module.weight, False)],
                    f"{name}.head.bias": [(module.bias, False)],
                }
            if config.bias != "none":
                tensors[f"{name}.bias"] = [(self._base.bias, False)]
        y = self._model(given)
        answer: dict[str, np.ndarray] = {}
        for key, places in tensors.items():
            for tensor, turned in places:
                if not (tensor.requires_grad and y.requires_grad):
                    continue
                (g,) = torch.autograd.grad(
                    y, tensor, to_torch(dy), retain_graph=True, allow_unused=True
                )
                if g is not None:
                    own = to_numpy(g.T if turned else g)
                    answer[key] = answer[key] + own if key in answer else own
        return answer

    def weight(self) -> np.ndarray:
        """The weight that the base layer holds."""
        weight = self._base.weight
        return to_numpy(weight.T if self._kind == "conv1d" else weight)


def _fill_module(module: Any, given: Mapping[str, np.ndarray]) -> None:
    """A linear module's weight and bias."""
    fill(module.weight, to_torch(given["W"]))
    fill(module.bias, to_torch(given["bias"]))


@contextmanager
def _without_news() -> Iterator[None]:
    """PEFT 0.21 asks for an attribute by a name that transformers 5.24 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _opened(model_dir: str | Path, adapter_dir: str | Path, checkpointing: bool = False) -> Any:
    """The library's model of two folders, its adapter to be trained."""
    base = load_base(model_dir)
    if stored_dtype(adapter_dir) != base.dtype:
        raise ValueError(
            f"{adapter_dir}: stored in {stored_dtype(adapter_dir)}, expected {base.dtype} like "
            f"{model_dir}; store base and adapter in one dtype"
        )
    if checkpointing:
        compute_again(base)
    with _without_news():
        return peft.PeftModel.from_pretrained(
            base, str(adapter_dir), is_trainable=True, autocast_adapter_dtype=False
        )


def _trained(model: Any, adapter_dir: str | Path) -> dict[str, Any]:
    """The parameters of an adapter by their names in its file."""
    # With the parameters for a state dict the library itself says how each is named in a file.
    trained: dict[str, Any] = peft.get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), save_embedding_layers=False
    )
    with safe_open(Path(adapter_dir) / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    if set(trained) != names:
        raise ValueError(
            f"{adapter_dir}: the library trains other tensors than the file holds: "
            f"{', '.join(sorted(set(trained) ^ names))}"
        )
    return trained


def _optimizer(
    tensors: Mapping[str, torch.nn.Parameter], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer that the settings name, with the library's LoRA+ groups where they ask."""
    if unknown := set(settings) - _OPTIMIZER_SETTINGS:
        raise NotImplementedError(f"the peft peer has no settings {', '.join(sorted(unknown))}")
    kind = settings.get("optimizer", "adamw")
    ratio = settings.get("loraplus_lr_ratio")
    if ratio is None or kind not in OPTIMIZERS:
        return plain_optimizer(tensors.values(), settings)
    make, own = OPTIMIZERS[kind]
    given = {"lr": settings["lr"]} | {key: settings[key] for key in own if key in settings}
    decay = settings.get("weight_decay", 0.0)
    if strange := [name for name in tensors if not name.endswith((".A", ".B"))]:
        raise NotImplementedError(f"LoRA+ groups are for A and B only, found {strange[0]}")
    # The library sorts by the name lora_B, and takes decay by a name of its own: the ordinary
    # weight_decay would be silently overridden by its groups' 0.
    groups = torch.nn.ModuleDict(
        {
            f"lora_{end}": torch.nn.ParameterList(
                tensor for name, tensor in tensors.items() if name.endswith(f".{end}")
            )
            for end in "AB"
        }
    )
    return create_loraplus_optimizer(
        groups, make, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay, **given
    )
