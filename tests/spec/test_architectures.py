"""The architectures beside the three: gradients by derivatives, and transformers with PEFT."""

import functools
import json
import warnings

import numpy as np
import pytest
from calculus import GRADIENT, directional, greatest, random_like, record_worst, relative_error
from extras import optional
from zoo import MORE_MODELS

import minilora as ml
from minilora import testing as draw
from minilora.io.architectures import architecture_of, module_paths
from minilora.io.files import read_json
from minilora.io.formats import peft as peft_format
from minilora.io.formats.huggingface import config_to_json, read_config, read_model, write_model
from minilora.spec.architectures import RopeScaling, heads
from minilora.spec.architectures.gemma3 import window_mask
from minilora.spec.initialization import draw_weights
from minilora.spec.lora import TrainableSpec
from minilora.spec.models import loss
from minilora.spec.ops import IGNORED
from minilora.training.generate import generate
from minilora.training.gradients import ExecutionPlan, gradients
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import noisy, spread

FLOAT32 = Precision("float32", "float32")
EVERY = pytest.mark.parametrize("name", MORE_MODELS)


@functools.cache
def case(name):
    """Adapters on every projection, dropout, padding on both sides; everything is trained."""
    return draw.draw_model(MORE_MODELS[name], np.random.default_rng(0), 3, 5, train_base=True)


@EVERY
def test_the_gradient_is_the_derivative_along_a_direction(name):
    model, rng = case(name), np.random.default_rng(1)
    direction = random_like(rng, model.W)
    wanted = directional(lambda W: model.loss(W)[0], model.W, direction)
    g = model.loss()[1](1.0)
    assert g.keys() == model.W.keys()
    found = sum((g[at] * v).sum() for at, v in direction.items())
    size = sum(abs(g[at] * v).sum() for at, v in direction.items())
    record_worst("more architectures, along a direction", error := abs(found - wanted) / size)
    assert error <= GRADIENT
    wrong = sum((g[at] * v).sum() for at, v in direction.items() if "norm" not in at)
    assert abs(wrong - wanted) / size > 1e6 * GRADIENT


@EVERY
def test_each_number_system_runs(name):
    """Rounding noise is small and there; long double is closer to float64 than float64's bound."""
    model = draw.draw_model(MORE_MODELS[name], np.random.default_rng(0), 2, 4, p=0.0)
    wanted = model.loss()[1](1.0)

    def gradients_of(W):
        return loss(model.batch, W, model.config, model.tuning)[1](1.0)

    def run(draws):
        return gradients_of({at: noisy(w, FLOAT32, draws) for at, w in model.W.items()})

    sigma = spread(run, wanted, 4, [0])
    size = max(map(greatest, wanted.values()))
    assert 0 < max(map(greatest, sigma.values())) < 1e-3 * size
    if name != "DistilBERT":  # SciPy's erf takes no long double
        long = gradients_of({at: w.astype(np.longdouble) for at, w in model.W.items()})
        assert {g.dtype for g in long.values()} == {np.dtype(np.longdouble)}
        assert all(greatest(long[at] - wanted[at]) <= 4 * GRADIENT * size for at in wanted)
    single = gradients_of({at: w.astype(np.float32) for at, w in model.W.items()})
    assert {g.dtype for g in single.values()} == {np.dtype(np.float32)}


@EVERY
@pytest.mark.parametrize("plan", [{"tokens": 5}, {"gradient_checkpointing": True}, {"threads": 2}])
def test_training_gives_the_gradients_of_the_specification(name, plan):
    model = case(name)
    L, back = model.loss()
    wanted = back(1.0)
    common = model.batch, model.W, model.config, model.tuning
    found_L, found = gradients(*common, ExecutionPlan(**plan))
    assert relative_error(found_L, L) <= 4 * GRADIENT
    bound = 4 * GRADIENT * max(map(greatest, wanted.values()))
    assert all(greatest(found[at] - wanted[at]) <= bound for at in wanted)


@pytest.mark.parametrize("name", [name for name, c in MORE_MODELS.items() if c.causal])
def test_cached_generation_is_that_of_the_whole_text(name):
    """Also beyond a window."""
    c = MORE_MODELS[name]
    W = draw_weights(c, np.random.default_rng(0), std=0.5)
    prompt = [3, 1, 4, 1, 5]
    drawn = [row[0] for row in generate([prompt], W, c, TrainableSpec(), max_new_tokens=6)]
    for i, token in enumerate(drawn):
        ids = np.array([prompt + drawn[:i]])
        z, _ = ml.logits(ml.Batch(ids), W, c, TrainableSpec())
        assert z[:, -1].argmax() == token


def test_heads_as_columns_and_back():
    x = np.arange(24.0).reshape(6, 4)
    columns = heads.heads_as_columns(x, 2)
    assert columns.shape == (3, 8)
    assert (columns[:, 4 + 1] == x[3:, 1]).all()
    assert (heads.columns_as_heads(columns, 2) == x).all()


def test_a_window_sees_its_last_positions():
    mask = np.tril(np.ones((4, 4), bool)).T[None]
    seen = window_mask(mask, np.arange(4)[None], 2)[0]
    assert seen.sum(0).tolist() == [1, 2, 2, 2]
    assert window_mask(mask, np.arange(4)[None], None) is mask


