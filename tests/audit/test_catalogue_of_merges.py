"""Merges that went wrong in each way of the catalogue: found where it can be decided, and named."""

import pytest
from extras import needs
from marks import others_slow
from merge_catalogue import WRONGS, trial, zoo

UNNAMED = {"dora norm of the columns"}
"""Wrong merges that the audit finds without knowing their cause."""


def check(world, mistakes, folder):
    """Everything that is decidable is found, nothing else accused, and the mistake is named."""
    trials = list(trial.Bench(zoo.world(world), folder).trials(mistakes))
    assert [str(t) for t in trials if not t.good] == []
    nameless = [t for t in trials if t.decidable and not t.named and t.wrong not in UNNAMED]
    assert [str(t) for t in nameless] == []


def test_there_are_sixty_ways_to_go_wrong_and_nine_of_ten_are_named():
    assert len(WRONGS) >= 60
    assert WRONGS.keys() >= UNNAMED
    assert len(UNNAMED) <= len(WRONGS) / 10


@pytest.mark.slow
@pytest.mark.parametrize("world", others_slow(list(zoo.SMALL), "llama-one-layer", "qwen2-bias"))
def test_each_mistake_is_found_in_a_drawn_model(world, tmp_path):
    check(world, trial.chosen(world, 1), tmp_path)


@pytest.mark.parametrize("world", others_slow(list(zoo.SMALL), "llama-one-layer"))
def test_a_right_merge_of_a_drawn_model_is_right(world, tmp_path):
    assert trial.right_merge(trial.Bench(zoo.world(world), tmp_path)) == ""


@needs("peft", "transformers")
@pytest.mark.slow
@pytest.mark.parametrize("world", zoo.PEFT_MADE)
def test_a_variant_merged_as_another_is_found(world, tmp_path):
    own = [
        name
        for name, wrong in WRONGS.items()
        if wrong.make and wrong.make.__module__.endswith("variants")
    ]
    check(world, own, tmp_path)
