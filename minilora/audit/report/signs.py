"""A sign and a class of the style for each severity."""

from __future__ import annotations

SIGNS = {"deviation": "✗", "undecided": "?", "warning": "≈", "note": "i", "ok": "✓"}
CLASSES = {
    "deviation": "fail",
    "undecided": "error",
    "warning": "loose",
    "note": "soft",
    "ok": "pass",
}
