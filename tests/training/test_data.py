"""Files to examples and examples to batches: what counts, what is refused, what an epoch has."""

import hashlib
import importlib.util
import itertools
import json
import re
import subprocess

import numpy as np
import pytest
from extras import needs
from hypothesis import given
from hypothesis import strategies as st

from minilora.io import reference_models
from minilora.io.errors import FormatError
from minilora.io.formats.tokenizers import WordTokenizer, read_tokenizer
from minilora.io.synthetic_data import END, PAD, SPECIAL, TASKS, task
from minilora.spec.models import shifted_labels
from minilora.spec.ops import IGNORED
from minilora.training import data
from minilora.training.batching import batch, order, shown
from minilora.training.data import read
from minilora.training.example import Example

needs_text = needs("jinja2", "tokenizers")
needs_transformers = needs("jinja2", "tokenizers", "transformers")
if importlib.util.find_spec("tokenizers"):
    import tokenizer_folders as folders

WORDS = WordTokenizer.of(task("running-sum"))
TYPED = WordTokenizer.of(task("more-a"))


class Characters(WordTokenizer):
    """A token each for bytes, but two line feeds in a row are one; chats are rendered here."""

    def __init__(self):
        super().__init__([*SPECIAL, *map(chr, range(128)), "\n\n"], True)

    def encode(self, text, special=True):
        parts = re.findall("|".join(map(re.escape, SPECIAL)) + "|\n\n|.|\n", text)
        if strange := [part for part in parts if part not in self._ids]:
            raise ValueError(f"the character {strange[0]!r}")
        ids = [self._ids[part] for part in parts]
        return [*self.prefix_ids, *ids] if special else ids

    def chat(self, messages, generate=False, today=None):
        text = "".join(f"[{m['role']}]{m['content']}<end>\n" for m in messages)
        return f"<start>{text}" + ("[assistant]" if generate else "")

    render = None
    chat_template = "in Python"


CHARACTERS = Characters()


def write(path, *lines):
    path.write_bytes(
        b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
    )
    return path


@pytest.fixture
def made(tmp_path):
    """The one example that a line makes."""

    def make(line, task, tokenizer=CHARACTERS, max_length=200, **settings):
        (example,) = read(
            write(tmp_path / "a.jsonl", line), task, tokenizer, max_length, **settings
        ).train
        return example

    return make


def text_of(ids, tokenizer=CHARACTERS):
    return "".join(tokenizer.token_text(int(i)) for i in ids)


def marked(example):
    """The text, with what is to be predicted in braces."""
    groups = itertools.groupby(zip(example.loss_mask, example.ids, strict=True), lambda x: x[0])
    texts = ((counted, text_of(i for _, i in group)) for counted, group in groups)
    return "".join(f"{{{text}}}" if counted else text for counted, text in texts)


# Shapes

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "b."},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d."},
]
BEGINS = "<start>[user]"


@pytest.mark.parametrize(
    ("task", "line", "wanted"),
    [
        ("lm", {"text": "to go on"}, "<start>{to go on<end>}"),
        ("lm", {"text": "<start>spelled<end>"}, "<start>{spelled<end>}"),
        ("lm", {"prompt": "a?", "completion": " b"}, "<start>a?{ b<end>}"),
        ("lm", {"prompt": "<start>a?", "completion": " b<end>"}, "<start>a?{ b<end>}"),
        ("lm", {"prompt": "a\n", "completion": "\nb"}, "<start>a\n{\nb<end>}"),
        (
            "lm",
            {"instruction": "i", "input": "", "output": "o"},
            "<start>### Instruction:\ni\n\n### Response:\n{o<end>}",
        ),
        (
            "lm",
            {"instruction": "i", "input": "{}", "output": "o", "id": 7},
            "<start>### Instruction:\ni\n\n### Input:\n{}\n\n### Response:\n{o<end>}",
        ),
        (
            "chat",
            {"messages": CHAT},
            "<start>[system]s<end>\n[user]a?<end>\n[assistant]{b.<end>}\n"
            "[user]c?<end>\n[assistant]{d.<end>}\n",
        ),
        (
            "chat",
            {"messages": CHAT[:4]},
            "<start>[system]s<end>\n[user]a?<end>\n[assistant]{b.<end>}\n[user]c?<end>\n",
        ),
        ("chat", {"prompt": "a", "completion": "b"}, f"{BEGINS}a<end>\n[assistant]{{b<end>}}\n"),
        (
            "chat",
            {"instruction": "i", "input": "x", "output": "o"},
            f"{BEGINS}i\n\nx<end>\n[assistant]{{o<end>}}\n",
        ),
        (
            "summarize",
            {"document": "d{}", "summary": "s"},
            f"{BEGINS}Summarize this text.\n\nd{{}}<end>\n[assistant]{{s<end>}}\n",
        ),
    ],
)
def test_what_is_answered_counts_with_its_end_and_what_is_asked_does_not(task, line, wanted, made):
    assert marked(made(line, task)) == wanted


