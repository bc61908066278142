"""What was found in real libraries: where they deviate, and what is right by algebra.

Each test is a finding: its name is the sentence, its docstring says in which release that was seen,
and its body is the smallest reproduction, which docs/findings.md shows. It asserts what the library
does beside what would be right, so it fails once the library behaves differently. In the release
that it was seen in that is a failure; in another one it is an expected failure (conftest.py), and
good news, most likely: look what the library does now, and if it is right, take the finding out
here and on the page.

An argument with the name of a library is that library. The numbers are chosen so that nothing is
rounded but what the finding is about, and `==` can decide.
"""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from ml_dtypes import bfloat16

from minilora import Batch, Tuning, logits, lora_linear, merge, scale, unmerge
from minilora.formats.huggingface import read_model
from minilora.lora import merge_weight
from minilora.ops import (
    attention,
    cross_entropy,
    embedding,
    linear,
    rmsnorm,
    rope_tables,
    with_tokens,
)
from minilora.optim import AdamState, adamw, loraplus_rates, schedule
from minilora.quantised import dequantise, dequantise_dynamic, quantise, quantise_dynamic
from minilora.targets import all_linear, layer_of, matches, saved_in_full

NEEDED = "the peers need it: pip install 'minilora[peers]'"


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason=NEEDED)


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers", reason=NEEDED)


@pytest.fixture
def peft(torch):
    return pytest.importorskip("peft", reason=NEEDED)


@pytest.fixture
def loralib(torch):
    return pytest.importorskip("loralib", reason=NEEDED)


@pytest.fixture
def bitsandbytes(torch):
    return pytest.importorskip("bitsandbytes", reason=NEEDED)


TINY = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1}


def test_transformers_computes_the_loss_of_a_float64_model_in_float32(torch, transformers):
    """Seen in transformers 5.24.0."""
    z = torch.tensor([[[1.0, 1 + 2**-40], [0, 0]]], dtype=torch.float64)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).double()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).double()
    for model in (llama, gpt2):
        first, second = (
            model.loss_function(logits=z, labels=torch.tensor([[0, label]]), vocab_size=2)
            for label in (0, 1)
        )
        assert first.dtype == second.dtype == torch.float32
        assert first == second
    first, second = (cross_entropy(z[0, :1].numpy().T, np.array([label]))[0] for label in (0, 1))
    # The two share their logarithm; a sum below 2 is rounded by at most 2⁻⁵³, their difference not.
    assert abs((first - second) - 2**-40) <= 2 * 2**-53


def test_transformers_computes_rmsnorm_of_a_float64_llama_in_float32(torch, transformers):
    """Seen in transformers 5.24.0."""
    x = np.array([[1], [1 + 2**-40]])
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(2, eps=1e-6).double()
    first, second = norm(torch.from_numpy(x.T))[0]
    assert first == second
    y, _ = rmsnorm(x, np.ones((2, 1)), eps=1e-6)
    assert y[0] < y[1]


def test_transformers_computes_rope_of_a_float64_llama_in_float32(torch, transformers):
    """Seen in transformers 5.24.0."""
    config = transformers.LlamaConfig(**TINY)
    tables = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).double()
    positions = np.array([[1, 2, 3]])

    def off(cos, sin):
        return abs(cos * cos + sin * sin - 1).max()

    # cos² + sin² = 1. Each is off by 2u at most, which its square doubles, and the squares and
    # their sum round once more: 6u.
    bound = 6 * 2.0**-53
    wide = torch.zeros(1, dtype=torch.float64)
    assert off(*tables(wide, torch.from_numpy(positions))) > bound
    assert off(*rope_tables(positions, 4, 10000.0, np.float64)) <= bound


def test_transformers_computes_the_softmax_of_a_float64_llama_in_float32(torch, transformers):
    """Seen in transformers 5.24.0."""
    q, k, v = np.ones((1, 1, 1, 1)), np.array([[[[0, 2**-40]]]]), np.array([[[[0.0, 1.0]]]])
    attend = transformers.models.llama.modeling_llama.eager_attention_forward
    layer = SimpleNamespace(num_key_value_groups=1, training=False)
    o, _ = attend(layer, *(torch.from_numpy(a).mT for a in (q, k, v)), None, scaling=1.0)
    assert o == 0.5
    o, _ = attention(q, k, v, np.ones((1, 2, 1), bool))
    assert o > 0.5


