"""The plain data of a verification: a case, a comparison and its judgement, a check."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod, sqrt
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from minilora.verify.core.bigfloat import Portable, Shake
from minilora.verify.core.fixed import FREE, Fixed

if TYPE_CHECKING:
    from minilora.verify.implementation.guard import GuardedImplementation

CELLS = 32
"""The greatest number of rows and of columns in a picture."""

LOOSE = 2.0
"""An answer that would pass with so many times the unit roundoff is called loose."""


@dataclass(frozen=True)
class Case:
    """One case of a check; its inputs are a pure function of these values.

    ``fixed`` is what the implementation has fixed: the inputs are drawn to fit.
    """

    check: str
    dtype: str
    number: int
    seed: int
    fixed: Fixed = FREE

    @property
    def id(self) -> str:
        """The name for ``--case``; the seed is a separate option."""
        return f"{self.check}:{self.dtype}:{self.number}"

    def rng(self) -> np.random.Generator:
        """The case's generator, the same in every process (Python's ``hash`` is not)."""
        if isinstance(self.seed, Portable):
            of = f"{self.check}/{self.dtype}/{self.number}/{int(self.seed)}"
            return cast(np.random.Generator, Shake(f"minilora vectors/{of}"))  # has its methods
        words = [zlib.crc32(text.encode()) for text in (self.check, self.dtype)]
        return np.random.default_rng([*words, self.number, self.seed])


def counter(
    cases: Mapping[str, int], share: float = 1.0, low_precision: bool = True
) -> Callable[[str, str], int]:
    """The number of cases of a check by profile and dtype: a share of its level's, at least two.

    Without ``low_precision`` there are none in bfloat16 and float16.
    """

    def count(profile: str, dtype: str) -> int:
        if not low_precision and dtype not in ("float64", "float32"):
            return 0
        return max(2, int(cases[profile] * share))

    return count


@dataclass(frozen=True)
class Limits:
    """The limits of a comparison, in standard deviations of rounding.

    Over the n elements of an array, with z = |got - want| / sigma:
    max z <= max_z and rms z <= rms_z + rms_small / √n.
    """

    max_z: float = 6.0
    rms_z: float = 1.5
    rms_small: float = 3.0
    loose: float = LOOSE
    """The factor on the unit roundoff up to which a deviation is loose; 1: none is."""

    def rms(self, n: int) -> float:
        """The limit of the root mean square of z over n elements."""
        return self.rms_z + self.rms_small / sqrt(n)

    def verdict(self, z: float, rms: float, n: int) -> str:
        """``pass``, ``loose`` or ``fail``.

        Every term of a rounding variance is proportional to the square of the unit roundoff u, so
        sigma is proportional to u. Loose is what would pass with that many times u.
        """
        for name, factor in (("pass", 1.0), ("loose", self.loose)):
            if z <= factor * self.max_z and rms <= factor * self.rms(n):
                return name
        return "fail"


CLOSED_FORM = Limits()
"""For a sigma in closed form: a layer, a merge."""

MONTE_CARLO = Limits(8.0, 2.5, 7.5)
"""For a sampled sigma: a model. The rms limit is 2.5 (1 + 3/√n)."""

BOUND = Limits(1.0, 1.0, 0.0)
"""For a worst-case bound in the place of sigma: no element may exceed it."""

FIXED_BOUND = Limits(1.0, 1.0, 0.0, loose=1.0)
"""For a worst-case bound that the roundoff hardly moves, such as what few bits lose: not loose."""

CHANCE = Limits(1.0, 1.0, 0.0, loose=1.0)
"""For random draws: a bound that chance exceeds with a stated probability. No rounding is
involved, so nothing is loose."""


@dataclass(frozen=True)
class Comparison:
    """One array of an answer beside the correct one.

    sigma is the standard deviation that rounding gives each element; it broadcasts to the array.
    None is the exact lane, and an element of sigma 0 is exact, too: any difference is a deviation.
    ValueError where the arrays cannot be compared, which is a fault of the check and not of the
    implementation. ``parts`` gives what an answer may be made of, by name: arrays of which a
    multiple of each is summed, or, ``parts_by_row``, of which each row is one's. ``shows`` gives
    the mutants that a deviation of this array shows by itself, where numbers are left to chance.
    """

    array: str
    got: np.ndarray
    want: np.ndarray
    sigma: np.ndarray | None = None
    limits: Limits = CLOSED_FORM
    parts: Callable[[], Mapping[str, np.ndarray]] | None = None
    parts_by_row: bool = False
    shows: Callable[[], tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.want)
        if np.shape(self.got) != shape:
            raise ValueError(f"{self.array}: got shape {np.shape(self.got)}, expected {shape}")
        if np.size(self.want) == 0:
            raise ValueError(f"{self.array}: an empty array compares nothing")
        if not np.isfinite(self.want).all():
            raise ValueError(f"{self.array}: the expected values are not finite")
        if self.sigma is not None:
            sigma = np.broadcast_to(self.sigma, shape)
            if not (np.isfinite(sigma) & (sigma >= 0)).all():
                raise ValueError(f"{self.array}: sigma must be finite and not negative")

    def _deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """|got - want| and |z| of each element; NaN is infinitely far off."""
        # Long double: the correct answers to float64 are known to more digits.
        got = np.asarray(self.got).astype(np.longdouble)
        want = np.asarray(self.want).astype(np.longdouble)
        sigma = np.longdouble(0) if self.sigma is None else self.sigma
        with np.errstate(all="ignore"):
            difference = np.abs(got - want)
            difference = np.where(np.isnan(difference), np.longdouble(inf), difference)
            return difference, np.where(difference == 0, np.longdouble(0), difference / sigma)

    def picture(self) -> Picture:
        """Where in the array the deviation is."""
        _, z = self._deviation()
        shape = z.shape
        z = z.reshape(-1, shape[-1]) if shape else z.reshape(1, 1)
        for axis in (0, 1):
            parts = min(z.shape[axis], CELLS)
            starts = [i * z.shape[axis] // parts for i in range(parts)]
            z = np.maximum.reduceat(z, starts, axis)
        return Picture(shape, tuple(tuple(row) for row in z.astype(np.float64).tolist()))

    def judge(self) -> Judgement:
        """The verdict on this array, with its worst element."""
        got, want = np.asarray(self.got), np.asarray(self.want)
        exact = self.sigma is None
        if exact and (got == want).all():  # what most answers are
            origin = (0,) * want.ndim
            value = float(got[origin])
            return Judgement(
                self.array, "pass", want.size, 0, 0.0, 0.0, 0.0, 0.0, origin, value, value, None
            )
        sigma = np.broadcast_to(0.0 if self.sigma is None else self.sigma, want.shape)
        difference, z = self._deviation()
        with np.errstate(all="ignore"):
            largest, rms = float(z.max()), float(np.sqrt(np.mean(z * z)))
        limits = Limits(0.0, 0.0, 0.0) if exact else self.limits
        # Where several elements are equally bad (all of z is infinite), the one farthest off.
        worst = np.unravel_index(int(np.argmax(np.where(z == z.max(), difference, -1))), z.shape)
        return Judgement(
            array=self.array,
            verdict=limits.verdict(largest, rms, z.size),
            elements=z.size,
            beyond=int(np.count_nonzero(z > limits.max_z)),
            z=largest,
            rms=rms,
            limit=limits.max_z,
            rms_limit=limits.rms(z.size),
            index=tuple(int(i) for i in worst),
            got=float(got[worst]),
            want=float(want[worst]),
            sigma=None if exact else float(sigma[worst]),
        )


@dataclass(frozen=True)
class Picture:
    """Where in an array a deviation is: |z| of its elements.

    The last axis runs to the right and all others downwards, one after another. A side longer than
    CELLS is cut into CELLS parts, of which the i-th begins at ``i * side // CELLS``; a cell has the
    greatest |z| of its elements.
    """

    shape: tuple[int, ...]
    z: tuple[tuple[float, ...], ...]

    @property
    def sides(self) -> tuple[int, int]:
        """The rows and columns of the whole array."""
        return (prod(self.shape[:-1]), self.shape[-1]) if self.shape else (1, 1)

    def cell(self, index: tuple[int, ...]) -> tuple[int, int]:
        """The row and the column of the cell that an element lies in."""
        rows, columns = self.sides
        row = 0
        for i, side in zip(index[:-1], self.shape[:-1], strict=True):
            row = row * side + i
        column = index[-1] if index else 0
        # The last part that begins at or before it.
        down, right = len(self.z), len(self.z[0])
        return ((row + 1) * down - 1) // rows, ((column + 1) * right - 1) // columns


@dataclass(frozen=True)
class Judgement:
    """The verdict on one array: how many elements are beyond the limit, and the worst one.

    z and rms are infinite where an element that must be exact differs; sigma is None and both
    limits are 0 in the exact lane. The worst array of a case that deviates has a picture.
    """

    array: str
    verdict: str
    elements: int
    beyond: int
    z: float
    rms: float
    limit: float
    rms_limit: float
    index: tuple[int, ...]
    got: float
    want: float
    sigma: float | None
    picture: Picture | None = None

    @property
    def excess(self) -> float:
        """The deviation over its limit: at most 1 passes, infinity where == fails."""
        if self.sigma is None:
            return self.z  # 0 or infinity
        return max(self.z / self.limit, self.rms / self.rms_limit)


STRUCTURE = "structure-"
"""The start of the id of a `Diagnosis` that is a pattern of the numbers, and no mutant."""


@dataclass(frozen=True)
class Diagnosis:
    """A mutant that gives the implementation's answers: its id, what it computes, and the rms
    distance of its answers in standard deviations of rounding. ``separating`` is the case that
    separates it from others that give the same answers to this check, or would."""

    id: str
    sentence: str
    residual_z: float
    separating: str = ""


Diagnose = Callable[[Any, str, int, Sequence[str]], tuple[Diagnosis, ...]]
"""What explains a check's answers: of an implementation, a dtype, a seed and the known causes."""


