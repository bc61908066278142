"""A toy variant and a toy initialization, each one value, as `docs/contributing.md` says."""

from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, same_bits

import minilora as ml
from minilora.io.formats import peft
from minilora.spec.initialization import INITIALIZATIONS, Initialization
from minilora.spec.lora import lora_linear, merge_weight
from minilora.spec.optim import AdamState, adamw
from minilora.spec.variants import REGISTRY
from minilora.spec.variants.entry import LORA_TENSORS, Column, Entry, ExtendedVariant, Peft
from minilora.verify.properties.layer_kinds import KINDS
from minilora.verify.properties.variant_matrix import cell

# The module of the toy variant: its equation, its merge and its entry.


def gain_linear(x, W, b, A, B, gain, s, K=None):
    """y = W x + b + s (gain ∘ B) A (K ∘ x): a trained factor for each row of B."""
    y, back_lora = lora_linear(x, W, b, A, gain * B, s, K)

    def back(dy):
        dx, dA, d = back_lora(dy)
        return dx, dA, gain * d, (B * d).sum(1, keepdims=True)

    return y, back


def merge_gain(W, b, A, B, gain, s):
    return merge_weight(W, A, gain * B, s), b


GAIN = ExtendedVariant(
    ("A", "B", "gain"),
    gain_linear,
    merge_gain,
    columns={"gain": Column("m", 1.0)},
    factors=lambda A, B, gain: (A, gain * B, None),
    peft=Peft(setting="use_gain", tensors=LORA_TENSORS | {"gain": "lora_gain"}),
)
ENTRY = Entry(
    "Each row of B has a trained factor.",
    "a test",
    GAIN,
    trained=("A", "B", "gain"),
    breaks={"concatenation": "the factors of two adapters do not add"},
)
MODEL = ml.Llama(vocab=11, d=6, layers=2, heads=2, ffn=7, kv_heads=1, head_dim=2)
IDS = np.array([[1, 4, 2, 8, 5, 7]])
BATCH = ml.Batch(IDS, IDS)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGISTRY, "gain", ENTRY)  # the line in the registry


def injected(**settings):
    rng = np.random.default_rng(0)
    base = ml.draw_weights(MODEL, rng)
    lora = ml.LoraConfig(r=2, target_modules=["q", "down"], **settings)
    return base, lora, *ml.inject(base, lora, MODEL.linears(), rng)


def trained(W, tuning):
    """The weights after an optimizer step, and the loss before it."""
    value, back = ml.loss(BATCH, W, MODEL, tuning)
    gradients = back(1.0)
    assert gradients.keys() == tuning.trained
    params = {name: W[name] for name in tuning.trained}
    after, _ = adamw(params, gradients, AdamState(), lr=0.05)
    return {**W, **after}, value


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_laws_hold_on_every_kind_of_layer_as_the_entry_says(kind, monkeypatch):
    assert cell("gain", kind, library=False).good
    monkeypatch.setitem(REGISTRY, "gain", replace(ENTRY, breaks={}))
    assert cell("gain", kind, library=False).unexpected == ["concatenation"]


def test_a_wrong_gradient_is_refused(monkeypatch):
    def wrong(*arguments):
        y, back = gain_linear(*arguments)
        return y, lambda dy: (*back(dy)[:3], 2 * back(dy)[3])

    monkeypatch.setitem(REGISTRY, "gain", replace(ENTRY, variant=replace(GAIN, linear=wrong)))
    assert not cell("gain", "linear", library=False).good


def test_it_is_injected_trained_and_merged():
    base, lora, W, tuning = injected(variant="gain")
    assert tuning.variant["layers.0.q"] == lora.equation == GAIN
    assert (W["layers.0.q.gain"] == 1).all()
    assert same_bits(ml.logits(BATCH, W, MODEL, tuning)[0], base_logits(base))
    after, first = trained(W, tuning)
    again, second = trained(after, tuning)
    assert second < first
    z = ml.logits(BATCH, again, MODEL, tuning)[0]
    merged = ml.logits(BATCH, ml.merge(again, tuning), MODEL, ml.TrainableSpec())[0]
    assert abs(merged - z).max() <= GRADIENT * abs(z).max() < abs(z - base_logits(base)).max()


def base_logits(base):
    return ml.logits(BATCH, base, MODEL, ml.TrainableSpec())[0]


def test_it_is_written_and_read(tmp_path):
    _, lora, W, tuning = injected(variant="gain")
    after, _ = trained(W, tuning)
    peft.write_adapter(tmp_path, MODEL, after, tuning, lora)
    read, read_tuning = peft.read_adapter(tmp_path, MODEL)
    assert peft.read_lora_config(tmp_path, MODEL).variant == "gain"
    assert read_tuning == tuning
    assert read.keys() == tuning.trained
    assert all(same_bits(read[name], after[name]) for name in read)


def test_an_initialization_is_one_value(monkeypatch):
    def eye(rng, W, r, s):
        m, n = W.shape
        return W, np.eye(r, n), np.zeros((m, r))

    with pytest.raises(ValueError, match=r"^init_lora_weights 'eye'"):
        injected(init_lora_weights="eye")
    monkeypatch.setitem(INITIALIZATIONS, "eye", Initialization(eye))
    base, _, W, tuning = injected(init_lora_weights="eye")
    assert (W["layers.1.down.A"] == np.eye(2, 7)).all()
    assert same_bits(ml.logits(BATCH, W, MODEL, tuning)[0], base_logits(base))
