"""Findings in libraries are pinned to the release that they were seen in."""

import re
from importlib.metadata import version


def changed_since(docstring):
    """The releases that "Seen in …" names and that are not the installed ones, in words."""
    named = re.search(r"^ *(Seen in .*)", docstring or "", re.M)
    seen = re.findall(r"(\w+) (\d+(?:\.\d+)+)", named[1]) if named else []
    installed = {name: version(name) for name, _ in seen}
    return [f"{name} is {installed[name]}" for name, number in seen if installed[name] != number]
