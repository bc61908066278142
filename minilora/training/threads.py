"""Threads: those of the BLAS, and those that work on parts of a whole."""

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any


@cache
def _pools(scipy: bool) -> Any:
    """The thread pools of the BLAS libraries: NumPy's and, once it is loaded, SciPy's."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def blas_threads(n: int) -> AbstractContextManager[Any]:
    """Let matrix products use n threads; a ``with`` block restores the number before.

    Nothing is set if they use n already, as setting takes longer than asking.
    """
    pools = _pools("scipy.special" in sys.modules)
    already = all(pool.num_threads == n for pool in pools.lib_controllers)
    return nullcontext() if already else pools.limit(limits=n)


def blas_name() -> str:
    """The libraries of matrix products, and the kinds of processor that they chose their code for.

    Sums have the same bits where these are the same.
    """
    info = _pools("scipy.special" in sys.modules).info()
    words = (f"{i['internal_api']} {i['version']} {i.get('architecture', '')}" for i in info)
    return ", ".join(sorted(set(words)))


def in_order(work: Callable[[Any], Any], parts: Sequence[Any], threads: int) -> Iterator[Any]:
    """The results of ``work`` on the parts, in their order, computed in parallel.

    Each thread runs its matrix products itself: pools inside a pool would wait for one another.
    ``np.errstate`` holds in all threads. With fewer parts than threads, the parts run one by one
    and their matrix products in parallel.
    """
    if len(parts) < threads or threads == 1:
        with blas_threads(threads):
            yield from map(work, parts)
        return
    contexts = [copy_context() for _ in parts]
    with blas_threads(1), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda context, part: context.run(work, part), contexts, parts)
