"""The scripts of findings show what they say, as recorded, without minilora."""

import ast
import os
import re

import pytest
from extras import optional

from minilora.findings import FINDINGS, LIBRARIES
from minilora.findings.issue import issue, issues
from minilora.findings.reproduce import Printed, algebra, path_of, printed, releases, run, script

IDS = [id for id in FINDINGS if path_of(id).is_file()]
RECORDED = printed()
PACKED = ("bitsandbytes.packed-gradient", "bitsandbytes.packed-rounding", "peft.packed-merge")
"""What needs a processor with AVX-512 for bfloat16."""


def modules(text):
    """The modules that a script imports, in order."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def skip_unless_it_runs(id):
    for module in modules(script(id)):
        if module.split(".")[0] in {name.replace("-", "_") for name in LIBRARIES} | {"torch"}:
            optional(module)
    if id in PACKED and not optional("bitsandbytes").functional.has_avx512bf16():
        pytest.skip("the packing is that of processors with AVX-512 for bfloat16")
    kernels = optional("torch").backends.cpu if id == "bitsandbytes.rows-no-blocks" else None
    if kernels and kernels.get_cpu_capability() != "AVX512":
        pytest.skip("the kernel is that of processors with AVX-512")


def marked(id):
    """The finding's mark; all but loralib's, which import least, take seconds."""
    slow = [] if id.startswith("loralib.") else [pytest.mark.slow]
    return pytest.param(id, marks=[pytest.mark.finding(id), *slow])


@pytest.mark.parametrize("id", [marked(id) for id in IDS])
def test_a_script_shows_its_finding_and_prints_what_is_recorded(id, monkeypatch, tmp_path):
    monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
    monkeypatch.chdir(tmp_path)
    skip_unless_it_runs(id)
    found = run(script(id), LIBRARIES[FINDINGS[id].library].distribution)
    assert found.shows
    recorded = RECORDED.get(id, found)
    if found.releases == recorded.releases:  # another release has other words for an error
        assert found == recorded


def test_a_script_that_gets_what_is_expected_shows_nothing():
    assert not run("print('got     ', 1)\nprint('expected', 1)\n").shows
    assert run("print('got     ', 1)\nprint('expected', 2)\n") == Printed("1", "2")


def test_a_script_that_prints_anything_else_is_refused():
    with pytest.raises(ValueError, match="expected a line with got"):
        run("print('expected', 1)")


@pytest.mark.parametrize("id", IDS)
def test_a_script_begins_with_its_algebra_is_short_and_needs_no_minilora(id):
    text = script(id)
    assert 0 < len(re.match("(#.*\n)*", text)[0].splitlines()) <= 3
    assert algebra(text).endswith((".", ".)"))
    code = [line for line in text.splitlines() if line and not line.startswith(("#", "import"))]
    assert len(code) <= 30
    assert "minilora" not in text


def test_what_is_recorded_was_printed_with_the_release_that_the_finding_is_seen_in():
    assert RECORDED.keys() <= {*IDS}
    for id, recorded in RECORDED.items():
        assert recorded.shows
        name = LIBRARIES[FINDINGS[id].library].distribution
        assert recorded.releases.get(name, FINDINGS[id].seen) == FINDINGS[id].seen
    assert releases("no-such-thing", "import torch_") == {}


def test_an_issue_says_all_that_a_maintainer_needs():
    text = issue(FINDINGS["peft.safe-merge"], LIBRARIES["peft"])
    for part in ("```python", "got      1.0", "**Right.**", "**Cause.**", "**Proposed fix.**"):
        assert text.count(part) == 1
    assert "peft/tuners/lora/layer.py#L" in text
    assert "open" in text
    read = issue(FINDINGS["vllm.prefix"], LIBRARIES["vllm"])
    assert "Read, not run. Source: vLLM" in read
    assert "```python" not in read


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_issues_stand_alone(library):
    text = issues(library)
    assert [*re.findall("^## (.*)$", text, re.M)] == [each.title for each in library.findings]
    assert not re.search(r"\]\((?!https?:)", re.sub("```.*?```", "", text, flags=re.S))
    assert r"\d " not in text