@dataclass(frozen=True)
class Check:
    """One equation or law, and how to test an implementation by it.

    ``needs`` names the methods that ``run`` calls. ``run`` compares one case, and may stop with
    Skip or Fault (`errors`). ``cases`` gives the number of cases in a profile for a dtype, 0 where
    the check is not for that dtype. ``smallest`` looks for the smallest counterexample of a failed
    check: a dict of values to show, of which ``got`` and ``want`` are the two that differ, or None;
    with ``smallest_fault`` it finds errors, too. With ``is_relation`` the check compares two
    answers of the implementation, of which either may be wrong. ``diagnose`` names the mutants that
    explain the answers, for a dtype, a seed and the causes that are known; ``follows`` names those
    of the causes that explain this check too. With ``is_chance`` the implementation draws: asked
    twice, a right one gives two answers.
    """

    id: str
    level: str
    needs: tuple[str, ...]
    title: str
    run: Callable[[GuardedImplementation, Case], Iterable[Comparison]]
    cases: Callable[[str, str], int]
    smallest: Callable[[GuardedImplementation, str], dict[str, Any] | None] | None = None
    smallest_fault: bool = False
    is_relation: bool = False
    is_chance: bool = False
    diagnose: Diagnose | None = None
    follows: Diagnose | None = None