def test_transformers_gives_nan_for_a_float64_llama_padded_on_the_left(
    torch, transformers, tmp_path
):
    """Seen in transformers 5.24.0."""
    config = transformers.LlamaConfig(**TINY, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    ids, mask = np.array([[0, 0, 1, 2]]), np.array([[0, 0, 1, 1]])
    batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    assert model(**batch).logits.isfinite().all()
    assert model.double()(**batch).logits.isnan().all()
    model.set_attn_implementation("sdpa")
    assert model(**batch).logits.isfinite().all()

    model.save_pretrained(tmp_path)
    c, W = read_model(tmp_path)
    z, _ = logits(Batch(ids, mask=mask), W, c, Tuning())
    assert np.isfinite(z).all()


def test_transformers_ignores_the_warm_up_of_a_constant_schedule(torch, transformers):
    """Seen in transformers 5.24.0."""

    def rates(name):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=4)
        for _ in range(6):
            yield scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()

    right = [schedule("constant", k, total=6, warmup=4) for k in range(6)]
    assert right == [0, 0.25, 0.5, 0.75, 1, 1]
    assert list(rates("constant")) == [1] * 6
    assert list(rates("constant_with_warmup")) == right


def peft_layer(torch, peft, w, delta, dtype):
    """A model of one weight w and an adapter whose product is delta, and its one layer."""
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=dtype))
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.weight.data.fill_(w)
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(delta)
    return model, layer


def test_peft_replaces_a_weight_decay_for_loraplus_by_zero(torch, peft):
    """Seen in peft 0.21.2."""
    from peft.optimizers import create_loraplus_optimizer

    def step(**decay):
        model, layer = peft_layer(torch, peft, 1, 1, torch.float32)
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.25, loraplus_lr_ratio=2, **decay
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return {end: layer.get_parameter(f"lora_{end}.default.weight").item() for end in "AB"}

    start = {"q.A": 1.0, "q.B": 1.0}
    rates = loraplus_rates(list(start), lr=0.25, ratio=2)
    right, _ = adamw(start, dict.fromkeys(start, 0.0), AdamState(), rates, weight_decay=0.5)
    assert right == {"q.A": 0.875, "q.B": 0.75}
    assert step(weight_decay=0.5) == {"A": 1, "B": 1}
    assert step(loraplus_weight_decay=0.5) == {"A": 0.875, "B": 0.75}


def test_peft_loads_an_adapter_with_another_scale_than_it_was_trained_with(torch, peft, tmp_path):
    """Seen in peft 0.21.2."""

    def base():
        return torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})

    patterns = {"q": 1, ".*": 64}  # the first that fits counts
    config = peft.LoraConfig(r=2, target_modules=["q"], alpha_pattern=patterns)
    trained = peft.get_peft_model(base(), config)
    trained.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert trained.base_model.model.q.scaling["default"] == scale(alpha=1, r=2) == 0.5
    assert loaded.base_model.model.q.scaling["default"] == scale(alpha=64, r=2) == 32


def test_peft_rounds_the_delta_of_a_safe_merge_before_adding_it(torch, peft):
    """Seen in peft 0.21.2."""
    delta = 2**-8 + 2**-18  # a little more than half the spacing of bfloat16 above 1

    def merged(safe):
        model, layer = peft_layer(torch, peft, 1, delta, torch.bfloat16)
        model.merge_adapter(safe_merge=safe)
        return layer.weight.item()

    one = np.ones((1, 1))
    right = merge_weight(one, one, delta * one, 1).astype(bfloat16)
    assert merged(safe=False) == right == 1 + 2**-7
    assert merged(safe=True) == 1


