"""What findings in several libraries have in common: what is right, and what it does to files."""

from __future__ import annotations

from minilora.findings.conditions import one_factor, start_in_base
from minilora.findings.finding import Stored

ALL_TENSORS_COUNT = (
    "Every tensor of an adapter is part of its function; what is not supported is an error."
)
"""What is right where a library leaves tensors out."""

ALL_TENSORS_FIT = (
    "Every tensor of an adapter has a place in the model, or the adapter is another model's."
)
"""What is right where a library passes over names that it does not know."""

START_TAKEN_OUT = r"$W - s B_0 A_0 + s B A$, which PEFT makes of the same folder."
"""What is right where a library ignores ``init_lora_weights``."""

START_STAYS = Stored(
    start_in_base,
    "may",
    "it adds s B A to the base that it serves: right on the residual alone, while in the "
    "original one the start s B0 A0 still lies",
)
"""What such a library makes of an adapter in files."""

FUNCTION_OF_FILE = "What is loaded is a function of the file."
"""What is right where a library draws what a file lacks."""

FACTOR_AS_DRAWN = Stored(
    one_factor, "other", "the factor that is missing stays as it was drawn at random"
)
"""What such a library makes of an adapter in files."""