def test_the_date_that_a_template_sees_is_recorded(tmp_path):
    class Dated(Characters):
        chat_template = "{{ strftime_now('%d') }} as in Python"

        def chat(self, messages, generate=False, today=None):
            return f"<start>{today}{super().chat(messages, generate)}"

    path = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    one, other = (read(path, "chat", Dated(), 200, date=f"2025-03-0{day}") for day in (1, 2))
    assert (one.date, other.date) == ("2025-03-01", "2025-03-02")
    assert one.digest == other.digest
    assert (one.train[0].ids != other.train[0].ids).any()
    today = read(path, "chat", Dated(), 200)
    again = read(path, "chat", Dated(), 200, date=today.date)
    assert (today.train[0].ids == again.train[0].ids).all()
    for kind, tokenizer in (("chat", CHARACTERS), ("lm", Dated())):
        assert read(path, kind, tokenizer, 200, date="2025-03-01").date is None
    with pytest.raises(ValueError, match="date '1 March': expected a date, as YYYY-MM-DD"):
        read(path, "chat", Dated(), 200, date="1 March")


@pytest.mark.parametrize("task", ["lm", "chat"])
def test_what_is_asked_counts_too_where_that_is_wanted(task, made):
    line = {"prompt": "a?", "completion": " b"}
    masked, whole = made(line, task), made(line, task, train_on_prompt=True)
    assert (masked.ids == whole.ids).all()
    assert whole.loss_mask.tolist() == [False] + [True] * (len(whole.ids) - 1)
    assert masked.loss_mask.sum() == len(" b<") < whole.loss_mask.sum()


def test_a_tokenizers_own_tail_ends_a_text_once(made):
    tailed = Characters()
    tailed.suffix_ids = (3, 4)
    for text in ("a", "a\x00\x01"):
        assert made({"text": text}, "lm", tailed).ids.tolist() == [1, 3 + ord("a"), 3, 4]
    assert made({"text": "a\x01"}, "lm", tailed).ids.tolist()[-3:] == [4, 3, 4]
    no_end = Characters()
    no_end.eos = None
    assert marked(made({"text": "ab"}, "lm", no_end)) == "<start>{ab}"


def test_a_summary_is_asked_for_in_plain_text_without_a_template(made):
    class Plain(Characters):
        chat_template = None

    line = {"text": "d", "summary": " s"}
    assert marked(made(line, "summarize", Plain())) == "<start>d\n\nSummary:{ s<end>}"


def test_tokens_need_no_tokenizer(made):
    e = made({"ids": [5, 6, 7], "labels": [5, IGNORED, 7]}, "lm", None)
    assert (e.ids.tolist(), e.loss_mask.tolist()) == ([5, 6, 7], [False, False, True])
    assert made({"ids": [5, 6, 7]}, "chat", None).loss_mask.tolist() == [False, True, True]
    with pytest.raises(ValueError, match="no tokenizer"):
        made({"text": "a"}, "lm", None)


def test_text_that_is_asked_and_answered_is_found_again(made):
    asked, answered = made({"messages": CHAT}, "chat").prompt_and_answer
    assert text_of(asked).endswith("[user]c?<end>\n[assistant]")
    assert text_of(answered) == "d.<end>"
    asked, answered = made({"ids": [3, 4]}, "lm").prompt_and_answer
    assert (asked.tolist(), answered.tolist()) == ([3], [4])
    nothing = Example(np.arange(3), np.zeros(3, bool), 1)
    assert [part.tolist() for part in nothing.prompt_and_answer] == [[0, 1, 2], []]


@needs_transformers
@pytest.mark.parametrize("n", range(2, 6))
def test_the_assistants_tokens_are_those_that_transformers_marks(tmp_path, n):
    from transformers import AutoTokenizer

    folder = folders.write(tmp_path, "byte level")
    other = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT[: n + 1], return_assistant_tokens_mask=True, return_dict=True
    )
    path = write(tmp_path / "a.jsonl", {"messages": CHAT[: n + 1]})
    (e,) = read(path, "chat", read_tokenizer(folder), 200).train
    assert e.ids.tolist() == other["input_ids"]
    assert e.loss_mask.tolist() == [bool(x) for x in other["assistant_masks"]]
    assert e.loss_mask.any()
    path = write(tmp_path / "a.jsonl", {"messages": CHAT[: n + 1]})
    (whole,) = read(path, "chat", read_tokenizer(folder), 200, train_on_prompt=True).train
    assert whole.loss_mask.tolist() != e.loss_mask.tolist()