def test_peft_counts_experts_for_layers_where_the_layers_are_outermost(torch, peft):
    """Seen in peft 0.21.2."""

    def tree(branch, last):
        """Each a module of one part of the name, the last a projection."""
        parts = branch.split(".")
        for part in reversed(parts):
            last = torch.nn.ModuleDict({part: last})
        return last

    def adapted(name, i):
        model = tree(name, torch.nn.Linear(1, 1))
        config = peft.LoraConfig(target_modules=["up"], layers_to_transform=[i])
        try:
            peft.inject_adapter_in_model(config, model)
        except ValueError:
            return False
        return hasattr(model.get_submodule(name), "lora_A")

    name = "layers.1.experts.0.up"
    assert [adapted(f"model.{name}", i) for i in (0, 1)] == [False, True]
    assert [adapted(name, i) for i in (0, 1)] == [True, False]
    right = layer_of(name, "layers"), layer_of(f"model.{name}", "layers")
    assert right == (1, 1)


def test_peft_adapts_the_head_where_another_projection_bears_the_end_of_its_name(
    torch, transformers, peft
):
    """Seen in peft 0.21.2."""

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self):
            super().__init__(self.config_class())
            self.out = torch.nn.Linear(1, 1)
            self.head = torch.nn.ModuleDict({"out": torch.nn.Linear(1, 1)})

        def get_output_embeddings(self):
            return self.head["out"]

    config = peft.LoraConfig(target_modules="all-linear")
    model = peft.inject_adapter_in_model(config, Model())
    adapted = [name for name, at in model.named_modules() if hasattr(at, "lora_A")]
    assert adapted == ["out", "head.out"]
    assert all_linear(["out", "head.out"], heads=["head.out"]) == ["out"]


def test_peft_trains_in_full_what_only_ends_like_a_module_to_save(torch, peft):
    """Seen in peft 0.21.2."""
    names = ["k", "q", "seq"]
    base = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in names})
    config = peft.LoraConfig(target_modules=["k"], modules_to_save=["q"])
    model = peft.get_peft_model(base, config).base_model.model
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"k", "q", "seq"}
    assert trained == {"k", *(name for name in names if saved_in_full(name, ["q"]))}
    assert [name for name in names if matches(name, ["q"])] == ["q"]


def test_peft_drops_the_bias_of_a_head_whose_tokens_are_trained(torch, peft):
    """Seen in peft 0.21.2."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    head = torch.nn.Linear(1, 2)
    head.weight.data.fill_(3)
    head.bias.data.fill_(5)
    layer = TrainableTokensLayer(head, "default")
    layer.update_layer("default", peft.TrainableTokensConfig(token_indices=[1]))
    ids, x = np.array([1]), np.ones((1, 1))
    E, _ = with_tokens(np.full((2, 1), 3.0), ids, np.full((1, 1), 3.0))  # as it was
    right, _ = linear(x, E, np.full((2, 1), 5.0))
    one = torch.ones(1, 1)
    assert right.T.tolist() == head(one).tolist() == [[8, 8]]
    assert layer(one).tolist() == [[3, 3]]
    layer.merge()
    assert layer(one).tolist() == [[8, 8]]


def test_peft_and_loralib_do_not_restore_a_weight_by_unmerging(torch, peft, loralib):
    """Seen in peft 0.21.2 and loralib 0.1.2."""
    w = 2.0**-30
    model, pefts = peft_layer(torch, peft, w, 1, torch.float32)
    model.merge_adapter()
    model.unmerge_adapter()
    loralibs = loralib.Linear(1, 1, r=1)
    for parameter, value in zip(loralibs.parameters(), (w, 0, 1, 1), strict=True):
        parameter.data.fill_(value)
    loralibs.eval()
    loralibs.train()
    assert pefts.weight == loralibs.weight == 0

    one = np.ones((1, 1), np.float32)
    W = {"q.weight": w * one, "q.A": one, "q.B": one}
    merged = merge(W, Tuning(scale={"q": 1}))
    assert merged["q.weight"] == 1
    assert unmerge(merged)["q.weight"] == w


LORA = {"r": 2, "lora_alpha": 4}
S = scale(alpha=4, r=2)
X = np.arange(1.0, 9.0).reshape(4, 2)


def filled(layer):
    """A loralib layer with positive whole numbers for parameters, and W, b, A, B as arrays."""
    rng = np.random.default_rng(0)
    for parameter in layer.parameters():
        parameter.data = parameter.new_tensor(rng.integers(1, 5, parameter.shape))
    base = getattr(layer, "conv", layer)
    W, b, A, B = (
        p.detach().numpy().copy() for p in (base.weight, base.bias, layer.lora_A, layer.lora_B)
    )
    return layer, W.reshape(len(W), -1), b[:, None], A, B


def answer(layer, x):
    """The layer's answer to the columns of x, as columns."""
    return layer(layer.lora_A.new_tensor(x.T)).detach().numpy().T


