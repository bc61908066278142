"""How LoRA goes wrong: wrong implementations, each a changed line or two of a right one.

Each must be caught, which shows that the checks see; each has a formula, so that a deviation can be
given its name. To add one, add its line to a family in the module of its level.
"""

from minilora.verify.mutants import (
    files,
    gradflow,
    init,
    lifecycle,
    linear,
    merge,
    model,
    multi,
    optimizer,
    train,
    variants,
)
from minilora.verify.mutants.mutant import Misreading
from minilora.verify.mutants.reference import Plain

__all__ = ["MISREADINGS", "Misreading", "Plain"]

MISREADINGS: tuple[Misreading, ...] = (
    *linear.MISREADINGS,
    *merge.MISREADINGS,
    *variants.MISREADINGS,
    *multi.MISREADINGS,
    *lifecycle.MISREADINGS,
    *optimizer.MISREADINGS,
    *model.MISREADINGS,
    *train.MISREADINGS,
    *init.MISREADINGS,
    *files.MISREADINGS,
    *gradflow.MISREADINGS,
)
"""All of them, the lowest level first; among them some equivalents, which must pass."""
