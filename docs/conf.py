"""How Sphinx builds these pages: ``python -m sphinx -W -b html docs OUT``, without a network."""

import os
import sys
from pathlib import Path

here = Path(__file__).parent
sys.path[:0] = [str(here / "extensions"), str(here.parent), str(here)]

import generated  # noqa: E402

generated.write()

# The cells run the source that the pages show, whatever is installed, and the tests' derivative.
shown = [
    str(here.parent / folder)
    for folder in (".", "docs", "tests", "tests/io", "tests/spec", "reference_models")
]
os.environ["PYTHONPATH"] = os.pathsep.join([*shown, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "minilora"
author = "the minilora contributors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "layout",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "downloads", "extensions"]

# Modules are imported without the libraries that they compare with, installed or not.
autodoc_mock_imports = [
    "bitsandbytes",
    "jax",
    "llama_cpp",
    "loralib",
    "mlx",
    "mlx_lm",
    "peft",
    "torch",
    "transformers",
]
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "minilora"
html_show_copyright = False
html_use_index = False
html_domain_indices = False
html_static_path = ["_static"]
html_css_files = ["minilora.css"]

# Equations are numbered by page: (1.2) is the second of the first page in the reading order.
numfig = True
numfig_secnum_depth = 1

# d of a gradient stands upright: dx is one name, as in the code.
mathjax3_config = {"tex": {"macros": {"d": r"\mathrm{d}"}}}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache", "ref.python"]  # of classes of one name in two modules

nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell makes: CommonMark has none


def setup(app):
    """Read the pages in parallel: what finds MathJax's files keeps nothing between pages."""
    app.extensions["sphinx-mathjax-offline"].parallel_read_safe = True
