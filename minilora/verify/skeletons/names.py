"""What libraries call the parts of a LoRA layer: arguments, parameters and methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

LINEAR = "torch.nn.Linear(n, m, bias=bias is not None)"
MODEL = f"torch.nn.Sequential({LINEAR})"

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "n": ("infeatures", "indim", "inputdim", "din", "dimin", "nin", "insize", "inputsize", "fanin"),
    "m": (
        *("outfeatures", "outdim", "outputdim", "dout", "dimout", "nout", "outsize"),
        *("outputsize", "fanout"),
    ),
    "r": ("r", "rank", "rankdim", "loradim", "networkdim"),
    "alpha": ("alpha", "scalealpha"),
    "alpha / r": ("scale", "scaling", "scalefactor", "multiplier"),
    "p": ("dropout", "dropoutp", "dropoutrate", "dropoutprob", "pdropout"),
    "bias is not None": ("bias", "usebias"),
    "use_rslora": ("userslora", "rslora", "rankstabilized"),
    LINEAR: (
        *("linear", "layer", "base", "baselayer", "baselinear", "basemodule", "module", "orig"),
        *("original", "originallayer", "originalmodule", "orgmodule", "linearlayer", "wrapped"),
    ),
    MODEL: ("model", "network", "net"),
    '["0"]': ("targetmodules", "targetnames"),
    '"default"': ("adaptername",),
}
"""What an argument is given, by its name; the names are written as `plain` gives them."""

ARRAYS: Mapping[str, tuple[str, ...]] = {
    "x": ("x", "input", "inputs", "h", "hidden", "hiddenstates"),
    "W": ("w", "w0", "weight", "kernel", "baseweight"),
    "A": ("a", "wa", "down", "wdown"),
    "B": ("b", "wb", "up", "wup"),
    "bias": ("bias", "basebias"),
}
"""The arrays of a function that computes a layer."""

MERGES = (
    *("merge", "merge_weights", "merge_lora", "merge_adapter", "merge_and_unload", "fuse"),
    *("fuse_lora", "fold", "bake"),
)
UNMERGES = (
    "unmerge",
    "unmerge_weights",
    "unmerge_lora",
    "unmerge_adapter",
    "unfuse",
    "unfuse_lora",
)

OF_A = re.compile(r"(^|[._])(lora_?)?(a|down)([._]|$)|lora_?a|down", re.IGNORECASE)
OF_B = re.compile(r"(^|[._])(lora_?)?(b|up)([._]|$)|lora_?b|up", re.IGNORECASE)
OF_BASE = re.compile(r"weight|bias|kernel|base|orig|linear", re.IGNORECASE)
PARTS = {"W": OF_BASE, "A": OF_A, "B": OF_B, "bias": OF_BASE}


def plain(name: str) -> str:
    """A name without case, underscores and what says only that it is LoRA's."""
    bare = name.lower().strip("_").replace("_", "")
    return bare if bare in ("loradim", "networkdim") else re.sub(r"^(lora|network)(?=.)", "", bare)


def meant(name: str, table: Mapping[str, tuple[str, ...]] = ARGUMENTS) -> str | None:
    """What the argument is given; None where its name tells nothing."""
    return next((value for value, names in table.items() if plain(name) in names), None)


def only(part: str, fitting: Iterable[tuple[str, bool]]) -> tuple[str, bool] | None:
    """The one place that fits; of several, the one whose name tells that it is this part."""
    found = list(fitting)
    if len(found) > 1:
        named = [place for place in found if PARTS[part].search(place[0])]
        others = [p for other, p in PARTS.items() if other != part and p is not PARTS[part]]
        found = [p for p in named if not any(o.search(p[0]) for o in others)] or named
    return found[0] if len(found) == 1 else None
