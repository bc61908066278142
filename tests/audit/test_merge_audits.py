"""``minilora merge`` audits what it wrote."""

import re

import pytest

import minilora.spec.lora as lora
from minilora.cli.main import main
from minilora.io import reference_models
from minilora.io.errors import FormatError


@pytest.fixture
def merge(tmp_path, capsys):
    """Merges the reference adapter: exit status, standard output."""
    folder = reference_models.folder() / "llama"

    def run():
        words = ["--model", str(folder / "base"), "--adapter", str(folder / "adapter")]
        status = main(["merge", *words, "--output", str(tmp_path / "merged")])
        return status, capsys.readouterr().out

    return run


def test_what_was_merged_is_audited_and_what_rounding_took_is_said(merge):
    status, out = merge()
    assert status == 0
    said = r"every tensor is right; rounding took (\S+)% of a change.s norm on average, (\S+)% at"
    mean, most = map(float, re.search(said, out).groups())
    assert 0 <= mean <= most < 1e-3
    assert out.endswith(" merged\n")


def test_a_wrong_merge_is_seen_before_it_is_said_to_be_done(merge, monkeypatch):
    right = lora.merge_weight
    monkeypatch.setattr(lora, "merge_weight", lambda W, A, B, s: right(W, A, B, 2 * s))
    monkeypatch.setattr("minilora.audit.low_rank.merge_weight", right)
    status, out = merge()
    assert status == 1
    assert "WRONG: of 21 tensors 14 deviate" in out
    assert not out.endswith("merged\n")


def test_what_cannot_be_audited_is_said(merge, monkeypatch):
    def refuse(*_, **__):
        raise FormatError("m", "file", "a GGUF file", "safetensors", "convert it")

    monkeypatch.setattr("minilora.audit.merged", refuse)
    status, out = merge()
    assert status == 0
    assert "merged: not audited: m: file: found a GGUF file" in out
