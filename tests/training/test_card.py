"""The model card and the table of a run: what they say is what the run has."""

import csv
from dataclasses import replace

import pytest
from extras import optional
from test_train import QUICK, Stop, fit, run_of

from minilora.cli.main import main
from minilora.io.formats import gguf
from minilora.training.card import COLUMNS, base_name, card, table
from minilora.training.run_folder import CARD, LOG, TABLE, WRITTEN, read_log


@pytest.fixture(scope="module")
def run():
    return run_of(QUICK, examples=8)


@pytest.fixture
def out(run, tmp_path):
    fit(tmp_path / "run", run, val_every=2)
    return tmp_path / "run"


def front_matter(text):
    yaml = optional("yaml")
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


def test_the_front_matter_is_that_of_an_adapter_on_the_hub(out):
    head = front_matter((out / CARD).read_text())
    assert head == {
        "base_model": "reference:llama",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "minilora"],
    }


def test_the_front_matter_holds_any_name(run):
    named = 'a: "b" #\\ c'
    base = replace(run.base)
    vars(base).update(origin=named, digest="")
    assert front_matter(card(replace(run, base=base), [], "x"))["base_model"] == named


def test_the_card_has_the_settings_the_data_and_the_losses(out, run):
    text, last = (out / CARD).read_text(), read_log(out / LOG)[-1]
    for part in (
        f"| {last['step']} | {last['loss']:.4f} | {last['val_loss']:.4f} |",
        f"| SHA-256 | {run.base.digest} |",
        f"| SHA-256 | {run.data.digest} |",
        f"| `learning_rate` | {run.config.learning_rate} |",
        'PeftModel.from_pretrained(model, "run")',
        "minilora generate --adapter run",
    ):
        assert part in text


def test_a_card_without_steps_or_with_many_is_short(run):
    assert "No step was made." in card(run, [], "x")
    lines = [{"step": i, "loss": 1.0 + i, "val_loss": 2.0} for i in range(1, 500)]
    rows = [line for line in card(run, lines, "x").splitlines() if line.endswith("| 2.0000 |")]
    assert len(rows) == 12
    assert rows[0].startswith("| 1 | 2.0")
    assert rows[-1].startswith("| 499 | 500.0")


def test_the_table_has_the_log(out):
    lines = read_log(out / LOG)
    rows = [*csv.DictReader((out / TABLE).read_text().splitlines())]
    assert {*COLUMNS} >= {key for line in lines for key in line}
    assert [tuple(row) for row in rows] == [COLUMNS] * len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert {k: v for k, v in row.items() if v} == {
            k: str(v) for k, v in line.items() if v is not None
        }


def test_a_cell_with_a_comma_is_quoted():
    assert table([{"step": 1, "loss": "1,5"}]).splitlines()[1].startswith('1,,"1,5",')


def test_an_interrupted_run_has_both_and_a_resumed_one_the_same_as_one_at_once(run, out, tmp_path):
    other = tmp_path / "other" / "run"
    fit(other, run, watch=Stop(3), val_every=2)
    assert "in 3 of" in (other / CARD).read_text()
    assert len((other / TABLE).read_text().splitlines()) == 4
    fit(other, run, resume=True, val_every=2)
    assert (other / CARD).read_bytes() == (out / CARD).read_bytes()


def test_a_card_that_somebody_made_his_own_stays(run, out):
    own = (out / CARD).read_text().replace(WRITTEN, "Mine.")
    (out / CARD).write_text(own)
    fit(out, run, overwrite=True)
    assert (out / CARD).read_text() == own
    (out / CARD).write_text(own + WRITTEN + "\n")
    fit(out, run, overwrite=True)
    assert "Mine." not in (out / CARD).read_text()


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"general.source.repo_url": "https://huggingface.co/org/model"}, "org/model"),
        ({"general.repo_url": "https://example.org/x", "general.name": "Small"}, "Small"),
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/base"}, "org/base"),
        ({"general.name": " "}, "file.gguf"),
        ({}, "file.gguf"),
    ],
)
def test_a_gguf_file_is_named_by_what_it_was_made_of(run, metadata, name, monkeypatch, tmp_path):
    monkeypatch.setattr("minilora.io.formats.gguf.read.Contents", lambda path: metadata)
    path = tmp_path / "file.gguf"
    path.write_bytes(b"")
    base = replace(run.base, name=str(path), path=path, format=gguf.FORMAT)
    told = replace(run, base=base)
    assert base_name(told) == name
    vars(base)["digest"] = "0" * 64
    text = card(told, [], "x")
    head = front_matter(text)
    assert head["base_model"] == name
    assert (f"base_model:adapter:{name}" in head["tags"]) == ("/" in name)
    assert "trained on the weights in file.gguf" in text


def test_ctrl_c_while_plotting_says_that_the_run_is_saved(monkeypatch, tmp_path, capsys):
    def interrupted(out):
        raise KeyboardInterrupt

    monkeypatch.setattr("minilora.training.plot.plot", interrupted)
    status = main(["train", "--output", str(tmp_path / "run"), "--max-steps", "2"])
    assert status == 130
    err = capsys.readouterr().err
    assert f"interrupted before loss.svg was drawn; the run is saved in {tmp_path}/run" in err
