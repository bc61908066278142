"""All checks, in the order in which a fault is easiest to find: the lowest level first."""

from minilora.verify.check import Check
from minilora.verify.levels import linear, merge, optimizer

CHECKS: tuple[Check, ...] = (*linear.CHECKS, *merge.CHECKS, *optimizer.CHECKS)