def same(a, b):
    return np.array_equal(a, b)


def test_loralib_returns_nothing_from_train_and_eval(torch, loralib):
    """Seen in loralib 0.1.2."""
    adapted, plain = loralib.Linear(4, 3, **LORA), torch.nn.Linear(4, 3)
    assert adapted.eval() is None
    assert adapted.train() is None
    assert plain.eval() is plain.train() is plain


def test_loralib_merges_twice_what_was_saved_after_eval(loralib):
    """Seen in loralib 0.1.2."""
    saved, W, _, A, B = filled(loralib.Linear(4, 3, **LORA))
    once = merge_weight(W, A, B, S)
    saved.eval()
    assert same(saved.weight.detach(), once)
    loaded = loralib.Linear(4, 3, **LORA)
    loaded.load_state_dict(saved.state_dict())
    loaded.eval()
    assert same(loaded.weight.detach(), merge_weight(once, A, B, S))


def test_loralib_drops_an_adapter_that_is_loaded_after_eval(loralib):
    """Seen in loralib 0.1.2."""
    saved, W, b, A, B = filled(loralib.Linear(4, 3, **LORA))
    right, _ = lora_linear(X, W, b, A, B, S)
    assert same(answer(saved, X), right)
    loaded = loralib.Linear(4, 3, **LORA)
    loaded.eval()
    loaded.load_state_dict(saved.state_dict())
    assert same(answer(loaded, X), linear(X, W, b)[0])
    loaded.train()
    assert same(loaded.weight.detach(), merge_weight(W, A, B, -S))


def test_loralib_gives_an_adapter_no_gradient_after_eval(torch, loralib):
    """Seen in loralib 0.1.2."""

    def gradients(**settings):
        layer, *arrays = filled(loralib.Linear(4, 3, **LORA, **settings))
        layer.eval()
        layer(torch.from_numpy(X.T).float()).sum().backward()
        return layer.lora_A.grad, layer.lora_B.grad, arrays

    dA, dB, (W, b, A, B) = gradients()
    assert dA is None
    assert dB is None
    y, back = lora_linear(X, W, b, A, B, S)
    _, *right = back(np.ones_like(y))
    *unmerged, _ = gradients(merge_weights=False)
    assert all(map(same, unmerged, right))


@pytest.mark.parametrize(("kind", "dimensions"), [("Conv1d", 1), ("Conv3d", 3)])
def test_loralib_fails_in_convolutions_of_one_and_three_dimensions(
    torch, loralib, kind, dimensions
):
    """Seen in loralib 0.1.2."""

    def sizes(layer):
        return layer.conv.weight.numel(), (layer.lora_B @ layer.lora_A).numel()

    layer = getattr(loralib, kind)(4, 3, kernel_size=3, **LORA)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        layer(torch.ones(1, 4, *[5] * dimensions))
    weight, delta = sizes(layer)
    assert weight != delta
    weight, delta = sizes(loralib.Conv2d(4, 3, kernel_size=3, **LORA))
    assert weight == delta


def test_loralib_applies_no_dropout_in_convolutions(torch, loralib):
    """Seen in loralib 0.1.2."""
    none = np.zeros_like(X)  # p = 1: every feature of the branch is dropped
    layer, *arrays = filled(loralib.Linear(4, 3, lora_dropout=1.0, **LORA))
    assert same(answer(layer, X), lora_linear(X, *arrays, S, none)[0])
    layer, *arrays = filled(loralib.Conv2d(4, 3, kernel_size=1, lora_dropout=1.0, **LORA))
    y = layer(torch.from_numpy(X).float()[None, :, :, None]).detach()[0, :, :, 0]
    assert same(y, lora_linear(X, *arrays, S)[0])
    assert not same(y, lora_linear(X, *arrays, S, none)[0])


