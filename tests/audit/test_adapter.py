"""``minilora audit adapter``: what is wrong with a folder, and what libraries make of it."""

import json

import ml_dtypes
import numpy as np
import pytest
from adapter_folders import (
    ALPHA,
    VOCABULARY,
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
from calculus import gamma
from extras import needs, optional

from minilora.audit.adapter import adapter
from minilora.audit.adapter_libraries import known_libraries
from minilora.audit.stored.size import core, effective_rank, singular_values
from minilora.cli.main import main
from minilora.io.errors import FormatError

FIRST = next(iter(modules()))
A, B = f"base_model.model.{FIRST}.lora_A.weight", f"base_model.model.{FIRST}.lora_B.weight"


def found(report, *, least="warning"):
    """The verdicts and mistakes of all entries that are worse than a note."""
    severities = {"warning": ("deviation", "undecided", "warning"), "note": ("note",)}[least]
    return {(e.verdict, e.mistake) for e in report.entries if e.severity in severities}


def test_a_right_adapter_is_right(tmp_path):
    report = adapter(write_peft(tmp_path))
    assert found(report) == set()
    assert report.exit_status == 0
    fine = {entry.subject for entry in report.entries if entry.verdict == "fine"}
    assert fine > set(modules())
    assert report.bytes_read == sum(array.nbytes for array in tensors().values())


def first_rows(n):
    """Tensors of one process of n: the rows of B that the others have are 0."""
    pairs = factors()
    for _, B in pairs.values():
        B[-(-len(B) // n) :] = 0
    return tensors(pairs)


def test_the_rows_of_one_process_alone_are_told(tmp_path):
    assert found(adapter(write_peft(tmp_path / "2", first_rows(2)))) == {("wrong", "one-shard")}
    stored = first_rows(2)
    stored[B][-1] = 0.5  # one module has its last row: they were not parted
    assert found(adapter(write_peft(tmp_path / "1", stored))) == set()


@pytest.mark.parametrize("part", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_names_of_a_wrapped_module_are_told(tmp_path, part):
    stored = renamed(lambda name: name.replace("base_model.model.", f"base_model.model.{part}."))
    assert ("wrong", "wrapped") in found(adapter(write_peft(tmp_path, stored)))


def test_settings_without_a_type_are_told(tmp_path):
    said = {key: value for key, value in settings().items() if key != "peft_type"}
    assert found(adapter(write_peft(tmp_path, said=said))) == {("wrong", "no-peft-type")}


def test_a_part_of_the_layers_is_told(tmp_path):
    base = write_base(tmp_path / "base")
    stored = {name: array for name, array in tensors().items() if ".layers.0." in name}
    some = adapter(write_peft(tmp_path / "a", stored), base)
    assert found(some) == {("doubtful", "partly-saved")}
    only = settings(layers_to_transform=[0])
    assert found(adapter(write_peft(tmp_path / "a", stored, only), base)) == set()


def without(name, of=None):
    stored = tensors() if of is None else of
    return {key: array for key, array in stored.items() if key != name}


def renamed(change):
    return {change(name): array for name, array in tensors().items()}


def with_entry(name, at, value):
    stored = tensors()
    stored[name][at] = value
    return stored


def lists(name, **said):
    return {**settings(), name: said}


SMALL = np.ones((D, D), np.float32)
HEAD = {"base_model.model.lm_head.weight": np.ones((VOCABULARY, D), np.float32)}
WRONG = {
    "no B": (without(B), {}, ("wrong", "incomplete")),
    "no A": (without(A), {}, ("wrong", "incomplete")),
    "B of another rank": (
        tensors() | {B: np.ones((D, R + 1), np.float32)}, {}, ("wrong", "incomplete")
    ),
    "A is a vector": (tensors() | {A: np.ones(D, np.float32)}, {}, ("wrong", "incomplete")),
    "A of no rows": (tensors() | {A: np.ones((0, D), np.float32)}, {}, ("wrong", "incomplete")),
    "NaN": (with_entry(A, (0, 0), np.nan), {}, ("corrupt", "")),
    "infinite": (with_entry(B, (1, 2), np.inf), {}, ("corrupt", "")),
    "B is 0": (tensors() | {B: np.zeros((D, R), np.float32)}, {}, ("doubtful", "untrained")),
    "A is 0": (tensors() | {A: np.zeros((R, D), np.float32)}, {}, ("doubtful", "untrained")),
    "alpha is 0": (tensors(), {"lora_alpha": 0}, ("doubtful", "scale-0")),
    "whole numbers": (tensors() | {A: np.ones((R, D), np.int8)}, {}, ("doubtful", "dtype")),
    "no tensors": ({"x": np.ones(1, np.float32)}, {}, ("wrong", "empty")),
    "a tensor of nothing": (tensors() | {"base_model.model.x": SMALL}, {}, ("wrong", "")),
    "no prefix": (renamed(lambda n: n.removeprefix("base_model.model.")), {}, ("wrong", "prefix")),
    "an adapter's name": (
        renamed(lambda n: n.replace(".weight", ".default.weight")), {}, ("wrong", "adapter-name")
    ),
    "another r": (tensors(), {"r": R + 1}, ("wrong", "rank")),
    "another rank by a pattern": (tensors(), {"rank_pattern": {"up_proj": 2}}, ("wrong", "rank")),
    "a pattern for nothing": (
        tensors(), {"alpha_pattern": {"k_proj": 2}}, ("doubtful", "pattern-fits-nothing")
    ),
    "two patterns": (
        tensors(), {"alpha_pattern": {"up_proj": 2, "mlp.up_proj": 3}},
        ("doubtful", "pattern-fits-two"),
    ),
    "a target too few": (tensors(), {"target_modules": ["q_proj"]}, ("wrong", "not-targeted")),
    "an expression that fits nothing": (
        tensors(), {"target_modules": ".*k_proj"}, ("wrong", "not-targeted")
    ),
    "layers too few": (tensors(), {"layers_to_transform": [0]}, ("wrong", "not-targeted")),
    "no expression": (tensors(), {"target_modules": "(("}, ("wrong", "targets")),
    "a target too many": (
        tensors(), {"target_modules": ["q_proj", "up_proj", "down_proj", "v_proj"]},
        ("doubtful", "target-fits-nothing"),
    ),
    "a head that is not there": (
        tensors(), {"modules_to_save": ["lm_head"]}, ("wrong", "saved-missing")
    ),
    "a head that is not told": (tensors() | HEAD, {}, ("wrong", "saved-untold")),
    "a bias that is not told": (
        tensors() | {f"base_model.model.{FIRST}.bias": np.ones(D, np.float32)}, {},
        ("wrong", "bias-untold"),
    ),
    "DoRA without magnitudes": (tensors(), {"use_dora": True}, ("wrong", "variant")),
    "magnitudes without DoRA": (
        tensors() | {f"base_model.model.{FIRST}.lora_magnitude_vector": np.ones(D, np.float32)},
        {}, ("wrong", "variant"),
    ),
    "a magnitude of another size": (
        tensors() | {f"base_model.model.{FIRST}.lora_magnitude_vector": np.ones(D + 1, np.float32)},
        {}, ("wrong", "incomplete"),
    ),
    "lora_bias without biases": (tensors(), {"lora_bias": True}, ("wrong", "variant")),
    "biases without lora_bias": (
        tensors() | {B.replace("weight", "bias"): np.ones(D, np.float32)}, {}, ("wrong", "variant")
    ),
    "an unknown kind": (tensors(), {"peft_type": "LOHA"}, ("undecided", "")),
    "another function": (tensors(), {"use_qalora": True}, ("undecided", "")),
    "PiSSA": (tensors(), {"init_lora_weights": "pissa"}, ("doubtful", "start")),
}  # fmt: skip
"""Tensors, settings that differ, and the verdict and mistake that have to be found."""


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_found(tmp_path, case):
    stored, said, expected = WRONG[case]
    report = adapter(write_peft(tmp_path, stored, settings(**said)))
    assert expected in found(report)
    assert report.exit_status == {"undecided": 4, "doubtful": 0}.get(expected[0], 1)


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (tensors(), {"target_modules": r".*\.(q_proj|up_proj|down_proj)"}),
        (tensors(), {"target_modules": "all-linear"}),
        (tensors(), {"layers_to_transform": [0, 1]}),
        (tensors(), {"alpha_pattern": {"up_proj": 2, "down_proj": 3}}),
        (tensors(), {"use_rslora": True}),
        (tensors(factors(dtype=np.float16)), {}),
        (tensors(factors(dtype=ml_dtypes.bfloat16)), {}),
        (tensors() | HEAD, {"modules_to_save": ["lm_head"]}),
        (
            tensors() | {"base_model.model.score.weight": np.ones((2, D), np.float32)},
            {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
        ),
        (
            tensors() | {B.replace("lora_B.weight", "base_layer.bias"): np.ones(D, np.float32)},
            {"bias": "all"},
        ),
    ],
)
def test_what_is_right_is_not_accused(tmp_path, stored, said):
    report = adapter(write_peft(tmp_path, stored, settings(**said)))
    wrong = [e for e in report.entries if e.severity in ("deviation", "undecided")]
    assert wrong == []
    own = {e.mistake for e in report.entries if e.severity == "warning"}
    assert all("." in mistake for mistake in own)  # ids of findings


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_reference_adapters_are_whole_and_fit_their_bases(name):
    report = adapter(f"reference:{name}", f"reference:{name}")
    assert report.exit_status == 0
    own = {e.mistake for e in report.entries if e.severity == "warning"}
    assert all("." in mistake for mistake in own)
    shares = [e.figures["share"] for e in report.entries if "share" in e.figures]
    assert shares
    assert all(share > 0 for share in shares)


def norm_error(a, b, rounded=0):
    """How far ‖B A‖ may be off, relatively, where it is formed of A Aᵀ and Bᵀ B.

    Both round as often as their sums have terms, their product and its eigenvalues as often as it
    has entries, and ``rounded`` times more is what it is compared with: in parts of ‖A‖²‖B‖²
    (Higham 2002, section 3.5), which cancellation in B A makes more of.
    """
    (r, n), m = a.shape, len(b)
    lost = (np.linalg.norm(a) * np.linalg.norm(b) / np.linalg.norm(b @ a)) ** 2
    return gamma(n + m + 2 * r * r + rounded) * lost


def test_a_norm_and_its_share_are_those_of_the_product(tmp_path):
    base = write_base(tmp_path / "base")
    report = adapter(write_peft(tmp_path / "adapter"), base)
    (entry,) = (e for e in report.entries if e.subject == FIRST)
    a, b = (x.astype(np.float64) for x in factors()[FIRST])
    norm = np.linalg.norm(ALPHA / R * b @ a)
    error = norm_error(a, b, R + a.shape[1] * len(b))
    assert entry.figures["norm"] == pytest.approx(norm, rel=error)
    from safetensors.numpy import load_file

    W = load_file(base / "model.safetensors")[f"{FIRST}.weight"].astype(np.float64)
    error += gamma(2 * W.size)
    assert entry.figures["share"] == pytest.approx(norm / np.linalg.norm(W), rel=error)


def test_the_core_has_the_singular_values_of_the_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5)), rng.standard_normal((7, 3))
    assert core(a, b).shape == (3, 3)
    σ = np.linalg.svd(b @ a, compute_uv=False)[:3]
    # σ² is off by a few units in the last place of the greatest: σ by the root of that.
    np.testing.assert_allclose(singular_values([(a, b)]), σ, rtol=0, atol=2**-24 * σ[0])
    np.testing.assert_allclose(np.linalg.svd(core(a, b), compute_uv=False), σ, rtol=2**-40)
    huge = singular_values([(2.0**600 * a, 2.0**-500 * b)])
    np.testing.assert_allclose(huge, 2.0**100 * σ, rtol=0, atol=2.0**76 * σ[0])
    assert effective_rank(np.array([2.0, 2, 2])) == pytest.approx(3)
    assert effective_rank(np.array([2.0, 0])) == 1
    assert effective_rank(np.zeros(2)) == 0


def test_an_unused_rank_is_told(tmp_path):
    stored = tensors()
    stored[B][:, 1:] = 0
    report = adapter(write_peft(tmp_path, stored))
    (entry,) = (e for e in report.entries if e.mistake == "unused-rank")
    assert (entry.subject, entry.figures["effective_rank"]) == (FIRST, 1)


@pytest.mark.parametrize(
    ("tied", "drop", "config", "more", "expected"),
    [
        (False, (), {}, {}, None),
        (False, (f"{FIRST}.weight",), {}, {}, ("wrong", "no-module")),
        (True, (), {}, {"lm_head": (D, VOCABULARY)}, ("doubtful", "tied")),
        (False, (), {}, {"lm_head": (VOCABULARY + 1, D)}, ("wrong", "shape")),
    ],
)
def test_what_does_not_fit_the_base_is_found(tmp_path, tied, drop, config, more, expected):
    pairs = factors()
    for at, (m, n) in more.items():
        pairs[at] = np.ones((R, n), np.float32), np.ones((m, R), np.float32)
    targets = [*settings()["target_modules"], *more]
    folder = write_peft(tmp_path / "a", tensors(pairs), settings(target_modules=targets))
    report = adapter(folder, write_base(tmp_path / "b", tied, drop, **config))
    of_base = {each for each in found(report) if "." not in each[1]}
    assert of_base == ({expected} if expected else set())


def test_an_adapter_of_another_model_is_named_as_that(tmp_path):
    folder = write_peft(
        tmp_path / "a", renamed(lambda n: n.replace("model.layers", "transformer.h"))
    )
    report = adapter(folder, write_base(tmp_path / "b"))
    assert ("wrong", "other-model") in found(report)
    assert "another model's" in report.cause


def test_an_untrained_adapter_is_named_as_that(tmp_path):
    pairs = {at: (a, np.zeros_like(b)) for at, (a, b) in factors().items()}
    report = adapter(write_peft(tmp_path, tensors(pairs)))
    assert "untrained" in report.cause
    assert report.exit_status == 0


MISMEANT = [
    # settings, tensors, library, finding, verdict, factor
    ({"use_rslora": True}, {}, "sglang", "sglang.one-scale", "factor", 0.5),
    ({"use_rslora": True}, {}, "llama-cpp", "llama-cpp.one-alpha", "factor", 0.5),
    ({"use_rslora": True}, {}, "tensorrt-llm==0.10.0", "tensorrt-llm.rslora", "factor", 0.5),
    ({"alpha_pattern": {"up_proj": 2}}, {}, "sglang", "sglang.one-scale", "factor", 4),
    ({"alpha_pattern": {"up_proj": 2}}, {}, "tensorrt-llm", "tensorrt-llm.one-alpha", "factor", 4),
    ({"alpha_pattern": {"up_proj": 2}}, {}, "llama-cpp", "llama-cpp.one-alpha", "factor", 4),
    ({"modules_to_save": ["lm_head"]}, HEAD, "sglang", "sglang.left-out", "wrong", None),
    ({"modules_to_save": ["lm_head"]}, HEAD, "vllm", "vllm.refused", "wrong", None),
    ({"modules_to_save": ["lm_head"]}, HEAD, "llama.cpp", "llama-cpp.refused", "wrong", None),
    ({"init_lora_weights": "pissa"}, {}, "sglang", "sglang.start", "undecided", None),
    ({"init_lora_weights": "pissa"}, {}, "vllm", "vllm.refused", "wrong", None),
    ({"init_lora_weights": "olora"}, {}, "llama-cpp", "llama-cpp.start", "undecided", None),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "peft", "peft.pissa-niter", "wrong", None),
    ({"peft_type": "ADALORA", "init_r": R}, {}, "sglang", "sglang.refused", "wrong", None),
    (
        {"alpha_pattern": {"up_proj": 2, "mlp.up_proj": 3}}, {}, "peft", "peft.pattern-order",
        "undecided", None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("said", "more", "library", "finding", "verdict", "factor"), MISMEANT)
def test_a_library_that_computes_something_else_is_told(
    tmp_path, said, more, library, finding, verdict, factor
):
    folder = write_peft(tmp_path, tensors() | more, settings(**said))
    (entry,) = (e for e in adapter(folder, None, [library]).entries if e.mistake == finding)
    assert (entry.verdict, entry.figures.get("factor")) == (verdict, factor)
    assert entry.severity in ("deviation", "undecided")
    beside = [e for e in adapter(folder).entries if e.mistake == finding]
    assert [e.severity for e in beside] in (["warning"], ["note"])  # of what nobody asked for


@pytest.mark.parametrize(
    ("said", "library"),
    [
        ({"use_rslora": True}, "vllm"),
        ({"use_rslora": True}, "tensorrt-llm==0.12"),
        ({"alpha_pattern": {"up_proj": 2}}, "vllm"),
        ({"rank_pattern": {"up_proj": R}}, "sglang"),
        ({"init_lora_weights": "gaussian"}, "llama-cpp"),
        ({"init_lora_weights": "pissa"}, "peft"),
        ({"modules_to_save": []}, "sglang"),
        ({"bias": "none"}, "vllm"),
    ],
)
def test_a_library_that_is_right_is_not_accused(tmp_path, said, library):
    report = adapter(write_peft(tmp_path, said=settings(**said)), None, [library])
    said = [e for e in report.entries if e.mistake.startswith(library.partition("==")[0])]
    assert all(e.severity == "note" for e in said)
    assert report.exit_status == 0


def test_dora_is_loaded_by_transformers_without_its_magnitude(tmp_path):
    magnitudes = {
        f"base_model.model.{at}.lora_magnitude_vector": np.ones(m, np.float32)
        for at, (m, _) in modules().items()
    }
    folder = write_peft(tmp_path, tensors() | magnitudes, settings(use_dora=True))
    report = adapter(folder, None, ["transformers", "peft", "vllm"])
    verdicts = {e.mistake: e.verdict for e in report.entries if "." in e.mistake}
    assert verdicts["transformers.dora-magnitude"] == "wrong"
    assert verdicts["vllm.refused"] == "wrong"
    assert verdicts["peft.dora-in-a-row"] == "told"
    assert not any(e.mistake == "variant" for e in report.entries)


def test_names_that_the_base_lacks_are_told_of_each_library(tmp_path):
    folder = write_peft(
        tmp_path / "a", renamed(lambda n: n.replace("model.layers", "model.lm.layers"))
    )
    report = adapter(folder, write_base(tmp_path / "b"), ["peft", "transformers", "vllm"])
    ids = {e.mistake for e in report.entries if e.verdict == "wrong"}
    assert {"peft.names-fit-nothing", "transformers.names-fit-nothing", "vllm.prefix"} <= ids


def test_a_finding_of_another_release_is_not_said_of_this_one(tmp_path):
    folder = write_peft(tmp_path, said=settings(use_rslora=True))
    report = adapter(folder, None, ["sglang==0.4.0"])
    (entry,) = (e for e in report.entries if e.mistake == "sglang.one-scale")
    assert (entry.verdict, report.exit_status) == ("told", 0)
    assert "nothing is known" in entry.text


def test_a_refusal_is_all_that_is_said_of_a_library(tmp_path):
    folder = write_peft(tmp_path, said=settings(use_rslora=True, use_dora=True))
    report = adapter(folder, None, ["sglang"])
    ids = {e.mistake for e in report.entries if e.mistake.startswith("sglang")}
    assert ids == {"sglang.refused"}


def test_folders_of_mlx_lm_are_read(tmp_path):
    report = adapter(write_mlx(tmp_path / "right"), write_base(tmp_path / "base"), ["mlx-lm"])
    assert (found(report), report.exit_status) == (set(), 0)
    norms = {e.subject: e.figures["norm"] for e in report.entries if "norm" in e.figures}
    peft = adapter(write_peft(tmp_path / "peft"))
    assert norms == {e.subject: e.figures["norm"] for e in peft.entries if "norm" in e.figures}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rank": R + 1}, ("wrong", "rank")),
        ({"keys": ["mlp.up_proj"]}, ("wrong", "not-targeted")),
        ({"keys": [*("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj", "mlp.x")]},
         ("doubtful", "target-fits-nothing")),
        ({"alpha": 2 * R}, ("doubtful", "mlx-lm.alpha")),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_folder_of_mlx_lm_is_found(tmp_path, parameters, expected):
    assert expected in found(adapter(write_mlx(tmp_path, **parameters)))


def test_a_missing_factor_of_mlx_lm_is_told_of_it(tmp_path):
    from safetensors.numpy import load_file, save_file

    file = write_mlx(tmp_path) / "adapters.safetensors"
    save_file(without(f"{FIRST}.lora_a", load_file(file)), file)
    assert {("wrong", "incomplete"), ("wrong", "mlx-lm.missing-factor")} <= found(
        adapter(tmp_path, None, ["mlx-lm"])
    )


def test_files_of_kohya_are_read(tmp_path):
    base = write_base(tmp_path / "base")
    report = adapter(write_kohya(tmp_path / "right.safetensors"), base, ["lycoris"])
    assert (found(report), report.exit_status) == (set(), 0)
    report = adapter(write_kohya(tmp_path / "no.safetensors", alpha=None), base, ["lycoris"])
    assert ("wrong", "lycoris.no-alpha") in found(report)
    other = {at.replace("layers", "stages"): pair for at, pair in factors().items()}
    report = adapter(write_kohya(tmp_path / "other.safetensors", other), base, ["lycoris"])
    assert {("wrong", "other-model"), ("wrong", "lycoris.names")} <= found(report)


def test_files_of_loralib_are_read_and_have_no_scale(tmp_path):
    report = adapter(write_loralib(tmp_path / "a.safetensors"), write_base(tmp_path / "base"))
    assert (found(report), report.exit_status) == (set(), 0)
    assert ("told", "no-alpha") in found(report, least="note")


@needs("gguf")
def test_gguf_files_are_read(tmp_path):
    file = tmp_path / "a.gguf"
    to = ["--to", "gguf", "--output", str(file)]
    assert main(["convert", "--model", "reference:llama", *to, "reference:llama"]) == 0
    report = adapter(file, "reference:llama", ["llama-cpp"])
    assert report.exit_status == 0
    assert sum("share" in e.figures for e in report.entries) > 0


@pytest.mark.slow
def test_an_adapter_that_peft_saved_is_right(tmp_path):
    torch, peft = optional("torch"), optional("peft")
    layers = torch.nn.ModuleDict(
        {
            "q": torch.nn.Linear(4, 6),
            "conv": torch.nn.Conv2d(2, 3, 3),
            "e": torch.nn.Embedding(5, 4),
        }
    )
    config = peft.LoraConfig(target_modules=["q", "conv", "e"], r=2, use_rslora=True)
    model = peft.get_peft_model(layers, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    report = adapter(tmp_path, None, ["peft"])
    assert (found(report), report.exit_status) == (set(), 0)
    for at, layer in (("q", model.q), ("conv", model.conv), ("e", model.e)):
        (entry,) = (e for e in report.entries if e.subject == at)
        delta = layer.double().get_delta_weight("default").detach()
        a, b = (p.detach().flatten(1) for name, p in layer.named_parameters() if "lora" in name)
        error = norm_error(a.numpy(), b.numpy(), len(a) + delta.numel())
        assert entry.figures["norm"] == pytest.approx(float(delta.norm()), rel=error)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"peft_type": "LORA"}'),
        ("adapter_config.json", b'{"r": 4, "lora_alpha": "x"}'),
        ("adapter_config.json", b'{"r": 4, "lora_alpha": 8, "rank_pattern": {"((": 3}}'),
        ("adapter_config.json", b'{"r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": "x"}}'),
        ("adapter_config.json", b'{"r": true, "lora_alpha": 8}'),
        ("adapter_model.safetensors", b"\xff" * 64),
        ("adapter_model.safetensors", b""),
    ],
)
def test_what_cannot_be_read_is_an_error_with_a_remedy(tmp_path, name, data):
    write_peft(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError):
        adapter(tmp_path)
    assert main(["audit", "adapter", str(tmp_path)]) == 3


def test_a_pickle_is_never_opened(tmp_path):
    write_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        adapter(tmp_path)


def test_the_command_says_what_the_function_says(tmp_path, capsys):
    folder = write_peft(tmp_path / "a", said=settings(use_rslora=True))
    file = tmp_path / "report.json"
    arguments = ["audit", "adapter", str(folder), "--for", "sglang,vllm", "--json", str(file)]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "SGLang" in said
    assert "0.5 of the intended effect" in " ".join(said.split())
    report = json.loads(file.read_text())
    assert report["audit"] == "adapter"
    assert main(["audit", "adapter", str(folder), "--for", "nothing"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in known_libraries())
