"""``python -m minilora``: the command line."""

import sys

from minilora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
