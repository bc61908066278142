"""``minilora audit converted``: one adapter in two formats, one model in two files."""

import itertools
import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from adapter_folders import (
    ALPHA,
    FFN,
    D,
    R,
    factors,
    modules,
    settings,
    tensors,
    write_base,
    write_kohya,
    write_loralib,
    write_mlx,
    write_peft,
)
from extras import needs
from safetensors.numpy import load_file, save_file
from zoo import MORE_MODELS

from minilora.audit.converted import converted
from minilora.audit.stored.compare import Factored, likeness
from minilora.cli.main import main
from minilora.io.errors import FormatError
from minilora.io.formats import huggingface
from minilora.io.formats.gguf.names import file_rows
from minilora.io.formats.gguf.write import write_model
from minilora.io.loading import open_base
from minilora.spec.architectures import RopeScaling
from minilora.spec.initialization import draw_weights

FIRST = next(iter(modules()))


def verdicts(report):
    return {entry.verdict for entry in report.entries}


def mistakes(report):
    return {entry.mistake for entry in report.entries if entry.severity == "deviation"}


WRITERS = {
    "peft": lambda path, pairs: write_peft(path, tensors(pairs)),
    "mlx": write_mlx,
    "kohya": lambda path, pairs: write_kohya(path.with_suffix(".safetensors"), pairs),
    "loralib": lambda path, pairs: write_loralib(path.with_suffix(".safetensors"), pairs),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(WRITERS, 2)))
def test_one_adapter_in_two_formats_is_the_same(tmp_path, one, other):
    a, b = (WRITERS[form](tmp_path / form, factors()) for form in (one, other))
    report = converted(a, b)
    assert verdicts(report) == {"within" if "loralib" in (one, other) else "exact"}
    assert len(report.entries) == len(modules())
    assert (report.exit_status, report.cause) == (0, "")


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_conversion_to_half_precision_is_within_its_rounding(tmp_path, dtype):
    a = write_peft(tmp_path / "a")
    b = write_mlx(
        tmp_path / "b", {at: tuple(x.astype(dtype) for x in p) for at, p in factors().items()}
    )
    report = converted(a, b)
    assert (verdicts(report), report.exit_status) == ({"within"}, 0)
    twice = factors()
    u = float(ml_dtypes.finfo(dtype).eps)
    twice[FIRST] = twice[FIRST][0], twice[FIRST][1] * np.float32(1 + 8 * u)  # beyond rounding
    c = write_mlx(
        tmp_path / "c", {at: tuple(x.astype(dtype) for x in p) for at, p in twice.items()}
    )
    (wrong,) = (e for e in converted(a, c).entries if e.severity == "deviation")
    assert wrong.subject == FIRST


def test_a_scale_that_was_folded_into_b_is_the_same(tmp_path):
    folded = {at: (A, (B * np.float32(ALPHA / R))) for at, (A, B) in factors().items()}
    report = converted(write_peft(tmp_path / "a"), write_mlx(tmp_path / "b", folded, scale=1.0))
    assert report.exit_status == 0
    assert verdicts(report) <= {"within", "exact"}


FACTORS = [
    ({}, {"scale": ALPHA / R * 3}, 3, "three-times"),
    ({}, {"scale": -ALPHA / R}, -1, "negative"),
    ({"use_rslora": True}, {"scale": ALPHA / R}, R**-0.5, "rslora-ignored"),
    ({}, {"scale": ALPHA / R**0.5}, R**0.5, "rslora-unasked"),
    ({"lora_alpha": 12}, {"scale": 12.0}, 4, "rank-missing"),
    ({"lora_alpha": 32}, {"scale": 4.0}, 0.5, "alpha-16"),
    ({}, {"scale": 1.7}, 0.85, "factor"),
]


@pytest.mark.parametrize(("said", "parameters", "factor", "mistake"), FACTORS)
def test_another_scale_is_measured_and_named(tmp_path, said, parameters, factor, mistake):
    a = write_peft(tmp_path / "a", said=settings(**said))
    report = converted(a, write_mlx(tmp_path / "b", **parameters))
    assert verdicts(report) == {"factor"}
    assert mistakes(report) == {mistake}
    for entry in report.entries:
        assert abs(entry.figures["factor"] - factor) <= entry.figures["factor_error"]
        assert entry.figures["factor_error"] < 1e-6
    assert report.exit_status == 1


def changed(change):
    """The adapter with another pair in its first module."""
    pairs = factors()
    pairs[FIRST] = change(*pairs[FIRST])
    return pairs


