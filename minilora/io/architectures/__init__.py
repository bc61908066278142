"""The architectures in files, a module each, and the parameters' names and layouts there.

Inside, weights are (out, in), vectors (n, 1), and the names are those of `models`.
"""

from collections.abc import Iterable, Mapping

from minilora.io.architectures.architecture import Architecture
from minilora.io.architectures.bert import BERT
from minilora.io.architectures.distilbert import DISTILBERT
from minilora.io.architectures.gemma3 import GEMMA3
from minilora.io.architectures.gpt2 import GPT_2
from minilora.io.architectures.llama import LLAMA, QWEN2
from minilora.io.architectures.qwen3 import QWEN3
from minilora.io.architectures.smollm3 import SMOLLM3
from minilora.spec.models import Config
from minilora.spec.ops import Array

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture_of",
    "internal_targets",
    "is_vector",
    "module_paths",
    "tensor_names",
    "to_file_layout",
]

ARCHITECTURES: Mapping[str, Architecture] = {
    a.name: a for a in (LLAMA, QWEN2, QWEN3, SMOLLM3, GEMMA3, GPT_2, BERT, DISTILBERT)
}
"""The architectures that are read and written, by their names in ``config.json``."""


def architecture_of(c: Config) -> Architecture:
    """The architecture that ``c`` configures.

    Errors: TypeError for a configuration of none of them.
    """
    for a in ARCHITECTURES.values():
        if a.configures(c):
            return a
    raise TypeError(f"{c}: expected a configuration of {', '.join(ARCHITECTURES)}")


def module_paths(c: Config) -> dict[str, str]:
    """Internal module name -> the module's path in transformers: ``layers.0.q`` and the like."""
    with_parameters = {name.rpartition(".")[0] for name in c.shapes()}
    paths = architecture_of(c).paths(c)
    return {at: path for at, path in paths.items() if at in with_parameters}


def internal_targets(c: Config, names: Iterable[str]) -> list[str]:
    """The names of target modules with those of transformers, such as ``q_proj``, as they are here.

    A name that is a module's path there, or its dotted end, is replaced by the names here; any
    other stays as it is.
    """
    paths, linears = module_paths(c), c.linears()
    found: list[str] = []
    for name in names:
        inside = [at for at, path in paths.items() if f".{path}".endswith(f".{name}")]
        inside = [at for at in inside if at in linears]
        ends = {at.rpartition(".")[2] for at in inside}
        all_of_end = [at for at in linears if at.rpartition(".")[2] in ends]
        found += (ends if len(ends) == 1 and inside == all_of_end else inside) or [name]
    return found


def tensor_names(c: Config) -> dict[str, tuple[str, bool]]:
    """Internal parameter name -> (the file's tensor name, whether it lies transposed there).

    GPT-2's projections lie transposed, (in, out). Vectors are (n,) in files and (n, 1) inside.
    """
    paths, transposed = module_paths(c), architecture_of(c).transposed
    linears = c.linears() if transposed else {}
    names = {}
    for name in c.shapes():
        at, _, part = name.rpartition(".")
        names[name] = (f"{paths[at]}.{part}", part == "weight" and at in linears)
    return names


def is_vector(name: str) -> bool:
    """Whether the parameter is a vector: a bias, or a norm's weight."""
    at, _, part = name.rpartition(".")
    return part == "bias" or at.rpartition(".")[2].startswith("norm")


def to_file_layout(name: str, array: Array, transposed: bool) -> Array:
    """The parameter as it lies in a file."""
    return array[:, 0] if is_vector(name) else array.T if transposed else array
