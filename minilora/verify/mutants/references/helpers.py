"""Small functions that references are written with, and that mutants put into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minilora.verify.core.tolerance import unit_roundoff

Array = np.ndarray

HALVES = ("bfloat16", "float16")


def refuse(settings: Mapping[str, Any], use_dora: bool, magnitude: Array | None) -> None:
    """NotImplementedError for settings that the references lack."""
    if settings:
        raise NotImplementedError(", ".join(settings))
    if use_dora != (magnitude is not None):
        raise NotImplementedError("use_dora goes with a magnitude")


def wide(array: Any) -> Any:
    """float16 and bfloat16 as float32; None stays None."""
    return array.astype(np.float32) if array is not None and array.dtype.name in HALVES else array


def doubled(*arrays: Any) -> list[Any]:
    """The arrays in float64; None stays None."""
    return [None if array is None else np.float64(array) for array in arrays]


def rows(x: Any) -> Any:
    """A row for each token: (…, n) as (t, n); None stays None."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def shaped(v: Array, shape: tuple[int, ...]) -> Array:
    """Rows of tokens in the shape of x again."""
    return v.reshape(*shape, v.shape[-1])


def uniform(rng: np.random.Generator, shape: Any) -> Any:
    """Numbers between -1 and 1."""
    return 2 * rng.random(shape) - 1


def upto(stop: int, length: int) -> Array:
    """1 at the first ``stop`` of ``length`` places, and 0 beyond."""
    return np.arange(length) < stop


def digits(number: Any, count: int) -> Any:
    """Rounded to so many binary digits: an array in the dtype that it has, or a float."""
    fraction, exponent = np.frexp(number)
    rounded = np.ldexp(np.round(fraction * 2.0**count) * 0.5**count, exponent)
    return rounded.astype(number.dtype) if isinstance(number, np.ndarray) else float(rounded)


def coarse(array: Array, dtype: Any) -> Any:
    """Rounded to half of the digits of the dtype under test."""
    return digits(array, round(-np.log2(unit_roundoff(str(dtype)))) // 2)


def four_less(array: Array, dtype: Any) -> Any:
    """Rounded to four binary digits less than the dtype under test has."""
    return digits(array, round(-np.log2(unit_roundoff(str(dtype)))) - 4)


def narrow(array: Array, dtype: Any) -> Any:
    """Rounded to the dtype under test, as an array that is stored on the way is."""
    return array.astype(dtype).astype(array.dtype)


def square(W: Array) -> bool:
    """Whether m = n, where a transpose is not noticed by its shape."""
    return bool(W.shape[0] == W.shape[1])


def product(adapter: Any) -> Any:
    """B A of an adapter, without its scale."""
    return wide(adapter["B"]) @ wide(adapter["A"])


def in_buffer(memory: dict[str, Any], name: str, value: Array) -> Any:
    """The value in memory that is used for every answer of its shape."""
    key = f"{name} {value.shape} {value.dtype}"
    np.copyto(memory.setdefault(key, np.empty_like(value)), value)
    return memory[key]


def by_identity(memory: dict[str, Any], value: Array) -> Any:
    """A copy of what the first call with an array in this place had there."""
    return memory.setdefault(f"at {id(value)} {value.shape}", value.copy())


def first_call(memory: dict[str, Any], name: str, value: Any) -> Any:
    """What the first call had under this name, as long as its shape fits."""
    kept = memory.setdefault(name, np.array(value))  # the caller uses the memory again
    return kept if np.shape(kept) == np.shape(value) else value


def call_before(memory: dict[str, Any], name: str, value: Any) -> Any:
    """What the call before had under this name, if its shape fits."""
    kept, memory[name] = memory.get(name, value), value
    return kept if np.shape(kept) == np.shape(value) else value


def piled_up(memory: dict[str, Any], name: str, value: Array) -> Any:
    """Added to what the calls before gave under this name, if its shape fits."""
    kept = memory.get(name, value * 0)
    memory[name] = kept + value if kept.shape == value.shape else value
    return memory[name]
