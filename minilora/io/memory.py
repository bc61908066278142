"""How much memory the system has left."""

import os
from pathlib import Path


def free_memory(unknown: float) -> float:
    """The bytes that can be had without swapping; ``unknown`` if the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return unknown