@needs_text
def test_a_template_that_writes_the_beginning_is_the_only_one_to_write_it(tmp_path):
    tokenizer = read_tokenizer(folders.write(tmp_path, "sentence piece"))
    path = write(tmp_path / "a.jsonl", {"messages": CHAT[1:]})
    (e,) = read(path, "chat", tokenizer, 200).train
    assert (e.ids == tokenizer.bos).sum() == 1
    assert e.ids[0] == tokenizer.bos
    assert e.ids[e.loss_mask].tolist().count(tokenizer.eos) == 2
    (plain,) = read(write(tmp_path / "b.jsonl", {"text": "a"}), "lm", tokenizer, 200).train
    assert plain.ids[[0, -1]].tolist() == [tokenizer.bos, tokenizer.eos]


def test_a_template_that_writes_an_earlier_turn_anew_is_refused(made):
    class Forgetful(Characters):
        def chat(self, messages, generate=False, today=None):
            last = len(messages) - 1
            messages = [
                m | {"content": f"({m['content']})"} if i == last and not generate else m
                for i, m in enumerate(messages)
            ]
            return super().chat(messages, generate)

    match = "line 1: found a chat template that "
    with pytest.raises(FormatError, match=match):
        made({"messages": CHAT}, "chat", Forgetful())


# Length


@pytest.mark.slow
@given(
    text=st.text("abc", min_size=1, max_size=30),
    length=st.integers(2, 9),
    headless=st.booleans(),
    spelled=st.booleans(),
)
def test_pieces_of_a_text_predict_each_of_its_tokens_once(
    tmp_path_factory, text, length, headless, spelled
):
    tokenizer = Characters()
    if headless:
        tokenizer.prefix_ids = ()
    elif length < 3:
        return
    folder = tmp_path_factory.getbasetemp()
    spelt = "<start>" * (spelled and not headless) + text
    got = read(write(folder / "a.jsonl", {"text": spelt}), "lm", tokenizer, length)
    whole = [*tokenizer.encode(text, False), END]
    predicted = [int(i) for e in got.train for i in e.ids[e.loss_mask]]
    assert predicted == (whole[1:] if headless else whole)
    assert all(len(e.ids) <= length and e.loss_mask.any() for e in got.train)
    for (
        e
    ) in got.train:  # what stands before a token in its piece is what stands before it in the text
        first = int(np.flatnonzero(e.loss_mask)[0])
        before = e.ids[len(tokenizer.prefix_ids) : first]
        assert len(before) == (headless or e is not got.train[0])
    assert got.truncated == 0
    (folder / "a.txt").write_text(spelt)
    plain = read(folder / "a.txt", "lm", tokenizer, length)
    assert [e.ids.tolist() for e in plain.train] == [e.ids.tolist() for e in got.train]


def test_an_answer_that_is_too_long_loses_its_end_and_is_counted(made, tmp_path):
    line = {"prompt": "ab", "completion": "cdef"}
    assert marked(made(line, "lm", max_length=8)) == "<start>ab{cdef<end>}"
    assert marked(made(line, "lm", max_length=5)) == "<start>ab{cd}"
    path = write(tmp_path / "b.jsonl", line, line)
    assert [read(path, "lm", CHARACTERS, n).truncated for n in (7, 8)] == [2, 0]
    with pytest.raises(FormatError, match=r"found 3 tokens before .*max_length, 3"):
        made(line, "lm", max_length=3)


@pytest.mark.parametrize("chat", [True, False])
def test_a_document_is_cut_so_that_its_summary_is_whole(chat, made):
    tokenizer = Characters()
    tokenizer.chat_template = "in Python" if chat else None
    line = {"document": "d" * 50, "summary": "sum"}
    whole = made(line, "summarize", tokenizer)
    for length in range(len(whole.ids) - 49, len(whole.ids)):
        e = made(line, "summarize", tokenizer, length)
        assert len(e.ids) == length
        assert (e.ids[e.loss_mask] == whole.ids[whole.loss_mask]).all()
    with pytest.raises(FormatError, match="a summary that leaves no room for its text"):
        made(line, "summarize", tokenizer, len(whole.ids) - 50)


@pytest.mark.slow
@given(st.text("ab\n", min_size=1, max_size=300), st.data())
def test_no_more_of_a_document_is_cut_than_must_be(tmp_path_factory, document, draws):
    """Two line feeds are one token, so that tokens and characters are not proportional."""
    document = f"{document}b"
    path = write(tmp_path_factory.getbasetemp() / "a.jsonl", {"document": document, "summary": "s"})
    (whole,) = read(path, "summarize", CHARACTERS, 1000).train
    own = len(CHARACTERS.encode(document, special=False))
    length = draws.draw(st.integers(len(whole.ids) - own + 1, len(whole.ids)))
    (e,) = read(path, "summarize", CHARACTERS, length).train
    assert len(e.ids) in (length - 1, length)  # a line feed's half may be what would be too much
    kept = text_of(e.ids).removeprefix(f"{BEGINS}Summarize this text.\n\n").partition("<end>")[0]
    assert document.startswith(kept)


