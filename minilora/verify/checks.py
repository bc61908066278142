"""All checks, in the order in which a fault is easiest to find: the lowest level first."""

from minilora.verify.check import Check
from minilora.verify.levels import linear, merge, model, optimizer

CHECKS: tuple[Check, ...] = (*linear.CHECKS, *merge.CHECKS, *model.CHECKS, *optimizer.CHECKS)