SECOND = FIRST.replace("0", "1")
WRONG = {
    "transposed": (changed(lambda A, B: (B.T.copy(), A.T.copy())), "transposed", "transposed"),
    "another module's": (
        changed(lambda A, B: factors()[SECOND]), "other-module", "other-module"
    ),
    "other numbers": (changed(lambda A, B: (A, B + A.T)), "mismatch", "mismatch"),
    "one entry": (
        changed(lambda A, B: (A, B + np.float32(0.01) * (np.arange(B.size) == 0).reshape(B.shape))),
        "mismatch", "mismatch",
    ),
    "NaN": (changed(lambda A, B: (A, np.full_like(B, np.nan))), "corrupt", ""),
    "zero": (changed(lambda A, B: (A, 0 * B)), "mismatch", "mismatch"),
    "another shape": (
        changed(lambda A, B: (A, np.ones((FFN, R), np.float32))), "mismatch", "shape"
    ),
    "one module less": (
        {at: pair for at, pair in factors().items() if at != FIRST}, "missing", "missing"
    ),
    "one module more": (
        factors() | {"model.layers.7.mlp.x": factors()[FIRST]}, "extra", "extra"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_was_converted_wrong_is_found_and_named(tmp_path, case):
    pairs, verdict, mistake = WRONG[case]
    report = converted(write_peft(tmp_path / "a"), write_mlx(tmp_path / "b", pairs))
    (wrong,) = (e for e in report.entries if e.severity == "deviation")
    assert (wrong.verdict, wrong.mistake) == (verdict, mistake)
    assert report.exit_status == 1
    assert report.cause


def test_magnitudes_biases_and_heads_that_are_lost_are_found(tmp_path):
    name = f"base_model.model.{FIRST}"
    beside = {
        f"{name}.lora_magnitude_vector": np.ones(D, np.float32),
        f"{name}.lora_B.bias": np.ones(D, np.float32),
        "base_model.model.lm_head.weight": np.ones((3, D), np.float32),
    }
    a = write_peft(tmp_path / "a", tensors() | beside)
    report = converted(a, write_mlx(tmp_path / "b"))
    wrong = {e.subject: e.verdict for e in report.entries if e.severity == "deviation"}
    assert wrong == {
        f"{FIRST}.magnitude": "norm-not-applied",
        f"{FIRST}.lora_bias": "missing",
        "lm_head": "missing",
    }
    again = write_peft(tmp_path / "c", tensors() | beside)
    assert verdicts(converted(a, again)) == {"exact"}
    beside[f"{name}.lora_B.bias"] = 2 * beside[f"{name}.lora_B.bias"]
    (entry,) = (
        e
        for e in converted(a, write_peft(tmp_path / "d", tensors() | beside)).entries
        if e.severity == "deviation"
    )
    assert (entry.subject, entry.verdict) == (f"{FIRST}.lora_bias", "mismatch")


def random_factored(rng, m, n, r, s):
    A, B = rng.standard_normal((r, n)), rng.standard_normal((m, r))
    return Factored(A, B, s, np.zeros_like(A), np.zeros_like(B))


def test_likeness_is_that_of_the_products():
    rng = np.random.default_rng(0)
    x, y = random_factored(rng, 7, 5, 2, 3.0), random_factored(rng, 7, 5, 4, -0.5)
    X, Y = (f.s * f.B @ f.A for f in (x, y))
    found = likeness([x], [y])
    f = np.sum(X * Y) / np.sum(X * X)
    expected = f, np.linalg.norm(Y - X), np.linalg.norm(Y - f * X), np.linalg.norm(X)
    got = found.factor, found.difference, found.rest, found.norm
    np.testing.assert_allclose(got, expected, rtol=2**-40)
    assert not found.is_same
    assert not found.is_multiple


@pytest.mark.parametrize("seed", range(20))
def test_the_bound_holds_for_products_written_in_other_factors(seed):
    rng = np.random.default_rng(seed)
    x = random_factored(rng, 40, 30, 4, 1.0)
    M = rng.standard_normal((4, 4))
    A, B = np.linalg.solve(M, x.A), x.B @ M
    k = np.linalg.cond(M)
    off_A, off_B = (4 * k * 2.0**-53 * np.abs(v) for v in (A, B))
    assert likeness([x], [Factored(A, B, 1.0, off_A, off_B)]).is_same


@needs("gguf")
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_what_minilora_converts_is_the_same(tmp_path, model):
    files = [f"reference:{model}"]
    for form, name in (("peft", "p"), ("mlx", "m"), ("gguf", "g.gguf")):
        to = ["--to", form, "--output", str(tmp_path / name)]
        assert main(["convert", "--model", f"reference:{model}", *to, f"reference:{model}"]) == 0
        files.append(tmp_path / name)
    for a, b in itertools.permutations(files, 2):
        report = converted(a, b)
        assert verdicts(report) <= {"exact", "within"}
        assert report.exit_status == 0


def write_gguf(file, pairs, alpha=float(ALPHA), heads=None, kind=None):
    """A GGUF adapter of a Llama; ``heads`` puts the rows of q in llama.cpp's order."""
    import gguf

    names = {"self_attn.q_proj": "attn_q", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for at, (A, B) in pairs.items():
        _, _, layer, name = at.split(".", 3)
        B = B[file_rows(heads, len(B))] if heads and name.endswith("q_proj") else B
        for part, array in zip("ab", (A, B), strict=True):
            to = f"blk.{layer}.{names[name]}.weight.lora_{part}"
            if kind is not None and array.shape[1] % 32 == 0:
                data = gguf.quants.quantize(array, kind)
                writer.add_tensor(to, data, raw_dtype=kind)
            else:
                writer.add_tensor(to, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


WIDE = 64


def wide_pairs():
    rng = np.random.default_rng(2)
    return {
        f"model.layers.{i}.self_attn.q_proj": (
            rng.standard_normal((R, WIDE)).astype(np.float32),
            rng.standard_normal((WIDE, R)).astype(np.float32),
        )
        for i in range(2)
    }


@needs("gguf")
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_the_rows_of_q_lie_in_the_order_of_llama_cpp(tmp_path, heads):
    a = write_peft(tmp_path / "a", tensors(wide_pairs()), settings(target_modules=["q_proj"]))
    report = converted(a, write_gguf(tmp_path / "b.gguf", wide_pairs(), heads=heads))
    assert report.exit_status == 0
    assert {entry.figures["heads"] for entry in report.entries} == {heads}
    report = converted(a, write_gguf(tmp_path / "c.gguf", wide_pairs()))
    assert mistakes(report) == {"rows-not-permuted"}
    assert "llama.cpp" in report.cause


@needs("gguf")
def test_a_scale_that_one_alpha_cannot_say_is_found(tmp_path):
    said = settings(target_modules=["q_proj"], use_rslora=True)
    a = write_peft(tmp_path / "a", tensors(wide_pairs()), said)
    report = converted(a, write_gguf(tmp_path / "b.gguf", wide_pairs(), heads=2))
    assert mistakes(report) == {"rslora-ignored"}


@needs("gguf")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantized_factors_are_within_their_blocks(tmp_path, kind):
    import gguf

    a = write_peft(tmp_path / "a", tensors(wide_pairs()), settings(target_modules=["q_proj"]))
    number = gguf.GGMLQuantizationType[kind]
    b = write_gguf(tmp_path / "b.gguf", wide_pairs(), heads=2, kind=number)
    report = converted(a, b)
    assert (verdicts(report), report.exit_status) == ({"within"}, 0)
    other = {at: (A, 3 * B) for at, (A, B) in wide_pairs().items()}
    c = write_gguf(tmp_path / "c.gguf", other, heads=2, kind=number)
    assert verdicts(converted(a, c)) == {"factor"}


def test_a_model_and_its_copy_are_the_same(tmp_path):
    a, b = write_base(tmp_path / "a"), write_base(tmp_path / "b")
    assert (verdicts(converted(a, b)), converted(a, b).exit_status) == ({"exact"}, 0)
    file = b / "model.safetensors"
    stored = load_file(file)
    save_file({n: x.astype(ml_dtypes.bfloat16) for n, x in stored.items()}, file)
    assert verdicts(converted(a, b)) == {"within"}


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda W: W.T.copy(), "transposed"),
        (lambda W: W + np.float32(0.01), "mismatch"),
        (lambda W: np.full_like(W, np.nan), "corrupt"),
        (lambda W: None, "missing"),
    ],
)
def test_what_differs_in_a_model_is_found(tmp_path, change, verdict):
    a, b = write_base(tmp_path / "a"), write_base(tmp_path / "b")
    file, name = b / "model.safetensors", f"{FIRST}.weight"
    stored = load_file(file)
    W = change(stored[name])
    save_file({n: x for n, x in {**stored, name: W}.items() if x is not None}, file)
    (wrong,) = (e for e in converted(a, b).entries if e.severity == "deviation")
    assert (wrong.subject, wrong.verdict) == (name, verdict)


def gguf_of(file, name, dtype=np.float32, change=None):
    """The reference model as a GGUF file; ``change`` makes other weights of its own."""
    base = open_base(f"reference:{name}")
    weights = dict(base.weights)
    write_model(file, base.config, weights if change is None else change(weights), dtype=dtype)
    return file


@needs("gguf")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_model_and_its_gguf_are_the_same(tmp_path, name, dtype):
    report = converted(f"reference:{name}", gguf_of(tmp_path / "m.gguf", name, dtype))
    assert [e for e in report.entries if e.severity != "ok"] == []
    assert ("within" in verdicts(report)) == (dtype is not np.float32)


@needs("gguf")
def test_a_gguf_whose_q_and_k_keep_their_order_is_found(tmp_path):
    base = open_base("reference:llama")

    def unordered(weights):
        c = base.config
        for at in (f"layers.{i}.{part}.weight" for i in range(c.layers) for part in "qk"):
            heads = c.heads if ".q." in at else c.kv_heads
            weights[at] = weights[at][np.argsort(file_rows(heads, len(weights[at])))]
        return weights

    report = converted("reference:llama", gguf_of(tmp_path / "m.gguf", "llama", change=unordered))
    wrong = [e for e in report.entries if e.severity == "deviation"]
    assert {e.mistake for e in wrong} == {"rows-not-permuted"}
    assert {e.subject.split(".")[-2] for e in wrong} <= {"q_proj", "k_proj"}
    assert "llama.cpp" in report.cause


OWN_RULES = {
    "Gemma 3": {"score_scale": 6, "window": (2, 2, 2)},
    "SmolLM3": {"without_positions": ()},
    "Llama 3": {"scaling": RopeScaling(8.0, 1.0, 4.0, 64), "theta": 1e5, "head_dim": 32},
}
"""Models of which llama.cpp's converter changes more: norms, or a tensor of factors."""


def both_of(name, folder, changed=None):
    """The model as a folder and as a GGUF file, which may have another configuration."""
    c = replace(MORE_MODELS[name], **OWN_RULES[name])
    W = draw_weights(c, np.random.default_rng(0), std=0.3)
    W = {n: w.astype(np.float32).astype(ml_dtypes.bfloat16) for n, w in W.items()}
    huggingface.write_model(folder / "a", c, W)
    write_model(folder / "m.gguf", replace(c, **(changed or {})), W)
    return folder / "a", folder / "m.gguf"


@needs("gguf")
@pytest.mark.parametrize("name", OWN_RULES)
def test_a_model_of_other_rules_and_its_gguf_are_the_same(tmp_path, name):
    report = converted(*both_of(name, tmp_path))
    assert [e for e in report.entries if e.severity != "ok"] == []
    assert report.exit_status == 0


@needs("gguf")
@pytest.mark.parametrize(
    ("name", "changed", "subject"),
    [
        ("Gemma 3", {"local_theta": 60.0}, "rope_local_base_freq"),
        ("Gemma 3", {"window": (2, None, 2)}, "layer_types"),
        ("Llama 3", {"scaling": RopeScaling(4.0, 1.0, 4.0, 64)}, "factor"),
        (
            "Llama 3",
            {"scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
            "original_max_position_embeddings",
        ),
    ],
)
def test_other_rules_in_a_gguf_are_named(tmp_path, name, changed, subject):
    report = converted(*both_of(name, tmp_path, changed))
    assert [e.subject for e in report.entries if e.severity == "deviation"] == [subject]


@needs("gguf")
def test_factors_are_settings_also_where_their_rule_is_not_known(tmp_path, monkeypatch):
    def unknown(contents):
        raise FormatError(contents.path, "model", "one", "another", "none")

    monkeypatch.setattr("minilora.audit.containers.gguf.read_config", unknown)
    folder, file = both_of("Llama 3", tmp_path)
    assert converted(folder, file).exit_status == 0
    (tmp_path / "b").mkdir()
    changed = {"scaling": RopeScaling(4.0, 1.0, 4.0, 64)}
    _, other = both_of("Llama 3", tmp_path / "b", changed)
    assert converted(file, file).exit_status == 0
    wrong = [e.subject for e in converted(file, other).entries if e.severity == "deviation"]
    assert wrong == ["rope_factors"]


@needs("gguf")
def test_norms_that_lack_their_one_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.io.formats.gguf.write.one_added", lambda c, name: False)
    report = converted(*both_of("Gemma 3", tmp_path))
    wrong = [e.subject for e in report.entries if e.severity == "deviation"]
    assert len(wrong) == 6 * 3 + 1
    assert all("norm" in subject for subject in wrong)


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    with pytest.raises(FormatError, match="beside"):
        converted(write_peft(tmp_path / "a"), write_base(tmp_path / "b"))
    with pytest.raises(FormatError):
        converted(write_peft(tmp_path / "a"), tmp_path / "nothing")


def test_the_command_says_what_the_function_says(tmp_path, capsys):
    a = write_peft(tmp_path / "a", said=settings(use_rslora=True))
    b = write_mlx(tmp_path / "b")
    file = tmp_path / "report.json"
    command = ["audit", "converted", "--from", str(a), "--to", str(b), "--json", str(file)]
    assert main(command) == 1
    assert "use_rslora" in capsys.readouterr().out
    assert json.loads(file.read_text())["audit"] == "converted"
    assert main(["audit", "converted", "--from", str(a), "--to", str(a)]) == 0
    assert main(["audit", "converted", "--from", str(a), "--to", str(tmp_path / "x")]) == 3