@needs("tokenizers")
@pytest.mark.parametrize("length", range(5, 15))
def test_texts_of_a_class_are_cut_as_the_library_cuts_them(length, tmp_path):
    backend = folders.tokenizers.Tokenizer.from_str(json.dumps(TYPED.json()))
    backend.enable_truncation(length)
    a, b = " ".join("a" * 7), " ".join("b" * 3)
    for pair in ((a, b), (b, a), (a, a), (b, b), (a,)):
        line = dict(zip(("text", "text_pair"), pair, strict=False)) | {"label": 0}
        path = write(tmp_path / "a.jsonl", line, {"text": "c", "label": 1})
        got = read(path, "classify", TYPED, length)
        wanted = backend.encode(*pair)
        assert got.train[0].ids.tolist() == wanted.ids
        assert (got.train[0].types is None) == (len(pair) == 1)
        if len(pair) == 2:
            assert got.train[0].types.tolist() == wanted.type_ids
        assert got.truncated == bool(wanted.overflowing)


def test_a_pair_without_room_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a", "text_pair": "b", "label": 0})
    with pytest.raises(ValueError, match="max_length 4: expected at least 5"):
        read(path, "classify", TYPED, 4)


def test_a_length_without_room_is_refused(made):
    for settings, match in (
        ({"max_length": 1}, "max_length 1: expected at least 2"),
        ({"val_fraction": 1.0}, r"val_fraction 1\.0:"),
        ({"val_fraction": -0.1}, r"val_fraction -0\.1:"),
    ):
        with pytest.raises(ValueError, match=match):
            made({"text": "ab"}, "lm", **settings)
    with pytest.raises(ValueError, match="max_length 2: expected at least 3"):
        made({"text": "ab"}, "lm", max_length=2)
    with pytest.raises(ValueError, match="task 'translate': expected one of lm, chat, classify"):
        made({"text": "ab"}, "translate")


# Bad lines

GOOD = {
    "lm": {"text": "good"},
    "chat": {"messages": CHAT},
    "classify": {"text": "good", "label": 1},
    "summarize": {"document": "good", "summary": "g"},
}
BAD = [
    ("lm", b"", "an empty line"),
    ("lm", b"{", "Expecting property name"),
    ("lm", b'{"text": "a"', "Expecting ',' delimiter"),
    ("lm", b'{"text": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    ("lm", b'{"text": "\\ud800"}', "text with half of a surrogate pair"),
    ("lm", b'{"text": "a", "text": "b"}', "text given twice"),
    ("lm", b'{"text": "a", "x": NaN}', "the number NaN"),
    ("lm", b"[" * 100_000, "brackets nested too deep"),
    ("lm", b"[1]", "a JSON list"),
    ("lm", b"null", "a JSON NoneType"),
    ("lm", {}, "no keys"),
    ("lm", {"label": 1, "Text": "a"}, "the keys Text, label"),
    ("lm", {"messages": CHAT}, "the keys messages"),
    ("lm", {"text": "a", "ids": [1]}, "the keys ids, text"),
    ("lm", {"text": 3}, "text: 3"),
    ("lm", {"text": None}, "text: None"),
    ("lm", {"text": " \n"}, "an empty text"),
    ("lm", {"text": "é"}, "'é'"),
    ("lm", {"prompt": "", "completion": "a"}, "an empty prompt"),
    ("lm", {"prompt": "a", "completion": ""}, "an empty completion"),
    ("lm", {"prompt": "a" * 99, "completion": "a"}, "100 tokens before"),
    ("lm", {"instruction": "a", "input": 3, "output": "b"}, "input: 3"),
    ("lm", {"ids": []}, r"ids: \[\]"),
    ("lm", {"ids": [1.0, 2]}, r"ids: \[1\.0, 2\]"),
    ("lm", {"ids": [True, 2]}, r"ids: \[True, 2\]"),
    ("lm", {"ids": [1, 2**40]}, "ids: .*1099511627776"),
    ("lm", {"ids": [1, 132]}, "ids from 1 to 132"),
    ("lm", {"ids": [-1, 2]}, "ids from -1 to 2"),
    ("lm", {"ids": [1]}, "1 tokens, none"),
    ("lm", {"ids": [1, 2], "labels": [1]}, "1 labels of 2 ids"),
    ("lm", {"ids": [1, 2, 3], "labels": [2, 3, -100]}, r"labels\[0\]: 2"),
    ("lm", {"ids": [1, 2], "labels": [1, -100]}, "2 tokens, none"),
    ("chat", {"messages": []}, r"messages: \[\]"),
    ("chat", {"messages": ["a"]}, "message 1: 'a'"),
    ("chat", {"messages": [{"role": "user"}]}, "message 1: "),
    ("chat", {"messages": [CHAT[0], {"role": 1, "content": ""}]}, "in message 2 role: 1"),
    ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "in message 1 an empty content"),
    ("chat", {"messages": [{"role": "user", "content": None}]}, "in message 1 content: None"),
    ("chat", {"messages": CHAT[:2]}, "messages of system, user"),
    ("chat", {"text": "a"}, "the keys text"),
    ("classify", {"text": "a"}, "the keys text"),
    ("classify", {"text": "a", "label": None}, "label: None"),
    ("classify", {"text": "a", "label": 1.0}, r"label: 1\.0"),
    ("classify", {"text": "a", "label": True}, "label: True"),
    ("classify", {"text": "a", "label": " "}, "label: ' '"),
    ("classify", {"text": "a", "label": "1"}, "label '1'"),
    ("classify", {"ids": [1], "types": [0, 0], "label": 1}, "2 types of 1 ids"),
    ("summarize", {"document": "a", "text": "a", "summary": "b"}, "the keys document, summary"),
    ("summarize", {"document": "a", "summary": "b" * 99}, "a summary that leaves no room"),
]


