"""Findings in libraries are pinned to the release that they were seen in."""

import re
from importlib.metadata import version

from minilora.findings import FINDINGS, LIBRARIES


def changed_since(docstring):
    """The releases that "Seen in …" names and that are not the installed ones, in words."""
    named = re.search(r"^ *(Seen in .*)", docstring or "", re.M)
    return changed(re.findall(r"(\w+) (\d+(?:\.\d+)+)", named[1])) if named else []


def changed_since_finding(id):
    """The same of a finding."""
    finding = FINDINGS[id]
    library = LIBRARIES[finding.library]
    return changed([(library.distribution, finding.seen), *finding.also.items()])


def changed(seen):
    """Those of (distribution, release) that are not installed, in words."""
    installed = {name: version(name) for name, _ in seen}
    return [f"{name} is {installed[name]}" for name, number in seen if installed[name] != number]
