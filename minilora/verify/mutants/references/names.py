"""A right resolver of names, as straight code: what is adapted, and what is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def matches(wanted: Any, name: str) -> bool:
    """Whether an expression is the whole name, or one of the names is it or its dotted end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith("." + end) for end in wanted)


def layer_of(name: str, patterns: Any) -> int | None:
    """The number of the block that the module lies in."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for before in [rf"(^|.*?\.){p}" for p in patterns] or [r".*?\.[^.]*"]:
        if found := re.match(rf"{before}\.(?P<number>\d+)\.", name):
            return int(found["number"])
    return None


def is_in_layers(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the module lies in the layers that are asked for."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    return layer_of(name, config.get("layers_pattern") or []) in layers


def is_hit(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the module gets an adapter."""
    wanted = config["target_modules"]
    if matches(config.get("exclude_modules") or [], name):
        return False
    if any(f".{name}.".find(f".{saved}.") >= 0 for saved in config.get("modules_to_save") or []):
        return False
    if str(wanted).lower() == "all-linear":
        return name.rsplit(".", 1)[-1] not in ("embed_tokens", "lm_head") and "norm" not in name
    if not isinstance(wanted, str) and name in wanted:
        return True
    return matches(wanted, name) and is_in_layers(name, config)


def own_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first expression for the name or its dotted end."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def require(config: Mapping[str, Any]) -> None:
    """ValueError where settings contradict each other."""
    is_expression = isinstance(config["target_modules"], str)
    layers = config.get("layers_to_transform")
    if layers is not None and is_expression:
        raise ValueError("layers_to_transform beside an expression")
    if config.get("layers_pattern") and layers is None:
        raise ValueError("layers_pattern without layers_to_transform")
    if config["r"] < 1:
        raise ValueError("a rank below 1")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError("no such bias")
    if config.get("use_dora") and config.get("lora_bias"):
        raise ValueError("DoRA has no bias of B")


class Names:
    name = "names"

    def targets(self, config: Any, names: Sequence[str]) -> dict[str, tuple[int, float]]:
        """The rank and alpha of each adapted module."""
        c = {**config}
        require(c)
        hit = [name for name in names if is_hit(name, c)]
        # hit
        if not hit:
            raise ValueError("no module matches")
        r, alpha = c["r"], c["lora_alpha"]
        ranks, alphas = c.get("rank_pattern"), c.get("alpha_pattern")
        return {n: (own_value(ranks, n, r), own_value(alphas, n, alpha)) for n in hit}

    def trainable(self, config: Any, names: Sequence[str]) -> list[str]:
        """The names of the trained tensors in the adapter's file."""
        c = {**config}
        adapted = self.targets(c, list(dict.fromkeys(name.rpartition(".")[0] for name in names)))
        tensors = []
        for at in adapted:
            if at.endswith("embed_tokens"):
                tensors += [f"{at}.lora_embedding_A", f"{at}.lora_embedding_B"]
            else:
                tensors += [f"{at}.lora_A.weight", f"{at}.lora_B.weight"]
            if c.get("use_dora"):
                tensors.append(f"{at}.lora_magnitude_vector")
            if c.get("lora_bias"):
                tensors.append(f"{at}.lora_B.bias")
        bias = c.get("bias", "none")
        for name in names:
            at, _, part = name.rpartition(".")
            if at.endswith(tuple(c.get("modules_to_save") or ())):
                tensors.append(name)
            elif part == "bias" and (bias == "all" or (bias == "lora_only" and at in adapted)):
                tensors.append(f"{at}.base_layer.bias" if at in adapted else name)
        # trained
        return [f"base_model.model.{name}" for name in tensors]
