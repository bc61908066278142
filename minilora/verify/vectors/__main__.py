"""``python -m minilora.verify.vectors [--anew]``: freeze the vectors that are new."""

import sys

from minilora.verify.vectors.vectors import freeze

freeze("--anew" in sys.argv)