@pytest.mark.parametrize(("task", "line", "match"), BAD, ids=lambda x: str(x)[:30])
def test_a_bad_line_is_refused_by_its_number_and_can_be_skipped(task, line, match, tmp_path):
    good = GOOD[task]
    other = good | {"label": 0} if task == "classify" else good
    length = 100 if task in ("chat", "summarize") else 60
    path = write(tmp_path / "a.jsonl", good, other, line, good)
    with pytest.raises(
        FormatError, match=f"^{re.escape(str(path))}: line 3: found .*--skip-invalid$"
    ) as e:
        read(path, task, CHARACTERS, length)
    assert re.search(match, str(e.value.args[2]))
    got = read(path, task, CHARACTERS, length, skip_invalid=True)
    assert [(each.path, each.line) for each in got.skipped] == [(str(path), 3)]
    assert len(got.train) == 3
    without = read(write(path, good, other, good), task, CHARACTERS, length)
    assert [e.ids.tolist() for e in without.train] == [e.ids.tolist() for e in got.train]
    assert without.skipped == ()
    with pytest.raises(FormatError, match="file: found no example, 1 lines "):
        read(
            write(path, line if line and task != "classify" else b"{"),
            task,
            CHARACTERS,
            length,
            skip_invalid=True,
        )


def test_a_mark_at_the_start_and_windows_line_ends_are_no_fault(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r', b'{"text": "b"}')
    assert [marked(e) for e in read(path, "lm", CHARACTERS, 9).train] == [
        "<start>{a<end>}",
        "<start>{b<end>}",
    ]
    path.write_bytes(path.read_bytes().replace(b'"a"', '"\u2028a\u0085"'.encode()))
    with pytest.raises(FormatError, match=r"line 1: "):  # these end no line
        read(path, "lm", CHARACTERS, 9)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b"", "file: found no example"),
        ("a.csv", b"text", "file: found no example"),
        ("a.tsv", b"text", r"'\.tsv', expected \.jsonl or \.json or \.csv or .* or \.txt"),
        ("a.txt", b"", "file: found no text"),
        ("a.txt", b"one\ntwo\n\xff", "line 3: found .*invalid start byte, expected UTF-8"),
        ("a.txt", "é".encode(), "'é'"),
        ("no.jsonl", None, "found nothing"),
    ],
)
def test_a_file_that_holds_no_text_is_refused(tmp_path, name, content, match):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=match):
        read(path, "lm", CHARACTERS, 9)


def test_plain_text_is_only_to_go_on_with(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(FormatError, match=r"'\.txt', expected \.jsonl"):
        read(tmp_path / "a.txt", "chat", CHARACTERS, 9)


# Folders, splits, classes


def folder_of(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, texts in files.items():
        write(folder / f"{name}.jsonl", *({"text": text} for text in texts))
    return folder


def texts(examples):
    return [text_of(e.ids[1:-1]) for e in examples]


def test_a_folder_has_a_file_for_each_split(tmp_path):
    folder = folder_of(tmp_path / "a", train="abc", valid="d", test="ef")
    (folder / "README.md").touch()
    got = read(folder, "lm", CHARACTERS, 9, val_fraction=0.5)
    assert [texts(x) for x in (got.train, got.valid, got.test)] == [[*"abc"], ["d"], [*"ef"]]


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"valid": "a"}, r"found valid\.jsonl, expected one file for train"),
        ({"train": "a", "validation": "b"}, r"found train\.jsonl, validation\.jsonl, .*rename"),
        ({}, r"found no \.jsonl or .* or \.txt, .*put them there, or name a file"),
        ({"train": "a", "valid": ""}, r"valid\.jsonl: file: found no example"),
    ],
)
def test_a_folder_with_other_files_is_refused(tmp_path, files, match):
    with pytest.raises(FormatError, match=match):
        read(folder_of(tmp_path / "a", **files), "lm", CHARACTERS, 9)


def test_two_files_to_train_on_are_refused(tmp_path):
    folder = folder_of(tmp_path / "a", train="a")
    (folder / "train.txt").write_text("a")
    with pytest.raises(FormatError, match=r"found train\.jsonl, train\.txt"):
        read(folder, "lm", CHARACTERS, 9)


