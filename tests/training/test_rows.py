"""The kinds of data files, and ShareGPT's conversations."""

import csv
import json

import numpy as np
import pytest
from extras import optional
from test_data import CHARACTERS, CHAT
from test_data import made as made

from minilora.io.errors import FormatError
from minilora.training.data import read

ROWS = [{"text": "ab"}, {"text": 'a, "b"\nc'}, {"text": "é" * 0 + "c"}]
LABELLED = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


def written(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = optional("pyarrow")
        optional("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(a.ids, b.ids) and a.label == b.label for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
@pytest.mark.parametrize(("task", "rows"), [("lm", ROWS), ("classify", LABELLED)])
def test_the_examples_do_not_depend_on_the_kind_of_file(tmp_path, suffix, task, rows):
    lines = read(written(tmp_path / "a.jsonl", rows), task, CHARACTERS, 20)
    other = read(written(tmp_path / f"a{suffix}", rows), task, CHARACTERS, 20)
    assert same(lines.train, other.train)
    assert lines.classes == other.classes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[{},\n {]", "line 2: found no JSON .Expecting property name"),
        ("a.json", b'{"text": "a"}', "found a JSON dict, expected a JSON array"),
        ("a.json", b'[{"text": "a"}, 3]', "entry 2: found a JSON int"),
        ("a.csv", b"text\na\nb,c\n", "line 3: found 2 columns, expected 1"),
        ("a.csv", b"text,label\na\n", "line 2: found 1 column, expected 2"),
        ("a.csv", b'text\na\n"b\n', "line 2: found unexpected end of data"),
        ("a.csv", b"text\na\n\xff\n", "line 3: found .*invalid start byte"),
    ],
)
def test_what_is_wrong_is_told_by_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=words):
        read(tmp_path / name, "lm", CHARACTERS, 9)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    optional("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(FormatError, match="expected a parquet file"):
        read(tmp_path / "a.parquet", "lm", CHARACTERS, 9)


def test_a_folder_of_texts_is_all_of_them_in_the_order_of_their_names(tmp_path):
    for name, text in (("b", "cd"), ("a", "ab")):
        (tmp_path / f"{name}.txt").write_text(text)
    found = read(tmp_path, "lm", CHARACTERS, 9).train
    alone = [read(tmp_path / f"{name}.txt", "lm", CHARACTERS, 9).train[0] for name in "ab"]
    assert same(found, alone)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(FormatError, match="expected one file for train"):
        read(tmp_path, "lm", CHARACTERS, 9)


SHARED = [{"from": "system", "value": CHAT[0]["content"]}] if CHAT[0]["role"] == "system" else []
SHARED += [
    {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
    for m in CHAT[len(SHARED) :]
]


def test_sharegpts_conversations_are_messages(made):
    one, other = made({"messages": CHAT}, "chat"), made({"conversations": SHARED}, "chat")
    assert same([one], [other])


def test_parts_of_text_are_one_text(made):
    split = [
        m | {"content": [{"type": "text", "text": c} for c in m["content"]] or m["content"]}
        for m in CHAT
    ]
    assert same([made({"messages": CHAT}, "chat")], [made({"messages": split}, "chat")])


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], r"conversations: \[\]"),
        (["a"], "turn 1: 'a'"),
        ([{"from": "nobody", "value": "a"}], "in turn 1 from: 'nobody'"),
        ([{"from": "human", "value": "a"}], "at least one of the assistant"),
        ([{"from": "gpt", "value": [{"type": "image"}]}], "in message 1 content"),
    ],
)
def test_a_conversation_that_is_none_is_refused(made, turns, words):
    with pytest.raises(FormatError, match=words):
        made({"conversations": turns}, "chat")
