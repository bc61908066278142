"""What is wrong with an adapter's tensors by themselves, and how large its changes are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.audit.result import Entry, Figure
from minilora.audit.stored.module import Held, OpenAdapter, OpenModule
from minilora.audit.stored.size import effective_rank, singular_values
from minilora.audit.tensors import layer_of
from minilora.spec.ops import Array

EXPECTED_DTYPES = ("float32", "float16", "bfloat16")
MAGNITUDES = ("magnitude",)


def tensor_entries(adapter: OpenAdapter) -> Iterator[Entry]:
    """A verdict on each module, and entries for what else its tensors show.

    Every tensor is read once, and no product of factors is formed.
    """
    if not adapter.modules:
        text = "it holds no parameter of an adapter: it computes the base"
        yield Entry(str(adapter.path), "wrong", text, mistake="empty")
    shards = _Shards()
    for module in adapter.modules:
        for entry in _of_module(module):
            shards.add(entry)
            yield entry
    yield from shards.entries()
    for name, why in adapter.others.items():
        yield Entry(name, "wrong", f"{why}: it would be passed over, or refused")
    yield from _dtypes(adapter)


def _of_module(module: OpenModule) -> Iterator[Entry]:
    figures = place(module)
    if wrong := _not_whole(module):
        yield Entry(module.name, "wrong", wrong, figures, "incomplete")
        return
    bad = [said for part, held in module.parts.items() if (said := _not_finite(part, held))]
    if bad:
        yield Entry(module.name, "corrupt", "; ".join(bad), figures)
        return
    if not module.is_adapted:
        said = ", ".join(f"{part} {held.shape}" for part, held in module.parts.items())
        yield Entry(module.name, "fine", f"{module.kind}: {said}", figures)
        return
    if not module.is_measurable:
        text = f"rank {module.rank}: its factors are too large to be measured"
        yield Entry(module.name, "undecided", text, figures)
        return
    yield _measured(module, figures)


def place(module: OpenModule) -> dict[str, Figure]:
    """The figures that say where a module is."""
    layer = layer_of(module.name + ".")
    figures: dict[str, Figure] = {"module": module.name}
    return figures | ({} if layer is None else {"layer": layer})


def _not_whole(module: OpenModule) -> str:
    """What a module lacks, or which shapes contradict each other; "" where it is whole."""
    parts = {*module.parts} - {"base weight", "base bias", "alpha"}
    needs = parts & {"A", "B", "magnitude", "lora_bias", "E"}
    if module.kind == "shared" or "lambda_b" in parts or "lambda_d" in parts:
        return ""
    if needs and (missing := sorted({"A", "B"} - parts)):
        return f"found {', '.join(sorted(parts))}, and no {' and no '.join(missing)}"
    if module.misfit:
        return module.misfit
    if "A" not in parts:
        return ""
    m, _ = module.shape
    r = module.rank * module.experts
    wanted = {"lora_bias": m, "E": r}
    for part, size in wanted.items():
        if part in parts and module.parts[part].shape not in ((size,), (size, 1)):
            return f"{part} has the shape {module.parts[part].shape}, expected ({size},)"
    if "magnitude" in parts and int(np.prod(module.parts["magnitude"].shape)) not in module.shape:
        shape = module.parts["magnitude"].shape
        return f"magnitude has the shape {shape}, expected one entry for each of {m} rows"
    return ""


def _not_finite(part: str, held: Held) -> str:
    """How many entries are NaN or infinite, in words; "" of none. It is read block by block."""
    if held.dtype.kind in "iub":
        return ""
    wrong = 0
    for block in held.blocks():
        with np.errstate(invalid="ignore"):
            wrong += int(np.count_nonzero(~np.isfinite(block)))
    size = int(np.prod(held.shape))
    return f"{part}: {wrong} of {size} entries are NaN or infinite" if wrong else ""


def _measured(module: OpenModule, figures: dict[str, Figure]) -> Entry:
    """The module's norm, rank and effective rank; untrained where a factor is 0."""
    pairs = module.pairs()
    σ = singular_values(pairs)
    figures |= {"rows": module.shape[0], "last_row": _last_row(pairs)}
    s = 1.0 if module.scale is None else abs(module.scale)
    norm, rank = s * float(np.linalg.norm(σ)), module.rank
    figures |= {
        "rank": rank,
        "scale": module.scale,
        "norm": norm,
        "largest": s * float(σ[0]),
        "effective_rank": round(effective_rank(σ), 3),
        "dtype": "/".join(dict.fromkeys(str(module.parts[part].dtype) for part in "AB")),
    }
    for part, factor in (("B", 1), ("A", 0)):
        if all(not pair[factor].any() for pair in pairs):
            also = _rescaled(module)
            text = f"{part} is 0 everywhere: its change of the weight is 0{also}"
            return Entry(module.name, "doubtful", text, figures, "untrained")
    if module.scale == 0:
        text = "its scale is 0: it changes nothing"
        return Entry(module.name, "doubtful", text, figures, "scale-0")
    used = _used(pairs)
    if used < rank:
        text = f"of rank {rank}, {rank - used} rows of A or columns of B are 0: a smaller rank does"
        return Entry(module.name, "told", text, figures, "unused-rank")
    text = f"rank {rank}, scale {scale_text(module)}, norm {norm:.3g}, effective rank "
    return Entry(module.name, "fine", f"{text}{figures['effective_rank']:.3g}", figures)


