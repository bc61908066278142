"""What differs between two models' settings and tokenizers is named, with what it changes."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from minilora.audit.settings import compare_settings
from minilora.audit.tensors import TensorStore, open_tensors
from minilora.audit.tokenizer import compare_tokenizers
from minilora.io.errors import FormatError
from minilora.io.reference_models import folder

BASE = folder() / "llama" / "base"


def found(tmp_path, settings, of_base=None, edit=None):
    """What is told of a copy of the base with other settings, and tensors."""
    folders = {}
    for name, more in (("base", of_base or {}), ("merged", settings)):
        shutil.copytree(BASE, tmp_path / name)
        file = tmp_path / name / "config.json"
        stored = json.loads(file.read_text()) | more
        file.write_text(json.dumps({k: v for k, v in stored.items() if v != "absent"}))
        folders[name] = tmp_path / name
    if edit is not None:
        file = folders["merged"] / "model.safetensors"
        save_file(edit(load_file(file)), file)
    base, model = (open_tensors(path) for path in folders.values())
    return [(entry.subject, entry.verdict) for entry in compare_settings(base, model)]


def without_head(tensors):
    return {name: array for name, array in tensors.items() if name != "lm_head.weight"}


GEMMA_ROPE = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}

OTHER = {
    "nothing": ({}, {}, []),
    "two bases, two generations": (
        {"rope_theta": "absent", "rope_parameters": GEMMA_ROPE},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_parameters": "absent"}, [],
    ),
    "another local base": (
        {"rope_theta": "absent", "rope_parameters": GEMMA_ROPE},
        {"rope_theta": 1e6, "rope_local_base_freq": 5e4, "rope_parameters": "absent"},
        [("rope_local_base_freq", "wrong")],
    ),
    "theta": ({"rope_theta": 5e5, "rope_parameters": "absent"}, {}, [("rope_theta", "wrong")]),
    "theta in its other place": (
        {"rope_theta": 5e4, "rope_parameters": "absent"},
        {"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
        [],
    ),
    "a scaled RoPE": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {},
        [("factor", "wrong"), ("rope_type", "wrong")],
    ),
    "the scaling left out": (
        {}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
        [("factor", "wrong"), ("rope_type", "wrong")],
    ),
    "an epsilon": ({"rms_norm_eps": 1e-2}, {}, [("rms_norm_eps", "wrong")]),
    "an activation": ({"hidden_act": "gelu"}, {}, [("hidden_act", "wrong")]),
    "the end of texts": ({"eos_token_id": 3}, {"eos_token_id": 2}, [("eos_token_id", "doubtful")]),
    "one token or a list of it": ({"eos_token_id": [2]}, {"eos_token_id": 2}, []),
    "a dtype": ({"dtype": "float16"}, {"dtype": "float32"}, [("dtype", "told")]),
    "a quantizer beside plain numbers": (
        {"quantization_config": {"load_in_4bit": True}}, {"quantization_config": {}},
        [("quantization_config", "wrong")],
    ),
    "a quantizer removed": (
        {}, {"quantization_config": {"load_in_4bit": True}}, [("quantization_config", "told")],
    ),
    "a tie beside a head of its own": (
        {"tie_word_embeddings": True}, {}, [("tie_word_embeddings", "wrong")],
    ),
    "another vocabulary than the table": ({"vocab_size": 99}, {}, [("vocab_size", "wrong")]),
    "a setting that is not known": ({"twist": 2}, {"twist": 1}, [("twist", "doubtful")]),
    "a release": ({"transformers_version": "9"}, {"transformers_version": "4"}, []),
    "what a release leaves out": ({"hidden_act": "absent"}, {}, []),
    "of a part": (
        {"text_config": {"rms_norm_eps": 1e-2}}, {"text_config": {"rms_norm_eps": 1e-5}},
        [("text_config.rms_norm_eps", "wrong")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "of_base", "expected"), OTHER.values(), ids=OTHER)
def test_each_difference_is_named(tmp_path, settings, of_base, expected):
    assert found(tmp_path, settings, of_base) == expected


def test_llama_cpp_has_one_architecture_for_several(tmp_path):
    model = open_tensors(BASE)
    other = {**model.settings, "model_type": "mistral"}
    stores = [
        TensorStore(model.path, container, model.tensors, settings, None)
        for container, settings in (("safetensors", other), ("gguf", model.settings))
    ]
    assert list(compare_settings(*stores)) == []
    stores[1].container = "safetensors"
    assert [entry.subject for entry in compare_settings(*stores)] == ["model_type"]


def test_a_head_that_is_missing_is_named(tmp_path):
    settings = {"tie_word_embeddings": False}
    assert ("tie_word_embeddings", "wrong") in found(tmp_path, settings, edit=without_head)


def test_a_tied_head_with_the_tables_bits_is_right(tmp_path):
    def same(tensors):
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}

    settings = {"tie_word_embeddings": True}
    assert found(tmp_path, settings, {"tie_word_embeddings": True}, same) == []


TOKENIZER = {
    "model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "added_tokens": [{"id": 3, "content": "<s>"}],
    "normalizer": None,
    "post_processor": {"type": "x"},
}


def changed(**parts):
    return {**TOKENIZER, **parts}


TOKENIZERS = {
    "the same": (TOKENIZER, []),
    "merges as pairs": (changed(model={**TOKENIZER["model"], "merges": [["a", "b"]]}), []),
    "other merges": (changed(model={**TOKENIZER["model"], "merges": []}), ["wrong"]),
    "tokens moved": (changed(model={**TOKENIZER["model"], "vocab": {"a": 1, "b": 0, "ab": 2}}),
                     ["wrong"]),
    "a token gone": (changed(added_tokens=[]), ["wrong"]),
    "a token more": (changed(added_tokens=[*TOKENIZER["added_tokens"],
                                           {"id": 4, "content": "<x>"}]), ["told"]),
    "another normalizer": (changed(normalizer={"type": "NFC"}), ["doubtful"]),
    "another processor": (changed(post_processor={"type": "y"}), ["doubtful"]),
    "padding": (changed(padding={"length": 3}), []),
    "damaged vocabulary": (changed(model={"vocab": 3, "merges": 4}), ["wrong", "wrong"]),
}  # fmt: skip


@pytest.fixture
def folders(tmp_path):
    for name in ("base", "merged"):
        shutil.copytree(BASE, tmp_path / name)
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return tmp_path / "base", tmp_path / "merged"


def compared(folders):
    return list(compare_tokenizers(*map(open_tensors, folders)))


@pytest.mark.parametrize(("tokenizer", "verdicts"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_other_tokens_are_named(folders, tokenizer, verdicts):
    (folders[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert [entry.verdict for entry in compared(folders)] == verdicts


def template(*pieces):
    kinds = {"TEXT": {"Sequence": {"id": "A", "type_id": 0}}}
    single = [kinds.get(p, {"SpecialToken": {"id": p, "type_id": 0}}) for p in pieces]
    return {"type": "TemplateProcessing", "single": single}


BYTES = {"type": "ByteLevel", "trim_offsets": True}
ROBERTA = {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 2]}
PROCESSORS = {
    "none, or one that adds nothing": (None, template("TEXT"), ""),
    "two that add nothing": (BYTES, {"type": "Sequence", "processors": [template("TEXT")]}, ""),
    "the same in other words": (template("<s>", "TEXT", "</s>"), ROBERTA, ""),
    "a first token": (None, template("<s>", "TEXT"), "becomes <s> TEXT, with the base's TEXT"),
    "a last one less": (ROBERTA,
                        {"type": "Sequence", "processors": [BYTES, template("<s>", "TEXT")]},
                        "becomes <s> TEXT, with the base's <s> TEXT </s>"),
    "two texts": (template("TEXT", "TEXT"), template("TEXT"), "may be put"),
}  # fmt: skip


@pytest.mark.parametrize(("base", "merged", "words"), PROCESSORS.values(), ids=PROCESSORS)
def test_what_is_put_around_a_text_is_compared(folders, base, merged, words):
    for place, processor in zip(folders, (base, merged), strict=True):
        (place / "tokenizer.json").write_text(json.dumps(changed(post_processor=processor)))
    entries = compared(folders)
    assert len(entries) == bool(words)
    assert all(words in entry.text for entry in entries)


def test_a_tokenizer_that_is_missing_is_told(folders):
    (folders[1] / "tokenizer.json").unlink()
    assert [entry.verdict for entry in compared(folders)] == ["told"]


def test_other_chat_templates_and_special_tokens_are_named(folders):
    settings = {"chat_template": "{{ a }}", "eos_token": "</s>"}
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    assert [entry.subject for entry in compared(folders)] == ["chat template"]
    (folders[1] / "chat_template.jinja").write_text("{{ a }}\n")  # its newer place
    assert compared(folders) == []
    settings = {"eos_token": {"content": "<end>"}}
    (folders[1] / "tokenizer_config.json").write_text(json.dumps(settings))
    (folders[1] / "chat_template.jinja").write_text("{{ b }}")
    subjects = [entry.subject for entry in compared(folders)]
    assert subjects == ["tokenizer: eos_token", "chat template"]


def test_a_damaged_tokenizer_is_unreadable(folders):
    (folders[1] / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError):
        compared(folders)
