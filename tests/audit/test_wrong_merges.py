"""The ten wrong merges of the page, and the right one."""

import sys
from pathlib import Path

import pytest

from minilora.audit import merged

DOCS = Path(__file__).parents[2] / "docs"
sys.path.append(str(DOCS))
import wrong_merges  # noqa: E402 - it lies beside the page that shows it

SAID = {
    "base_again": {"not-applied"},
    "rslora_ignored": {"rslora-ignored"},
    "alpha_forgotten": {"no-scale"},
    "merged_twice": {"twice"},
    "layer_left_out": {"not-applied"},
    "head_lost": {"not-applied"},
    "other_checkpoint": {"other-change"},
    "dora_as_lora": {"norm-not-applied"},
    "other_base": {"changed"},
    "rounded_away": {"rounded-away"},
}
"""What each is to be called: its mistake, else the verdict."""


def audited(files, folder):
    wrong_merges.write(files, folder)
    return merged(folder / "base", folder / "adapter", folder / "merged")


def test_the_right_one_is_right(tmp_path):
    report = audited(wrong_merges.reference(), tmp_path)
    assert {entry.verdict for entry in report.entries} == {"exact", "unchanged"}
    assert report.exit_status == 0


def marked(wrong):
    """Where no mistake explains it, all are tried."""
    marks = [pytest.mark.slow] * (wrong is wrong_merges.other_checkpoint)
    return pytest.param(wrong, marks=marks, id=wrong.__name__)


@pytest.mark.parametrize("wrong", [*map(marked, wrong_merges.WRONG)])
def test_each_is_found_and_named(wrong, tmp_path):
    files = wrong_merges.reference()
    wrong(files)
    report = audited(files, tmp_path)
    worst = [entry for entry in report.entries if entry.severity not in ("ok", "note")]
    assert {entry.mistake or entry.verdict for entry in worst} == SAID[wrong.__name__]
    assert report.exit_status == (0 if wrong is wrong_merges.rounded_away else 1)


def test_there_are_ten():
    assert len(wrong_merges.WRONG) == len(SAID) == 10
