"""What files need to know of an architecture: one value with its names, layouts and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minilora.spec.models import Config

NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Settings to write: with a padding token transformers holds the gradient of its embedding at 0."""


def _no_fields(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _no_settings(c: Any) -> dict[str, Any]:
    return {}


def _no_more(settings: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Gguf:
    """What llama.cpp has of an architecture.

    ``keys`` has the setting of each field. ``name``: the architecture's there, where it is not
    transformers' ``model_type``. ``special``: settings that ``read`` reads: it returns the fields
    that these and known fields give; ``write`` is its inverse. ``fixed``: further settings, with
    the values under which the function is the one here. ``one_added``: norms are stored as 1 + w.
    """

    keys: Mapping[str, str]
    name: str = ""
    special: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    read: Callable[[Any, Mapping[str, Any]], dict[str, Any]] = _no_more
    write: Callable[[Any], dict[str, Any]] = _no_settings
    one_added: bool = False


@dataclass(frozen=True)
class Architecture:
    """One architecture in files; `models` has its equations.

    ``name`` and ``model_type`` are transformers', ``config`` is the class in `models`, and
    ``others`` are classes with more fields, which files of this name may need;
    ``constant`` are the fields that the name settles. ``headless`` is the name of it without
    its head, which is then drawn.

    Module paths, as transformers has them: ``outer`` those outside the blocks, ``block`` those in a
    block, below ``blocks`` and the block's number. ``prefix``: the part of a path that older files
    leave out. ``buffers``: an expression for tensors of older files that are no parameters.
    ``transposed``: the projections' weights lie (in, out), as transformers' Conv1D has them.

    ``config.json``: ``keys`` has the setting of each field. ``absent``: what transformers takes for
    a field where there is none, computed from the fields before. ``fixed``: further settings, with
    the values under which the function is the one here. ``inert``: settings that change no logits.
    ``special``: settings that ``read_fields`` reads; it returns the fields made of them, and
    ``write_settings`` is its inverse. ``written``: further settings to write. ``windows``: some
    layers attend to a window of the last tokens.

    PEFT: ``heeds_weight_tying``: ``ensure_weight_tying`` has an effect. ``reads_replication`` and
    ``writes_replication``: whether an adapter with ``layer_replication`` can be read and written.

    GGUF: ``gguf`` is None where llama.cpp has no such architecture.
    ``permuted``: the projections whose rows llama.cpp orders otherwise, as its RoPE turns
    neighbours. MLX: ``mlx_prefix`` is what mlx-lm has in place of ``prefix``, None where mlx-lm has
    no such architecture.
    """

    name: str
    model_type: str
    config: type[Config]
    prefix: str
    outer: Mapping[str, str]
    blocks: str
    block: Mapping[str, str]
    keys: Mapping[str, str]
    absent: Mapping[str, Callable[[dict[str, Any]], Any]]
    fixed: Mapping[str, tuple[Any, ...]]
    inert: str
    written: Mapping[str, Any]
    headless: str | None = None
    special: tuple[str, ...] = ()
    others: tuple[type[Config], ...] = ()
    windows: bool = False
    constant: Mapping[str, Any] = field(default_factory=dict)
    read_fields: Callable[[Path, Mapping[str, Any]], dict[str, Any]] = _no_fields
    write_settings: Callable[[Any], dict[str, Any]] = _no_settings
    buffers: str | None = None
    transposed: bool = False
    heeds_weight_tying: bool = False
    reads_replication: bool = True
    writes_replication: bool = True
    gguf: Gguf | None = None
    permuted: tuple[str, ...] = ()
    mlx_prefix: str | None = None

    def has_field(self, name: str) -> bool:
        """Whether the configuration has this field: ``theta`` where it has RoPE, for one."""
        return any(f.name == name for f in fields(self.config))

    @property
    def gguf_name(self) -> str:
        """The architecture's name in GGUF files."""
        return (self.gguf and self.gguf.name) or self.model_type

    def configures(self, c: Config) -> bool:
        """Whether ``c`` is a configuration of this architecture."""
        return type(c) in (self.config, *self.others) and all(
            getattr(c, f) == v for f, v in self.constant.items()
        )

    def configuration(self, values: Mapping[str, Any]) -> Config:
        """The configuration of these values, of the class that has fields for all of them."""
        known = {**values, **self.constant}
        classes = (self.config, *self.others)
        chosen = next(cls for cls in classes if known.keys() <= {f.name for f in fields(cls)})
        return chosen(**known)

    def paths(self, c: Config) -> dict[str, str]:
        """Internal module name -> the module's path, a tied head's among them."""
        named = dict(self.outer)
        for i in range(c.layers):
            named |= {f"layers.{i}.{at}": f"{self.blocks}.{i}.{p}" for at, p in self.block.items()}
        return named
