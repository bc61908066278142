"""How Sphinx builds these pages: ``python -m sphinx -W -b html docs OUT``, without a network."""

import os
from pathlib import Path

here = Path(__file__).parent

# The cells run the source that the pages show, whatever is installed, and the tests' derivative.
shown = [
    str(here.parent / folder)
    for folder in (".", "docs", "tests", "tests/io", "tests/spec", "reference_models")
]
os.environ["PYTHONPATH"] = os.pathsep.join([*shown, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "minilora"
author = "the minilora contributors"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "minilora"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["minilora.css"]

# Equations are numbered by page: (1.2) is the second of the first page in the reading order.
numfig = True
numfig_secnum_depth = 1

# d of a gradient stands upright: dx is one name, as in the code.
mathjax3_config = {"tex": {"macros": {"d": r"\mathrm{d}"}}}

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]

nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 60
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell makes: CommonMark has none
