"""The sides of the bench do the same, by σ of rounding: losses, and what tokens are drawn by."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
from extras import optional

from minilora.spec.models import Batch, logits
from minilora.spec.optim import AdamState, adamw
from minilora.studies.bench.cases import NEW, PROMPT, RATE, SIZES, write_case
from minilora.studies.bench.minilora_side import MiniloraSide
from minilora.studies.bench.sides import SIDES, Missing, Side
from minilora.training.generate import generate
from minilora.training.gradients import gradients
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import noisy, spread
from minilora.verify.core.types import MONTE_CARLO, Comparison

FLOAT32 = Precision("float32", "float32")
STEPS, SAMPLES = 3, 12

quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("case")
    write_case(at, SIZES["tiny"])
    return at


def side(name, folder):
    """The side in this process, if its library is there."""
    module, _, of = SIDES[name].partition(":")
    for library in {"minilora": (), "jax": ("jax",)}.get(name, ("torch", "peft")):
        optional(library)
    return getattr(importlib.import_module(module), of)(str(folder), 1)


def wide(own):
    """All parameters in float64."""
    return {name: array.astype(np.float64) for name, array in (own.W | own.params).items()}


def rounded(W, draws):
    """The same, as the first operands of operations that round to float32."""
    return {name: noisy(array, FLOAT32, draws) for name, array in W.items()}


def losses(W, own, rate=RATE, tuning=None):
    """The losses before each of some steps, and after them, in the numbers of W."""
    found, state = [], AdamState()
    for _ in range(STEPS + 1):
        L, g = gradients(own.batch, W, own.c, tuning or own.tuning, own.plan)
        params, state = adamw({name: W[name] for name in g}, g, state, rate)
        W = W | params
        found.append(L)
    return found


def scaled(tuning, factor):
    return replace(tuning, scale={at: factor * s for at, s in tuning.scale.items()})


@pytest.fixture(scope="module")
def expected(folder):
    """The losses in float64, their σ in float32, and those of three mistakes."""
    own = MiniloraSide(str(folder), 1)
    W = wide(own)
    want = losses(W, own)

    def run(draws):
        return dict(zip("0123", losses(rounded(W, draws), own), strict=True))

    sigma = spread(run, dict(zip("0123", want, strict=True)), SAMPLES, [0])
    wrong = losses(W, own, rate=1.1 * RATE), losses(W, own, tuning=scaled(own.tuning, 0.5))
    return np.array(want), np.array([*sigma.values()]), [*wrong, [want[0]] * (STEPS + 1)]


def verdict(found, expected):
    want, sigma, _ = expected
    return Comparison("losses", np.array(found), want, sigma, MONTE_CARLO).judge().verdict


def agrees(one, expected):
    found = [one.step() for _ in range(STEPS)]
    return verdict([*found, one.forward()], expected) == "pass"


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("name", [name for name in SIDES if name != "torch-compile"])
def test_every_side_has_the_losses_of_the_same_steps(name, folder, expected, monkeypatch):
    monkeypatch.setenv("NPROC", "1")  # which JAX's side sets, and which is as it was afterwards
    assert agrees(side(name, folder), expected)


@pytest.mark.slow
def test_what_is_compiled_has_them_too(folder, expected):
    try:
        one = side("torch-compile", folder)
    except Missing as error:
        pytest.skip(str(error))
    assert agrees(one, expected)


@pytest.mark.slow
def test_another_rate_another_scale_and_no_step_are_seen(expected):
    assert [verdict(wrong, expected) for wrong in expected[-1]] == ["fail"] * 3


def drawn(own, W, tuning):
    prompt = own.batch.ids[0, :PROMPT].tolist()
    return prompt, [row[0] for row in generate([prompt], W, own.c, tuning, max_new_tokens=NEW)]


@quiet
def test_every_side_draws_the_tokens_of_float64(folder):
    """Each is ahead of the second by more than rounding to float32 is allowed to change."""
    own = MiniloraSide(str(folder), 1)
    W = wide(own)
    prompt, tokens = drawn(own, W, own.tuning)
    text = Batch(np.array([prompt + tokens[:-1]]))

    def z(W):
        return {"z": logits(text, W, own.c, own.tuning)[0][:, PROMPT - 1 :]}

    sigma = spread(lambda draws: z(rounded(W, draws)), z(W), SAMPLES, [0])["z"]
    *_, second, first = z(W)["z"].argsort(0)
    at = np.arange(NEW)
    ahead = z(W)["z"][first, at] - z(W)["z"][second, at]
    assert (ahead > MONTE_CARLO.max_z * (sigma[first, at] + sigma[second, at])).all()
    assert first.tolist() == tokens == own.generate()
    assert drawn(own, W, scaled(own.tuning, 0))[1] != tokens  # the base's
    for name in ("peft", "peft-warm"):
        assert side(name, folder).generate() == tokens


def test_without_a_compiler_there_is_nothing_compiled(folder, monkeypatch):
    optional("torch")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Missing, match=r"torch-compile cannot .* no-such-compiler is not installed"):
        Side("torch-compile", folder, threads=1)