def test_loralib_fails_in_a_merged_linear_with_nothing_enabled(torch, loralib):
    """Seen in loralib 0.1.2."""
    layer = loralib.MergedLinear(4, 3, **LORA)
    x = torch.from_numpy(X.T).float()
    with pytest.raises(AttributeError, match="lora_A"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_loralib_drops_the_adapter_of_a_merged_linear_built_on_the_meta_device(loralib):
    """Seen in loralib 0.1.2."""
    built = {"enable_lora": [True], **LORA}
    layer, *arrays = filled(loralib.MergedLinear(4, 3, **built))
    right, _ = lora_linear(X, *arrays, S)
    assert same(answer(layer, X), right)
    later = loralib.MergedLinear(4, 3, **built, device="meta").to_empty(device="cpu")
    later.load_state_dict(layer.state_dict())
    W, b, *_ = arrays
    assert same(answer(later, X), linear(X, W, b)[0])


def test_loralib_shortens_lora_a_in_the_forward_of_an_embedding_with_max_norm(torch, loralib):
    """Seen in loralib 0.1.2."""
    layer = loralib.Embedding(1, 1, r=1, max_norm=1.0)
    for name, value in {"weight": 0.0, "lora_A": 2.0, "lora_B": 0.5}.items():
        layer.get_parameter(name).data.fill_(value)
    ids = torch.tensor([0])
    row = merge_weight(*(np.array([[value]]) for value in (0.0, 2.0, 0.5)), 1)
    right, _ = embedding(ids.numpy(), row)
    assert right == 1  # no longer than max_norm
    layer.eval()
    assert layer(ids) == right
    layer.train()
    assert layer(ids).item() < right
    assert layer.lora_A < 2


def test_loralib_cannot_pickle_a_layer_without_dropout(loralib):
    """Seen in loralib 0.1.2."""
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(loralib.Linear(4, 3, **LORA))
    layer, W, b, A, B = filled(loralib.Linear(4, 3, lora_dropout=0.5, **LORA))
    layer.eval()
    copied = pickle.loads(pickle.dumps(layer))
    assert same(answer(copied, X), lora_linear(X, W, b, A, B, S)[0])


def test_bitsandbytes_gives_an_entry_the_scale_of_another_block_where_rows_are_no_blocks(
    torch, bitsandbytes
):
    """Seen in bitsandbytes 0.50.2."""
    F = bitsandbytes.functional
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the kernel is that of processors with AVX-512")
    W = np.repeat([1, 2, 4], 64).astype(np.float32)  # three blocks, each of one number
    for shape in ((3, 64), (4, 48)):
        codes, state = F.quantize_4bit(torch.from_numpy(W.reshape(shape)), quant_type="nf4")
        assert state.absmax.tolist() == [1, 2, 4]
        q = quantise(W.reshape(shape), "nf4")
        assert (dequantise(q).ravel() == W).all()
        assert codes.numpy().ravel().tolist() == q.codes.tolist()
        found = F.dequantize_4bit(codes, state).numpy().ravel()
        assert (found == W).all() if shape == (3, 64) else (found == 1).all()


def test_bitsandbytes_does_not_find_zero_in_a_map_that_has_it(torch, bitsandbytes):
    """Seen in bitsandbytes 0.50.2."""
    F = bitsandbytes.functional
    t = F.create_dynamic_map()
    assert 0 in t
    codes, state = F.quantize_blockwise(torch.tensor([0.0, 1.0]), blocksize=256)
    zero, one = F.dequantize_blockwise(codes, state).tolist()
    assert one == 1
    assert zero == t[t > 0][3]  # three values are nearer to 0, and 0 itself
    v = np.array([0, 1], np.float32)
    for points, wanted in ((None, 0), (2**16, zero)):
        codes, absmax = quantise_dynamic(v, points=points)
        assert dequantise_dynamic(codes, absmax).tolist() == [wanted, 1]
