"""Merges and conversions as they go wrong and as they go right, on real and on drawn models."""

from merge_catalogue import files, places, scales, several, sources, tables, variants
from merge_catalogue.catalogue import WRONGS, Wrong

__all__ = [
    "WRONGS",
    "Wrong",
    "files",
    "places",
    "scales",
    "several",
    "sources",
    "tables",
    "variants",
]