@pytest.mark.slow
@given(n=st.integers(2, 40), share=st.floats(0.01, 0.6), seed=st.integers(0, 99))
def test_a_share_of_the_lines_validates_and_every_line_is_on_one_side(
    tmp_path_factory, n, share, seed
):
    lines = [{"text": chr(65 + i) * 12} for i in range(n)]
    path = write(tmp_path_factory.getbasetemp() / "share.jsonl", *lines)
    got = read(path, "lm", CHARACTERS, 9, val_fraction=share, seed=seed)  # each line is two pieces
    train, valid = ({text_of(e.ids[1:])[0] for e in x} for x in (got.train, got.valid))
    assert not train & valid
    assert len(train | valid) == n
    assert len(valid) == max(1, round(share * n))
    assert len(got.train + got.valid) == 2 * n
    again = read(path, "lm", CHARACTERS, 9, val_fraction=share, seed=seed)
    assert [texts(x) for x in (again.train, again.valid)] == [
        texts(x) for x in (got.train, got.valid)
    ]


def test_another_seed_validates_with_other_lines_and_none_is_left_to_train_on(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"text": chr(65 + i)} for i in range(26)))
    sides = {
        tuple(texts(read(path, "lm", CHARACTERS, 9, val_fraction=0.5, seed=s).valid))
        for s in (0, 1)
    }
    assert len(sides) == 2
    assert read(path, "lm", CHARACTERS, 9).valid == []
    with pytest.raises(ValueError, match=r"val_fraction 0\.5: found 1 lines"):
        read(write(path, {"text": "a"}), "lm", CHARACTERS, 9, val_fraction=0.5)


def test_the_digest_is_what_sha256sum_prints(tmp_path):
    folder = folder_of(tmp_path / "a", train="abc", valid="d")
    one = read(folder / "train.jsonl", "lm", CHARACTERS, 9).digest
    assert one == hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
    both = read(folder, "lm", CHARACTERS, 9).digest
    lines = subprocess.run(
        ["sha256sum", "train.jsonl", "valid.jsonl"], cwd=folder, capture_output=True, check=True
    )
    assert both == hashlib.sha256(lines.stdout).hexdigest()
    write(folder / "valid.jsonl", {"text": "e"})
    assert read(folder, "lm", CHARACTERS, 9).digest != both
    assert read(folder / "train.jsonl", "lm", CHARACTERS, 9, skip_invalid=True).digest == one


def labelled(folder, train, test=()):
    folder.mkdir(exist_ok=True)
    for name, labels in (("train", train), ("test", test)):
        if labels:
            write(folder / f"{name}.jsonl", *({"text": "a", "label": x} for x in labels))
    return folder


def test_classes_are_learned_sorted_and_named(tmp_path):
    got = read(labelled(tmp_path / "a", ["pos", "neg", "pos"], ["neg"]), "classify", TYPED, 9)
    assert got.classes == ("neg", "pos")
    assert [e.label for e in got.train + got.test] == [1, 0, 1, 0]
    got = read(labelled(tmp_path / "b", [10, 2, 10]), "classify", TYPED, 9)
    assert (got.classes, [e.label for e in got.train]) == (("2", "10"), [1, 0, 1])
    named = read(labelled(tmp_path / "c", ["p", "n"], ["p"]), "classify", TYPED, 9, classes="np")
    assert (named.classes, [e.label for e in named.test]) == (("n", "p"), [1])
    assert not named.train[0].loss_mask.any()


def test_a_number_is_a_pretrained_models_class_by_its_place(tmp_path):
    folder = labelled(tmp_path / "a", ["p", 0, 1], [1])

    def numbers(classes, **how):
        got = read(folder, "classify", TYPED, 9, classes=classes, **how)
        return [e.label for e in got.train + got.test]

    assert numbers(["n", "p"], numeric_labels=True) == [1, 0, 1, 1]
    with pytest.raises(FormatError, match="line 2: found label 0"):
        numbers(["n", "p"])
    with pytest.raises(FormatError, match="line 2: found label 0"):
        numbers(["1", "p"], numeric_labels=True)  # 1 is a name there, and 0 is none
    far = labelled(tmp_path / "b", ["p", 2], ["n"])
    with pytest.raises(FormatError, match="line 2: found label 2"):
        read(far, "classify", TYPED, 9, classes=["n", "p"], numeric_labels=True)


