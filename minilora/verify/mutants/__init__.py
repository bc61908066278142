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
from minilora.verify.mutants.mutant import Mutant
from minilora.verify.mutants.reference import Plain

__all__ = ["MUTANTS", "Mutant", "Plain"]

MUTANTS: tuple[Mutant, ...] = (
    *linear.MUTANTS,
    *merge.MUTANTS,
    *variants.MUTANTS,
    *multi.MUTANTS,
    *lifecycle.MUTANTS,
    *optimizer.MUTANTS,
    *model.MUTANTS,
    *train.MUTANTS,
    *init.MUTANTS,
    *files.MUTANTS,
    *gradflow.MUTANTS,
)
"""All of them, the lowest level first; among them some equivalents, which must pass."""