def test_slow_frequencies_are_slowed_and_quick_ones_kept():
    s = RopeScaling(8.0, 1.0, 4.0, 16)
    turns = np.array([9.0, 4.0, 2.5, 1.0, 0.1])
    omega = turns * (2 * np.pi / 16)
    slowed = s.slowed(omega) / omega
    assert slowed.tolist()[:2] == [1.0, 1.0]
    assert slowed.tolist()[3:] == [1 / 8, 1 / 8]
    assert relative_error(slowed[2], 0.5 / 8 + 0.5) <= 8 * np.finfo(float).eps


@pytest.fixture(scope="module")
def libraries():
    """transformers with norms and angles in float64, which it would take in float32."""
    torch, transformers, peft = map(optional, ("torch", "transformers", "peft"))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.smollm3 import modeling_smollm3

    def norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)

    def gemma_norm(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)

    def angles(self, x, position_ids, layer_type=None):
        rope = self.config.rope_parameters
        rope = rope[layer_type] if layer_type else rope
        d, theta = self.config.head_dim, rope["rope_theta"]
        frequencies = theta ** -(torch.arange(0, d, 2, dtype=x.dtype) / d)
        if rope["rope_type"] == "llama3":
            # its own rule, run in float64
            arange, torch.float = torch.float, torch.float64
            try:
                frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](self.config, "cpu")
            finally:
                torch.float = arange
        turned = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return turned.cos(), turned.sin()

    transformers.utils.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        for module, prefix in (
            (modeling_llama, "Llama"), (modeling_qwen3, "Qwen3"), (modeling_smollm3, "SmolLM3"),
        ):  # fmt: skip
            patch.setattr(getattr(module, f"{prefix}RMSNorm"), "forward", norm)
            patch.setattr(getattr(module, f"{prefix}RotaryEmbedding"), "forward", angles)
        patch.setattr(modeling_gemma3.Gemma3RMSNorm, "forward", gemma_norm)
        patch.setattr(modeling_gemma3.Gemma3RotaryEmbedding, "forward", angles)
        yield torch, transformers, peft


def loaded(libraries, c, folder):
    torch, transformers, _ = libraries
    cls = getattr(transformers, architecture_of(c).name)
    model = cls.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float64)
    if hasattr(model.model if c.causal else 0, "embed_tokens") and "Gemma3" in type(c).__name__:
        model.model.embed_tokens.embed_scale = torch.tensor(c.d**0.5, dtype=torch.float64)
    return model.eval()


@EVERY
def test_transformers_and_peft_have_the_same_loss_and_gradients(name, libraries, tmp_path):
    torch, _, peft = libraries
    c, rng = MORE_MODELS[name], np.random.default_rng(2)
    base = draw_weights(c, rng, std=0.3)
    base = {n: w + 0.1 * rng.standard_normal(w.shape) for n, w in base.items()}
    lora = ml.LoraConfig(r=2, lora_alpha=3)
    W, tuning = ml.inject(base, lora, c.linears(), rng)
    W |= {n: 0.3 * rng.standard_normal(W[n].shape) for n in sorted(tuning.trained)}
    write_model(tmp_path / "base", c, base)
    peft_format.write_adapter(tmp_path / "adapter", c, W, tuning, lora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(libraries, c, tmp_path / "base")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    ids = rng.integers(0, c.vocab, (3, 6))
    mask = np.arange(6) < np.array([[6], [4], [5]])
    labels = np.where(mask, ids, IGNORED) if c.causal else rng.integers(0, c.classes, 3)
    given = {"input_ids": ids, "attention_mask": mask.astype(int), "labels": labels}
    given = {key: torch.from_numpy(value) for key, value in given.items()}
    z = model.eval()(**given).logits
    if c.causal:  # transformers would take the loss in float32
        z, target = z[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(z, target if c.causal else given["labels"])
    loss.backward()
    L, back = ml.loss(ml.Batch(ids, labels, mask), W, c, tuning)
    record_worst(
        "more architectures, loss by transformers", error := relative_error(L, loss.item())
    )
    assert error <= GRADIENT
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    g, names = back(1.0), module_paths(c)
    assert len(theirs) == len(g)
    for n, gradient in g.items():
        at, _, part = n.rpartition(".")
        wanted = theirs[f"base_model.model.{names[at]}.lora_{part}.default.weight"]
        assert relative_error(gradient, wanted) <= 10 * GRADIENT


@EVERY
def test_what_transformers_writes_is_read(name, libraries, tmp_path):
    c = MORE_MODELS[name]
    W = draw_weights(c, np.random.default_rng(0))
    write_model(tmp_path / "ours", c, W)
    loaded(libraries, c, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    c_read, W_read = read_model(tmp_path / "theirs")
    assert c_read == c
    assert W_read.keys() == W.keys()
    assert all((W_read[at] == W[at]).all() for at in W)


@EVERY
def test_what_a_file_leaves_out_is_what_transformers_takes(name, libraries, tmp_path):
    _, transformers, _ = libraries
    c = MORE_MODELS[name]
    a = architecture_of(c)
    kept = {"architectures", "model_type", *a.keys.values()} - {a.keys[f] for f in a.absent}
    written = {key: value for key, value in config_to_json(c).items() if key in kept}
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(json.dumps(written))
    transformers.AutoConfig.from_pretrained(tmp_path / "short").save_pretrained(tmp_path / "whole")
    assert len(read_json(tmp_path / "whole/config.json")) > len(written)
    assert read_config(tmp_path / "whole") == read_config(tmp_path / "short")