def test_a_class_that_was_not_trained_on_is_refused_and_one_alone_too(tmp_path):
    folder = labelled(tmp_path / "a", ["x", "y"], ["x", "z"])
    match = r"test\.jsonl: line 2: found label 'z', expected one of the classes trained on, x, y"
    with pytest.raises(FormatError, match=match):
        read(folder, "classify", TYPED, 9)
    got = read(folder, "classify", TYPED, 9, skip_invalid=True)
    assert [len(got.test), len(got.skipped)] == [1, 1]
    for label in (-1, 0, 2):  # no class is called so, and no place says which is meant
        with pytest.raises(FormatError, match=f"line 1: found label {label}"):
            read(labelled(tmp_path / "b", [label]), "classify", TYPED, 9, classes=["n", "p"])
    for trained_on in ([5, 6, 7], ["a", "b", "c"]):
        with pytest.raises(FormatError, match=r"test\.jsonl: line 1: found label 0"):
            read(labelled(tmp_path / "d", trained_on, [0, 1]), "classify", TYPED, 9)
    with pytest.raises(FormatError, match="labels: found one class, 'x'"):
        read(labelled(tmp_path / "c", ["x", "x"]), "classify", TYPED, 9)


@needs_text
def test_a_text_of_a_class_stands_between_the_tokens_that_its_model_expects(tmp_path):
    tokenizer = read_tokenizer(folders.write(tmp_path, "word piece"))
    line = {"text": "A small model", "text_pair": "reads lines", "label": "x"}
    path = write(tmp_path / "a.jsonl", line, {"text": "A small model", "label": "y"})
    pair, one = read(path, "classify", tokenizer, 50).train
    backend = tokenizer.backend
    both = backend.encode("A small model", "reads lines")
    assert (pair.ids.tolist(), pair.types.tolist()) == (both.ids, both.type_ids)
    assert one.ids.tolist() == backend.encode("A small model").ids
    got = batch([pair, one], tokenizer.pad)
    assert got.types[1].tolist() == [0] * got.ids.shape[1]
    assert got.ids[1][~got.mask[1]].tolist() == [tokenizer.pad] * (~got.mask[1]).sum()


# Built-in tasks


@pytest.mark.parametrize("name", TASKS)
def test_a_built_in_task_is_drawn_from_its_distribution(name):
    chosen = task(name)
    kind = "lm" if chosen.causal else "classify"
    got = read(f"task:{name}", kind, WordTokenizer.of(chosen), 32, seed=3)
    assert [len(x) for x in (got.train, got.valid, got.test)] == [*data.SYNTHETIC_SIZES.values()]
    possible = {(e.ids, e.label) for e in chosen.examples}
    drawn = [(tuple(e.ids.tolist()), e.label) for e in got.train]
    assert set(drawn) <= possible
    rows = chosen.draw_rows(np.random.default_rng([3, 0]), 9)
    ours, theirs = batch(got.train[:9], PAD), chosen.batch(rows)
    for part in ("ids", "labels", "mask", "types"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))
    again = read(f"task:{name}", kind, None, 32, seed=3)
    other = read(f"task:{name}", kind, None, 32, seed=4)
    assert [e.ids.tolist() for e in again.train] == [e.ids.tolist() for e in got.train]
    assert [e.ids.tolist() for e in other.train] != [e.ids.tolist() for e in got.train]
    assert again.digest == got.digest != other.digest
    assert got.classes == (() if chosen.causal else ("0", "1", "2"))


@pytest.mark.parametrize(
    ("name", "kind", "tokenizer", "length", "match"),
    [
        ("running-sum", "classify", None, 32, "with the task classify: expected lm"),
        ("more-a", "lm", None, 32, "with the task lm: expected classify"),
        ("sums", "lm", None, 32, "task 'sums': expected one of running-sum"),
        ("running-sum", "lm", TYPED, 32, "found a model with 6 tokens, .* whose tokens are <pad>"),
        (
            "nested-brackets",
            "lm",
            WordTokenizer([*SPECIAL, *"abcd"], True),
            32,
            "found a model with 7",
        ),
        ("running-sum", "lm", WORDS, 7, "length 7: task:running-sum has sequences of up to 8"),
    ],
)
def test_a_built_in_task_that_does_not_fit_is_refused(name, kind, tokenizer, length, match):
    with pytest.raises(ValueError, match=match):
        read(f"task:{name}", kind, tokenizer, length)