def _last_row(pairs: list[tuple[Array, Array]]) -> int:
    """How many rows of B there are up to the last that is not 0."""
    ends = [np.flatnonzero(B.any(1)) for _, B in pairs]
    return max((int(end[-1]) + 1 for end in ends if end.size), default=0)


MOST_SHARDS = 1024


@dataclass
class _Shards:
    """How many processes may have saved the first one's rows of B alone, as FSDP parts them."""

    modules: int = 0
    counts: set[int] = field(default_factory=set)

    def add(self, entry: Entry) -> None:
        """Look at a module's rows that are 0."""
        rows, last = (entry.figures.get(name) for name in ("rows", "last_row"))
        if not isinstance(rows, int) or not isinstance(last, int) or not last:
            return
        own = {n for n in range(2, MOST_SHARDS) if -(-rows // n) == last and last < rows}
        self.counts = own if not self.modules else self.counts & own
        self.modules += 1

    def entries(self) -> Iterator[Entry]:
        """That it is so, where all modules say it."""
        if self.modules < 2 or not self.counts:
            return
        n = min(self.counts)
        text = (
            f"in all {self.modules} modules every row of B after the first 1/{n} is 0: one of {n} "
            "processes saved its own rows alone"
        )
        yield Entry("rows of B", "wrong", text, {"processes": n}, "one-shard")


def scale_text(module: OpenModule) -> str:
    """The scale in few digits, or that no file says it."""
    return "unknown" if module.scale is None else f"{module.scale:.4g}"


def _rescaled(module: OpenModule) -> str:
    return "; the magnitude may rescale it" if "magnitude" in module.parts else ""


def _used(pairs: list[tuple[Array, Array]]) -> int:
    """How many of the rank's directions are not 0 in both factors, of the matrix with the most."""
    return max(int(np.count_nonzero(A.any(1) & B.any(0))) for A, B in pairs)


def _dtypes(adapter: OpenAdapter) -> Iterator[Entry]:
    """Dtypes that no library expects of an adapter, and several in one file."""
    names: dict[str, list[str]] = {}
    for module in adapter.modules:
        for part, held in module.parts.items():
            if part != "alpha":
                names.setdefault(_dtype(held.dtype), []).append(held.name)
    for dtype, of in names.items():
        if dtype not in EXPECTED_DTYPES:
            text = (
                f"{len(of)} tensors are {dtype}, as {of[0]}: expected float32 or a half precision"
            )
            verdict = "told" if dtype == "float64" else "doubtful"
            yield Entry(f"dtype {dtype}", verdict, text, mistake="dtype")
    usual = [dtype for dtype in names if dtype in EXPECTED_DTYPES]
    if len(usual) > 1:
        said = ", ".join(f"{len(names[dtype])} {dtype}" for dtype in usual)
        text = f"tensors of several dtypes: {said}"
        yield Entry("dtypes", "told", text, mistake="dtypes")


def _dtype(dtype: np.dtype[Any]) -> str:
    return str(dtype)
