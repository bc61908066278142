"""The models of the package glassllm: the same weights, tokens and logits as there."""

import importlib.util
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from calculus import record_worst, same_bits
from extras import optional

from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.formats import glassllm
from minilora.io.formats.huggingface import copy_tokenizer
from minilora.io.loading import open_adapted, open_base, package_model
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import Batch, Llama, logits

C = Llama(vocab=40, d=24, layers=2, heads=4, ffn=64, kv_heads=2, head_dim=6, eps=1e-6, tied=True)
CONFIG = {
    "vocab_size": 40,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "max_len": 32,
    "rope_base": 10000.0,
    "eps": 1e-6,
    "init_std": 0.02,
}
TOKENIZER = {
    "version": 1,
    "alphabet": ["\n", "!", "a", "b", "c", "é", "▁"],
    "merges": [["▁", "a"], ["▁a", "b"], ["a", "b"], ["ab", "c"]],
}
REAL = importlib.util.find_spec("glassllm")
needs_it = pytest.mark.skipif(not REAL, reason="pip install --no-deps glassllm")


def arrays_of(W):
    """W as the package lays it out: pair j of a head in its columns 2 j and 2 j + 1."""
    held = {"E": W["embed.weight"], "norm_f.gamma": W["norm.weight"][:, 0]}
    for i in range(C.layers):
        for at, place in glassllm.NAMES.items():
            w = W[f"layers.{i}.{at}.weight"]
            if at in ("q", "k"):
                half = C.head_dim // 2
                heads = w.reshape(-1, C.head_dim, C.d)
                w = np.stack([heads[:, :half], heads[:, half:]], 2).reshape(w.shape)
            held[f"blocks.{i}.{place}"] = w[:, 0] if at.startswith("norm") else w.T.copy()
    return held


@pytest.fixture
def weights():
    drawn = draw_weights(C, np.random.default_rng(0), 0.2)
    return {name: w.astype(np.float16) for name, w in drawn.items()}


def written(path, W, config=CONFIG, **changed):
    held = {"__config__": np.array(json.dumps(config))} | arrays_of(W) | changed
    np.savez_compressed(path, **{name: w for name, w in held.items() if w is not None})
    path.with_name(path.stem + glassllm.BESIDE).write_text(json.dumps(TOKENIZER))
    return path


def test_a_file_is_read_to_the_bit_whatever_the_order_of_its_rows(tmp_path, weights):
    c, W = glassllm.read_model(written(tmp_path / "m.npz", weights))
    assert c == C
    assert W.keys() == weights.keys()
    assert all(same_bits(W[name], weights[name]) for name in W)
    c, W = glassllm.read_model(tmp_path / "m.npz", np.float64)
    assert all((W[name] == weights[name]).all() for name in W)
    assert {w.dtype for w in W.values()} == {np.dtype(float)}


def test_its_tokenizer_merges_characters_within_chunks(tmp_path, weights):
    optional("tokenizers")
    tokenizer = open_base(str(written(tmp_path / "m.npz", weights))).tokenizer
    pieces = [tokenizer.token_text(i) for i in tokenizer.encode("ab abc\n  ba!x e\u0301")]
    assert pieces == ["ab", " ab", "c", "\n", " ", " ", "b", "a", "!", "<unk>", " ", "é"]
    assert tokenizer.decode(tokenizer.encode(" ab  cab\n")) == " ab  cab\n"
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.prefix_ids) == (0, 2, 3, ())


def test_it_is_trained_on_and_merged_into_a_folder_with_its_tokenizer(
    tmp_path, weights, monkeypatch
):
    optional("tokenizers")
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "m.npz", weights)
    (tmp_path / "d.txt").write_text("ab abc cab!\n" * 20)
    base = open_base(str(path))
    quick = ["--max-steps", "2", "--max-length", "16", "--batch-tokens", "64"]
    assert main(["train", "--model", "m.npz", "--data", "d.txt", "--output", "run", *quick]) == 0
    assert main(["merge", "--adapter", "run", "--output", "merged"]) == 0
    merged, adapted = open_base("merged"), open_adapted(base, "run")
    assert merged.tokenizer.encode("abc ab") == base.tokenizer.encode("abc ab")
    assert not same_bits(merged.weights["layers.0.q.weight"], base.weights["layers.0.q.weight"])
    assert merged.weights.keys() == base.weights.keys()
    assert adapted.base.digest == base.digest
    before = base.digest
    (tmp_path / f"m{glassllm.BESIDE}").write_text(json.dumps(TOKENIZER | {"merges": []}))
    assert open_base(str(path)).digest != before


