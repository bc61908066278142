"""What a target's own process costs, recorded."""

import json
import sys

import pytest

from minilora.studies import apart


@pytest.mark.skipif(not hasattr(apart.os, "wait4"), reason="no processor time of another process")
def test_the_processor_time_is_that_of_a_command_that_holds():
    assert apart.processor_seconds([sys.executable, "-c", "sum(range(10**6))"]) > 0
    with pytest.raises(RuntimeError, match="ended with exit status 3, expected 0 or 1"):
        apart.processor_seconds([sys.executable, "-c", "raise SystemExit(3)"])


def test_both_ways_are_measured_by_turns_and_recorded(monkeypatch, tmp_path, capsys):
    asked = []

    def seconds(command):
        asked.append(command[3:])
        return 2.0 if "--in-process" in command else 2.2 + len(asked) / 50

    monkeypatch.setattr(apart, "processor_seconds", seconds)
    file = tmp_path / "apart.json"
    apart.main(["minilora", "peft", "--profile", "ci", "--pairs", "3", "--output", str(file)])
    assert asked[0] == ["verify", "--profile", "ci", "--jobs", "1"]
    assert asked[-1] == ["verify", "peft", "--profile", "ci", "--in-process"]
    first, second = json.loads(file.read_text())["measured"]
    assert (first["target"], second["target"]) == ("minilora", "peft")
    assert first["pairs"] == [[2.22, 2.0], [2.26, 2.0], [2.3, 2.0]]
    assert "| minilora | ci | 3 | 2.3 s | 2.0 s | 13 % (11 to 15) |" in capsys.readouterr().out
