"""How LoRA goes wrong: wrong implementations, each a right one with a line or two edited.

Each must be caught, which shows that the checks see; each has a formula, so that a deviation can be
given its name. A right implementation stands in `references` as straight code; a module here holds
the edits of a level, as tables by family and by the check that shows them best. To add a mutant,
add its line to the table of its family.
"""

from minilora.verify.mutants import (
    files,
    gradflow,
    inference,
    init,
    lifecycle,
    linear,
    merge,
    model,
    module,
    multi,
    names,
    optimizer,
    precision,
    quantized,
    sessions,
    train,
    variants,
)
from minilora.verify.mutants.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (
    *linear.MUTANTS,
    *merge.MUTANTS,
    *variants.MUTANTS,
    *precision.MUTANTS,
    *multi.MUTANTS,
    *module.MUTANTS,
    *lifecycle.MUTANTS,
    *quantized.MUTANTS,
    *sessions.MUTANTS,
    *optimizer.MUTANTS,
    *model.MUTANTS,
    *train.MUTANTS,
    *init.MUTANTS,
    *files.MUTANTS,
    *gradflow.MUTANTS,
    *inference.MUTANTS,
    *names.MUTANTS,
)
"""All of them, the lowest level first; among them some equivalents, which must pass."""