@pytest.mark.parametrize(
    ("config", "changed", "found"),
    [
        ({"gamma": 1}, {}, "gamma: found 1, expected no setting"),
        ({"n_heads": 5}, {}, "heads that share"),
        ({"n_layers": 10**9}, {}, "heads that share"),
        ({"n_layers": 3}, {}, "arrays: found .* in one of the two only"),
        ({"eps": "x"}, {}, "eps: found x"),
        ({"d_model": True}, {}, "d_model: found True"),
        ({}, {"E": None}, "arrays: found E.npy in one of the two only"),
        ({}, {"more": np.zeros(2)}, "arrays: found more.npy in one"),
        ({}, {"E": np.zeros((3, 24), np.float16)}, r"E: found float16 of shape \(3, 24\)"),
        ({}, {"E": np.zeros((40, 24), int)}, "E: found int64 of shape"),
        ({}, {"E": np.full((40, 24), np.nan, np.float16)}, "E: found .*expected"),
        ({}, {"E": np.zeros((40, 24), object)}, "E: found object"),
    ],
)
def test_a_file_that_is_another_or_damaged_is_refused(config, changed, found, tmp_path, weights):
    path = written(tmp_path / "m.npz", weights, CONFIG | config, **changed)
    with pytest.raises(FormatError, match=found):
        glassllm.read_model(path)


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, weights):
    path, lie = written(tmp_path / "m.npz", weights), io.BytesIO()
    np.lib.format.write_array(lie, np.zeros((40, 24), np.float16))
    with zipfile.ZipFile(path) as file:
        held = {name: file.read(name) for name in file.namelist()}
    for data in (lie.getvalue()[:-7], b"", b"\x93NUMPY\x02\x00" + lie.getvalue()[8:]):
        with zipfile.ZipFile(path, "w") as file:
            for name, whole in held.items():
                file.writestr(name, data if name == "E.npy" else whole)
        with pytest.raises(FormatError, match=r"m\.npz"):
            glassllm.read_model(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match="file: found"):
        glassllm.read_model(path)
    with pytest.raises(FormatError, match="file: found"):
        glassllm.read_model(tmp_path / "none.npz")


def test_a_damaged_tokenizer_is_refused(tmp_path, weights):
    optional("tokenizers")
    path = written(tmp_path / "m.npz", weights)
    beside = tmp_path / f"m{glassllm.BESIDE}"
    for text, found in (
        (json.dumps({"version": 2}), "version: found 2"),
        (json.dumps({"version": 1}), "tokenizer: found"),
        (json.dumps(TOKENIZER | {"merges": [["a"]]}), "tokenizer: found"),
        (json.dumps(TOKENIZER | {"merges": [["x", "y"]]}), "tokenizer: found"),
        ("{", "file: found"),
    ):
        beside.write_text(text)
        with pytest.raises(FormatError, match=found):
            glassllm.read_tokenizer(path)
    beside.unlink()
    with pytest.raises(FormatError, match="tokenizer: found none"):
        glassllm.read_tokenizer(path)


@pytest.fixture
def a_package(tmp_path, monkeypatch, weights):
    """A package with two models, which must not be imported."""
    folder = tmp_path / "glass_like" / "weights"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    written(folder / "en.npz", weights)
    written(folder / "pt.npz", weights)
    return folder


def test_a_model_in_a_package_is_found_by_name(a_package):
    assert package_model("package:glass_like/weights/en.npz") == a_package / "en.npz"
    with pytest.raises(FormatError, match=r"found package:glass_like/weights/en\.npz, package:"):
        open_base("package:glass_like")
    with pytest.raises(FormatError, match="models: found"):
        open_base("package:glass_like/weights/de.npz")
    (a_package / "pt.npz").unlink()
    assert open_base("package:glass_like").path == a_package / "en.npz"
    with pytest.raises(ImportError, match="pip install --no-deps no-such-package"):
        open_base("package:no_such_package")
    with pytest.raises(FormatError, match=r"found .*, expected the name of a Python package"):
        open_base("package:../tests")


def test_a_folder_that_is_no_models_own_says_what_is_in_it(a_package, tmp_path):
    with pytest.raises(FormatError, match=r"model: found .*en\.npz.*name one of these"):
        open_base(str(a_package.parent))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"model: found no config\.json"):
        open_base(str(tmp_path / "empty"))


# Against the package itself


@needs_it
@pytest.mark.parametrize("language", ["en", "pt"])
def test_tokens_and_logits_are_the_packages(language, tmp_path):
    import glassllm
    from test_gguf import real_and_pooled

    from minilora.verify.core.types import MONTE_CARLO, Comparison

    path = Path(REAL.submodule_search_locations[0]) / "weights" / f"{language}.npz"
    base = open_base(str(path))
    theirs, tokenizer = glassllm.load_pretrained(language)
    texts = ["Alice was beginning", " two  blanks\n\n é e\u0301", "東京 “Off!”\n▁_", "", "Capitu"]
    assert [base.tokenizer.encode(text) for text in texts] == [*map(tokenizer.encode, texts)]
    ids = np.array(base.tokenizer.encode("Alice was beginning to get very tired"))
    z = theirs.forward(ids).data[0].T
    wanted, sigma = real_and_pooled(base.config, base.weights, TrainableSpec(), ids)
    result = Comparison("logits", z, wanted, sigma, MONTE_CARLO).judge()
    record_worst(f"glassllm's logits, {language}, in standard deviations", result.z)
    assert result.verdict == "pass"
    name = "layers.0.q.weight"
    mixed = base.weights | {name: np.roll(base.weights[name], 1, 0)}
    other = logits(Batch(ids[None]), mixed, base.config, TrainableSpec())[0]
    assert Comparison("logits", other, wanted, sigma, MONTE_CARLO).judge().verdict == "fail"
    copy_tokenizer(base, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
