"""LoRA's variants: each equation in full, and one value for each in the registry.

Most variants keep LoRA's equation and change its scale, its initialization, what is trained or on
which tokens it acts. The others have a module each, beside `lora_linear` line for line; what
differs is marked with ``≠``. Where several adapters of one projection act, their branches
y - (W x + b) add.

A variant is an `Entry`: everything that treats one variant otherwise than another reads it there.
An equation of its own is an `ExtendedVariant`, with its parameters beside A and B.
"""

from minilora.spec.variants import adalora, alora, dora, lora_bias, lora_equation, vera
from minilora.spec.variants.adalora import ADALORA, adalora_linear, merge_adalora
from minilora.spec.variants.alora import ALORA, alora_linear, invocation, merge_alora
from minilora.spec.variants.dora import (
    DORA,
    DORA_FULL,
    dora_full_linear,
    dora_linear,
    merge_dora,
    rescaled_linear,
    rescaled_lora_linear,
    row_norm,
)
from minilora.spec.variants.entry import (
    LAWS,
    Column,
    Entry,
    ExtendedVariant,
    Peft,
    extended,
    fresh_parts,
    part_shapes,
    start,
)
from minilora.spec.variants.lora_bias import LORA_BIAS, lora_bias_linear, merge_lora_bias
from minilora.spec.variants.vera import LAMBDA_D, VERA, merge_vera, vera_linear

__all__ = [
    "ADALORA",
    "ALORA",
    "DORA",
    "DORA_FULL",
    "LAMBDA_D",
    "LAWS",
    "LORA_BIAS",
    "REGISTRY",
    "VERA",
    "Column",
    "Entry",
    "ExtendedVariant",
    "Peft",
    "adalora_linear",
    "alora_linear",
    "dora_full_linear",
    "dora_linear",
    "extended",
    "fresh_parts",
    "invocation",
    "lora_bias_linear",
    "merge_adalora",
    "merge_alora",
    "merge_dora",
    "merge_lora_bias",
    "merge_vera",
    "part_shapes",
    "rescaled_linear",
    "rescaled_lora_linear",
    "row_norm",
    "start",
    "vera_linear",
]

REGISTRY: dict[str, Entry] = {
    **lora_equation.ENTRIES,
    **lora_bias.ENTRIES,
    **dora.ENTRIES,
    **vera.ENTRIES,
    **adalora.ENTRIES,
    **alora.ENTRIES,
}
"""Every variant by its name."""