def test_a_file_of_words_makes_the_tokens_of_the_task(tmp_path):
    for name in reference_models.names():
        tokenizer = read_tokenizer(reference_models.folder() / name / "base")
        chosen = task(reference_models.tasks(name)[0])
        some = chosen.examples[:: len(chosen.examples) // 20]
        for e in some:
            row = {"text": tokenizer.decode(e.ids)}
            if not chosen.causal:
                first, second = (
                    tokenizer.decode([i for i, t in zip(e.ids, e.types, strict=True) if t == kind])
                    for kind in (0, 1)
                )
                row = {"text": first, "text_pair": second, "label": e.label}
            path = write(tmp_path / "a.jsonl", row)
            kind = "lm" if chosen.causal else "classify"
            (made,) = read(path, kind, tokenizer, 32, classes=["0", "1", "2"]).train
            assert (tuple(made.ids), made.label) == (e.ids, e.label)
            if made.types is not None:
                assert tuple(made.types) == e.types


# Batches


def drawn(lengths):
    return [Example(np.arange(n) + 3, np.arange(n) > 0) for n in lengths]


@given(
    lengths=st.lists(st.integers(1, 40), max_size=200),
    more=st.integers(0, 200),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_has_every_example_once_within_the_budget(lengths, more, seed, epoch):
    examples = drawn(lengths)
    tokens = max(lengths, default=1) + more
    batches = order(examples, tokens, seed, epoch)
    assert sorted(itertools.chain(*batches)) == [*range(len(lengths))]
    assert all(batches)
    for rows in batches:
        assert batch([examples[i] for i in rows], 0).ids.size <= tokens
    assert order(examples, tokens, seed, epoch) == batches


def test_an_example_longer_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="example 1: found 9 tokens"):
        order(drawn([3, 9, 4]), 8, 0, 0)


def test_epochs_and_seeds_differ_and_are_the_same_on_every_machine():
    examples = drawn([7 * i * i % 29 + 1 for i in range(300)])
    epochs = {(s, e): order(examples, 64, s, e) for s in (0, 1) for e in (0, 1)}
    assert len({json.dumps(x) for x in epochs.values()}) == 4
    digest = hashlib.sha256(json.dumps(epochs[1, 1]).encode()).hexdigest()
    assert digest == "a778a89087dfc416da84876f1a617e8a1ef953dd0f81fd5e7cc214abbdba59ec"


def test_sequences_of_similar_length_share_a_batch():
    """Little padding, and less than without sorting, though every window has its own batches."""
    examples = drawn(np.random.default_rng(0).integers(1, 100, 3000))

    def padded(batches):
        return sum(len(b) * max(len(examples[i].ids) for i in b) for b in batches)

    real = sum(len(e.ids) for e in examples)
    unsorted = [[*range(i, i + 10)] for i in range(0, 3000, 10)]
    batches = order(examples, 1000, 0, 0)
    assert padded(batches) - real < (padded(unsorted) - real) / 10
    longest = [max(len(examples[i].ids) for i in b) for b in batches]
    assert longest != sorted(longest)


@given(st.data())
def test_a_batch_has_the_examples_and_labels_what_counts(draws):
    counted = st.lists(st.booleans(), min_size=1, max_size=9)
    examples = [
        Example(np.arange(len(c)) + 3, np.array(c) & (np.arange(len(c)) > 0))
        for c in draws.draw(st.lists(counted, min_size=1, max_size=5))
    ]
    got = batch(examples, 1)
    assert got.ids.shape == (len(examples), max(len(e.ids) for e in examples))
    assert (got.ids[~got.mask] == 1).all()
    assert (got.labels[~got.mask] == IGNORED).all()

    class Causal:
        causal = True

    following = shifted_labels(got, Causal).reshape(got.ids.shape)
    for row, e in enumerate(examples):
        n = len(e.ids)
        assert (got.ids[row, :n] == e.ids).all()
        wanted = [int(e.ids[i + 1]) if e.loss_mask[i + 1] else IGNORED for i in range(n - 1)]
        assert following[row, : n - 1].tolist() == wanted
        assert (following[row, n - 1 :] == IGNORED).all()


def test_a_batch_of_both_kinds_or_of_nothing_is_refused():
    one = Example(np.arange(3), np.zeros(3, bool), 1)
    assert batch([one, one], 0).labels.tolist() == [1, 1]
    for wrong in ([], [one, *drawn([3])]):
        with pytest.raises(ValueError, match="all with a class"):
            batch(wrong, 0)


# What a person sees


def test_a_batch_is_shown_token_by_token_with_its_mask(made):
    e = made({"prompt": "a?", "completion": "\x1b[31m"}, "lm")
    text = shown(batch([e, *drawn([2])], PAD), CHARACTERS)
    lines = text.splitlines()
    assert text.isprintable() is False  # line feeds
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "sequence 1 of 2: 9 tokens, 6 to predict, 0 of padding"
    assert [line.split()[1] for line in lines[1:10]] == ["given"] * 3 + ["predict"] * 6
    assert [line.split()[-1] for line in lines[1:6]] == [
        "“<start>”",
        "“a”",
        "“?”",
        r"“\x1b”",
        "“[”",
    ]
    assert lines[10] == "sequence 2 of 2: 2 tokens, 1 to predict, 7 of padding"
    assert [line.split()[1] for line in lines[11:]] == ["given", "predict"] + ["padding"] * 7
    assert "“" not in shown(batch([e], PAD), None)


def test_a_batch_of_classes_is_shown_with_its_classes_and_types():
    got = read("task:more-a", "classify", TYPED, 16)
    lines = shown(batch(got.train[:2], PAD), TYPED).splitlines()
    assert re.fullmatch(r"sequence 1 of 2: \d+ tokens, class [012], \d+ of padding", lines[0])
    assert "predict" not in "".join(lines)
    assert re.fullmatch(r" +0  given    type 0 +1  “<start>”", lines[1])
