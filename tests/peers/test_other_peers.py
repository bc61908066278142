"""The peers of one short file: what they have holds or is known, and wrong on purpose is caught.

Only what they need is installed is run, and a part of the checks: `minilora verify NAME` has all.
"""

import importlib
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from extras import optional

from minilora.verify import check
from minilora.verify.checks.registry import CHECKS
from minilora.verify.implementation.contract import has_method
from minilora.verify.peers import PEERS, _formula
from minilora.verify.seen import read_seen

DTYPES = {
    "torch": ("float16",),
    "mlx-lm": ("float64", "bfloat16"),
    "bitsandbytes": ("bfloat16",),
    "litgpt": ("float64",),
    "lycoris": ("float32",),
    "keras": ("float32",),
    "keras-constructor": ("float32",),
}
"""Of these peers all checks of all levels are run; peft's and loralib's have tests of their own."""

# JAX compiles anew for each shape: a few cases, of all methods and kinds of layer.
OF_FLAX = ("linear.forward.bias:float64:1", "linear.vjp:float32:1", "init.distribution:float32:0")
OF_JAX = (
    "linear.forward:float64:1",
    "linear.vjp.bias:float16:1",
    "linear.vjp.all:float64:2",
    "merge.weight.rslora:bfloat16:1",
    "variants.dora.vjp.dropout:float32:1",
    "variants.lora-bias.forward:float32:0",
    "combine.weighted:float32:1",
    "combine.svd:float16:0",
    "multi.forward:float32:1",
)


OF_KERNELS = (
    "linear.vjp.dropout:float32:1",
    "variants.lora-bias.vjp:float16:1",
    "precision.vjp:bfloat16:0",
)

OF_ADAPTERS = (
    "linear.vjp.all:float32:1",
    "merge.weight:float64:1",
    "variants.dora.forward:float32:0",
    "init.distribution:float32:0",
)

FEW = {
    "adapters": OF_ADAPTERS,
    "jax": OF_JAX,
    "flax": OF_FLAX,
    "axolotl": OF_KERNELS,
    "unsloth": OF_KERNELS,
}
SMALL = (*DTYPES, *FEW)


def loaded(name):
    """A peer's implementation, or a skip where its library is not installed."""
    try:
        return PEERS[name].load()
    except ModuleNotFoundError as error:
        extra = PEERS[name].extra
        pytest.skip(f"{error.name} is not installed: pip install 'minilora[{extra}]'")


def imported(name):
    """The module of a peer's implementation."""
    return importlib.import_module(type(loaded(name)).__module__)


def results(name, *cases):
    peer = loaded(name)
    reports = [check(peer, case=case) for case in cases]
    if not cases:
        levels = [level for level in PEERS[name].levels if level not in ELSEWHERE]
        how = {"levels": levels, "dtypes": DTYPES[name]}
        reports = [check(peer, **how)]
    return [result for report in reports for result in report.results]


ELSEWHERE = {"inference", "module"}
"""Levels with tests of their own, which take other cases."""


def test_torchs_own_modules_hold_in_the_quick_profile():
    report = check(loaded("torch"), levels=["module"], profile="quick")
    found = {result.check: result.status for result in report.results if "drop" not in result.check}
    assert found.pop("module.linear.evaluation") == "skip"
    assert {*found.values()} == {"pass"}


@pytest.mark.parametrize("name", SMALL)
def test_all_that_a_peer_has_holds_or_is_known(name):
    found = results(name, *FEW.get(name, ()))
    assert {result.status for result in found} <= {"pass", "known", "skip"}
    assert {result.level for result in found if result.status != "skip"} == {
        *PEERS[name].levels
    } - ELSEWHERE
    skipped = [result.reason for result in found if result.status == "skip"]
    assert all("no settings" in reason or "no method" in reason for reason in skipped)


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_known_deviation_is_one_of_a_check_that_there_is(peer):
    asked = {f"{c.id}:{d}" for c in CHECKS if c.level in peer.levels for d in peer.dtypes}
    for pattern in peer.known:
        pattern = pattern if ":" in pattern else f"{pattern}:*"
        assert any(fnmatchcase(each, pattern) for each in asked), pattern


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_a_known_deviation_says_what_was_seen(peer):
    for pattern, entry in peer.known.items():
        assert read_seen(entry["seen"]), pattern


def without_scale(self, x):
    return self.linear(x) + (self.dropout(x) @ self.lora_a) @ self.lora_b


def spoil_rslora(monkeypatch):
    monkeypatch.setattr(optional("peft.tuners.lora.layer").math, "sqrt", lambda r: r)


def spoil_loralib(monkeypatch):
    layer = optional("loralib").layers.LoRALayer
    right = layer.__init__

    def doubled(self, r, lora_alpha, **others):
        right(self, r=r, lora_alpha=2 * lora_alpha, **others)

    monkeypatch.setattr(layer, "__init__", doubled)


def spoil_torch(monkeypatch):
    monkeypatch.setattr(_formula, "scale", lambda *, alpha, **_: alpha)


def spoil_jax(monkeypatch):
    jax = optional("jax")
    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "stop_gradient", lambda x: x)


def spoil_mlx(monkeypatch):
    layer = optional("mlx_lm.tuner.lora").LoRALinear
    monkeypatch.setattr(layer, "__call__", without_scale)


def spoil_bitsandbytes(monkeypatch):
    functional = optional("bitsandbytes.functional")
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: 2 * right(*a, **k))


