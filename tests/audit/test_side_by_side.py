"""The recorded comparison with deltalint: what its tables say, and that they can say otherwise."""

import copy
import json
from pathlib import Path

import pytest
from merge_catalogue import WRONGS, side_by_side, speed, trial

RECORD = Path(__file__).parents[2] / "docs" / "examples" / "audits.json"


@pytest.fixture
def data():
    return json.loads(RECORD.read_text())


def numbers(table):
    """The last row's numbers."""
    return [int(cell) for cell in table.splitlines()[-1].split("|")[2:-1]]


def test_every_mistake_was_tried_and_what_is_decidable_was_found(data):
    assert {row["wrong"] for row in data["wrong"]} <= WRONGS.keys()
    assert len({row["wrong"] for row in data["wrong"]}) >= 60
    merges, found, named, *_ = numbers(side_by_side.wrong_table(data))
    assert found == merges
    assert named >= 0.9 * merges
    assert not any(row["missed"] or row["accused"] for row in data["wrong"])


def test_no_right_merge_was_accused(data):
    merges, accused, undecided, *_ = numbers(side_by_side.right_table(data))
    assert merges >= 100
    assert (accused, undecided) == (0, 0)


def test_a_merge_that_is_missed_and_one_that_is_accused_are_counted(data):
    other = copy.deepcopy(data)
    other["wrong"][0] |= {"decidable": True, "missed": 1}
    other["right"][0]["minilora"] = "wrong"
    assert numbers(side_by_side.wrong_table(other))[1] < numbers(side_by_side.wrong_table(data))[0]
    assert numbers(side_by_side.right_table(other))[1] == 1


def test_on_trained_models_all_that_is_decidable_is_found_and_nothing_else():
    rows = json.loads(RECORD.with_name("audits-real.json").read_text())
    for row in rows.values():
        assert (row["found"], row["good"], row["alarms"]) == (row["decidable"], row["trials"], 0)
        assert row["named"] >= 0.9 * row["decidable"]
    (row,) = list(rows.values())[:1]
    table = trial.counts_table({"one": row | {"good": row["good"] - 1}})
    assert table.splitlines()[-1].endswith("| 1 |")


def test_the_speed_is_told_as_a_share_of_reading():
    seconds = {"read cold": 4.0, "audit cold": 5.0, "read warm": 0.5, "audit warm": 2.0}
    row = {"dtype": "float32", "merge": "right", "bytes": 2e9, "audit warm cpu": 3.0, **seconds}
    *_, cold, warm, cpu, _ = speed.speed_table({"rows": [row]}).splitlines()[-1].split("|")
    assert (cold.strip(), warm.strip(), cpu.strip()) == ("80%", "25%", "1.50")
