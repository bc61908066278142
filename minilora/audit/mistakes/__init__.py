"""The catalogue of wrong merges: each a name, what was done, and the merges that do it.

A mistake is an edit of the right changes, or of what they act on: the equations stay those of
`minilora.spec`. Wrong scales of one change are in `minilora.audit.scales`, and what only parts of a
tensor lack in `minilora.audit.parts`.
"""

from minilora.audit.mistakes.factors import FACTORS
from minilora.audit.mistakes.kinds import KINDS
from minilora.audit.mistakes.layouts import LAYOUTS
from minilora.audit.mistakes.magnitudes import MAGNITUDES
from minilora.audit.mistakes.mistake import Mistake
from minilora.audit.mistakes.others import OTHERS
from minilora.audit.mistakes.repeated import TAKEN_OUT, TWICE
from minilora.audit.mistakes.roundings import ROUNDINGS
from minilora.audit.mistakes.several import SEVERAL
from minilora.audit.mistakes.weights import WEIGHTS

__all__ = ["MISTAKES", "Mistake"]

MISTAKES: tuple[Mistake, ...] = (
    TAKEN_OUT,  # first: another change by a factor near 0 would explain it too
    *MAGNITUDES,
    *SEVERAL,
    *FACTORS,
    *LAYOUTS,
    *OTHERS,
    *KINDS,
    *ROUNDINGS[:-1],
    *WEIGHTS,
    TWICE,
    ROUNDINGS[-1],  # last of all: its bound is the widest
)
"""Every known mistake but the wrong scales of one change: the likeliest first."""
