"""Options of `train` from a file."""

import json

import pytest

from minilora.cli.main import main

TOML = """
max-steps = 2
rank = 4
learning-rate = 0.01
target-modules = ["q", "v"]
variant = "rslora"
skip-invalid = true
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(TOML)
    return tmp_path


def settings(folder):
    return json.loads((folder / "run.json").read_text())["settings"]


def test_the_file_has_options_and_the_command_line_counts_more(folder, capsys):
    assert main(["train", "--config", "a.toml", "--output", "one", "--rank", "3"]) == 0
    found = settings(folder / "one")
    assert (found["rank"], found["alpha"], found["max_steps"]) == (3, 6, 2)
    assert (found["variant"], found["learning_rate"]) == ("rslora", 0.01)
    assert (found["target_modules"], found["skip_invalid"]) == (["q", "v"], True)
    assert main(["train", "--output", "plain", "--max-steps", "1"]) == 0
    assert settings(folder / "plain")["rank"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--layers", "last:1", "--prefix-cache", "memory"], ["--full"], ["--adapter", "first"]],
)
def test_a_run_is_repeated_by_its_own_file(options, folder, capsys):
    if "first" in options:
        assert main(["train", "--config", "a.toml", "--output", "first"]) == 0
    if {"first", "--full"} & {*options}:
        (folder / "a.toml").write_text("max-steps = 2")
    assert main(["train", "--config", "a.toml", "--output", "one", *options]) == 0
    assert main(["train", "--config", "one/run.json", "--output", "two"]) == 0
    (file,) = {"adapter_model.safetensors", "model.safetensors"} & {
        path.name for path in (folder / "one").iterdir()
    }
    one, two = ((folder / name / file).read_bytes() for name in ("one", "two"))
    assert one == two
    assert settings(folder / "one") == settings(folder / "two")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-stepz = 2", "did you mean max_steps?"),
        ("output = 'x'", "found output"),
        ("rank = 'four'", "rank: found 'four', expected a whole number"),
        ("rank = 4.5", "expected a whole number"),
        ("rank = true", "expected a whole number"),
        ("skip-invalid = 'yes'", "expected true or false"),
        ("variant = 3", "expected a text"),
        ("rank = ", "expected TOML"),
        (None, "No such file"),
    ],
)
def test_what_the_file_says_wrongly_is_told(folder, capsys, text, words):
    if text is None:
        (folder / "a.toml").unlink()
    else:
        (folder / "a.toml").write_text(text)
    assert main(["train", "--config", "a.toml", "--output", "one"]) == 2
    assert words in capsys.readouterr().err