def spoil_axolotl(monkeypatch):
    monkeypatch.setattr(optional("axolotl.kernels.lora"), "dequantize", lambda W, *_: 2 * W)


def spoil_unsloth(monkeypatch):
    kernels = imported("unsloth").fast_lora
    monkeypatch.setattr(kernels, "fast_dequantize", lambda W, *_, **__: 2 * W)


@pytest.mark.parametrize(
    ("name", "spoil", "case", "arrays"),
    [
        ("axolotl", spoil_axolotl, "linear.vjp:float32:1", {"y", "dx"}),
        ("unsloth", spoil_unsloth, "linear.vjp:float32:1", {"dx"}),
        ("peft", spoil_rslora, "linear.vjp.rslora:float64:1", {"y", "dx", "dA", "dB"}),
        ("loralib", spoil_loralib, "linear.vjp:float64:1", {"y", "dx", "dA", "dB"}),
        ("torch", spoil_torch, "linear.vjp:float64:1", {"y", "dx", "dA", "dB"}),
        ("jax", spoil_jax, "variants.dora.vjp:float32:0", {"dA", "dB"}),
        ("mlx-lm", spoil_mlx, "linear.vjp:float32:1", {"y", "dx", "dA", "dB"}),
        ("bitsandbytes", spoil_bitsandbytes, "linear.vjp:float16:1", {"dx"}),
    ],
)
def test_a_library_made_wrong_on_purpose_is_caught(name, spoil, case, arrays, monkeypatch):
    imported(name)
    assert [result.status for result in results(name, case)] == ["pass"]
    with monkeypatch.context() as patch:
        spoil(patch)
        (result,) = results(name, case)
    if name == "jax":  # what was compiled is wrong, too
        importlib.import_module("jax").clear_caches()
    assert result.status == "fail"
    assert {each.array for each in result.arrays if each.verdict == "fail"} == arrays


def spoil_vllm(monkeypatch):
    monkeypatch.setattr(optional("vllm.lora.peft_helper").math, "sqrt", lambda r: r)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("name", "case", "spoil"),
    [
        ("vllm", "inference.deltas.rslora:float32:0", spoil_vllm),
        ("vllm", "multi.forward:float32:0", None),
        ("mlx-lm", "inference.logits.dora:float32:0", None),
        ("mlx-lm", "inference.logits.head:float32:0", spoil_mlx),
        ("transformers", "inference.logits.rslora:float32:0", spoil_rslora),
        ("peft", "inference.deltas.rslora:float32:0", spoil_rslora),
        ("peft", "inference.logits.rslora:float32:0", spoil_rslora),
        ("peft", "inference.logits.modules-to-save:float32:0", None),
        ("loralib", "inference.logits.patterns:float32:0", None),
    ],
)
def test_a_stored_adapter_has_its_effect(name, case, spoil, monkeypatch):
    imported(name)
    assert [result.status for result in results(name, case)] == ["pass"]
    if spoil is not None:
        spoil(monkeypatch)
        assert [result.status for result in results(name, case)] == ["fail"]


@pytest.mark.parametrize("name", SMALL)
def test_settings_that_a_peer_lacks_are_not_supported(name):
    x = np.ones((1, 2), np.float32)
    given = {"alpha": 1.0, "r": 1, "use_unicorns": True}
    with pytest.raises(NotImplementedError, match="use_unicorns"):
        loaded(name).lora_linear(x, x, x, x[:, :1], **given)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_a_weight_of_which_every_entry_has_a_block_survives_four_bits():
    module = imported("bitsandbytes")
    peer = loaded("bitsandbytes")
    W = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    none = {"A": np.zeros((1, 5), np.float32), "B": np.zeros((3, 1), np.float32)}
    assert (peer.merge(W, **none, alpha=1.0, r=1) == W).all()
    # Negative control: entries that share a block do not.
    packed = module.bitsandbytes.functional.quantize_4bit(
        module.torch.from_numpy(np.resize(W, (3, 64))), quant_type="nf4"
    )
    together = module.bitsandbytes.functional.dequantize_4bit(*packed).numpy()
    assert (together != np.resize(W, (3, 64))).any()


def test_mlx_asks_for_the_mask_that_it_is_given():
    peer = loaded("mlx-lm")
    x = np.ones((1, 2), np.float32)
    given = {"alpha": 1.0, "r": 1, "p": 0.25}
    peer.lora_linear(x, x, x, x[:, :1], keep=x > 0, **given)
    with pytest.raises(ValueError, match="asked to keep"):
        peer.lora_linear(x, x, x, x[:, :1], keep=x[:, :1] > 0, **given)


def test_weights_of_a_concatenation_may_round_where_the_scales_do_not():
    """0.7 s B is rounded though s is a power of two, and the check of combining knows it."""
    (result,) = results("torch", "combine.weighted:float16:7")
    assert result.status == "pass"


def test_every_peer_is_on_the_page():
    page = Path(__file__).parents[2] / "docs" / "how-to-verify.md"
    lines = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    for peer in PEERS.values():
        (line,) = [line for line in lines if f"`{peer.name}`" in line]
        assert all(f"`{extra}`" in line for extra in peer.extra.split(","))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_says_of_itself_what_its_value_says(name):
    peer, it = PEERS[name], loaded(name)
    assert (it.name, it.version) == (name, peer.version)
    has = {c.level for c in CHECKS if all(has_method(it, method) for method in c.needs)}
    assert set(peer.levels) <= has
