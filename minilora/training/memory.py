"""Freed heap memory: kept for the next array, which is faster, or returned to the system."""

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``."""

LARGEST = 10 * 2**20
"""The bytes of an array above which its memory is always returned: few are, such as logits."""


def keep_freed_memory() -> bool:
    """Keep freed heap memory in the process for the next array; whether the C library can.

    By default glibc returns a large array's memory at once, and the system clears the pages of the
    next array: this takes longer than elementwise arithmetic.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def return_freed_memory() -> None:
    """Return freed heap memory to the OS (malloc_trim). Undoes `keep_freed_memory`.

    The pieces that one step leaves do not fit all arrays of the next one.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
