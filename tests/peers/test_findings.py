"""What was found in real libraries, beside what minilora computes.

Scripts show all findings (test_finding_scripts.py). Where minilora has the right answer, a test
here, marked with the finding's id, asserts what the library does and that minilora is right, so it
fails once the library behaves differently. In the release that it was seen in that is a failure; in
another one it is an expected failure (conftest.py), and good news, most likely: look what the
library does now, and if it is right, remove the finding, or say in which release it is fixed.

An argument with the name of a library is that library. The numbers are chosen so that nothing is
rounded but what the finding is about, and `==` can decide.
"""

import ast
import copy
import json
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from extras import optional
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from minilora import Batch, TrainableSpec, logits, merge, scale, unmerge
from minilora.findings import FINDINGS, LIBRARIES
from minilora.io.formats.huggingface import config_to_json, read_model
from minilora.spec.adalora import adalora_scale, allocate, budget, orthogonality
from minilora.spec.initialization import loftq, olora, orthogonal, pissa
from minilora.spec.layers import Geometry, adapted_conv, with_tokens
from minilora.spec.lora import lora_linear, merge_weight, twin
from minilora.spec.models import Llama
from minilora.spec.multi_adapter import AdaptedLayer, Adapter, combine_exact, combine_linear
from minilora.spec.ops import embedding, linear, rope_tables
from minilora.spec.optim import AdamState, adamw, lorafa_gradient, loraplus_rates
from minilora.spec.quantization import dequantize, dequantize_dynamic, quantize, quantize_dynamic
from minilora.spec.target_modules import (
    all_linear,
    is_saved,
    layer_index,
    matches,
    tied_gradients,
)
from minilora.spec.variants import (
    DORA,
    LORA_BIAS,
    adalora_linear,
    dora_linear,
    lora_bias_linear,
    merge_lora_bias,
    start,
)
from minilora.verify.implementation.sessions import LayerState


@pytest.fixture
def torch():
    return optional("torch")


@pytest.fixture
def transformers(torch):
    return optional("transformers")


@pytest.fixture
def peft(torch):
    return optional("peft")


@pytest.fixture
def loralib(torch):
    return optional("loralib")


@pytest.fixture
def bitsandbytes(torch):
    return optional("bitsandbytes")


TINY = {"vocab_size": 5, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 1}


@pytest.mark.finding("transformers.float64-rope")
def test_transformers_computes_rope_of_a_float64_llama_in_float32(torch, transformers):
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


@pytest.mark.finding("transformers.float64-padding")
def test_transformers_gives_nan_for_a_float64_llama_padded_on_the_left(
    torch, transformers, tmp_path
):
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
    z, _ = logits(Batch(ids, mask=mask), W, c, TrainableSpec())
    assert np.isfinite(z).all()


def peft_layer(torch, peft, w, delta, dtype):
    """A model of one weight w and an adapter whose product is delta, and its one layer."""
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=dtype))
    model = peft.get_peft_model(base, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.weight.data.fill_(w)
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(delta)
    return model, layer


@pytest.mark.finding("peft.loraplus-decay")
def test_peft_replaces_a_weight_decay_for_loraplus_by_zero(torch, peft):
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

    start = {"q.A": np.ones(()), "q.B": np.ones(())}
    rates = loraplus_rates(list(start), lr=0.25, ratio=2)
    still = dict.fromkeys(start, np.zeros(()))
    right, _ = adamw(start, still, AdamState(), rates, weight_decay=0.5)
    assert right == {"q.A": 0.875, "q.B": 0.75}
    assert step(weight_decay=0.5) == {"A": 1, "B": 1}
    assert step(loraplus_weight_decay=0.5) == {"A": 0.875, "B": 0.75}


@pytest.mark.finding("peft.outermost-layers")
def test_peft_counts_experts_for_layers_where_the_layers_are_outermost(torch, peft):
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
    right = layer_index(name, "layers"), layer_index(f"model.{name}", "layers")
    assert right == (1, 1)


@pytest.mark.finding("peft.all-linear-head")
def test_peft_adapts_the_head_where_another_projection_bears_the_end_of_its_name(
    torch, transformers, peft
):
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


@pytest.mark.finding("peft.saved-by-ending")
def test_peft_trains_in_full_what_only_ends_like_a_module_to_save(torch, peft):
    names = ["k", "q", "seq"]
    base = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in names})
    config = peft.LoraConfig(target_modules=["k"], modules_to_save=["q"])
    model = peft.get_peft_model(base, config).base_model.model
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"k", "q", "seq"}
    assert trained == {"k", *(name for name in names if is_saved(name, ["q"]))}
    assert [name for name in names if matches(name, ["q"])] == ["q"]


@pytest.mark.finding("peft.tokens-head-bias")
def test_peft_drops_the_bias_of_a_head_whose_tokens_are_trained(torch, peft):
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


@pytest.mark.finding("peft.loraplus-vectors")
def test_peft_gives_every_trained_vector_the_rate_of_b_for_loraplus(torch, peft):
    from peft.optimizers import create_loraplus_optimizer

    base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q"], bias="lora_only"))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    q = model.base_model.model.q
    parts = {"q.A": q.lora_A.default.weight, "q.B": q.lora_B.default.weight, "q.bias": q.bias}
    assert {name: rate[p] for name, p in parts.items()} == {"q.A": 0.5, "q.B": 4, "q.bias": 4}
    assert loraplus_rates(list(parts), lr=0.5, ratio=8) == {"q.A": 0.5, "q.B": 4, "q.bias": 0.5}


@pytest.mark.finding("peft.loraplus-embedding")
def test_peft_gives_an_embeddings_adapter_a_rate_of_its_own_for_loraplus(torch, peft):
    from peft.optimizers import create_loraplus_optimizer

    base = torch.nn.ModuleDict({"embed": torch.nn.Embedding(1, 1)})
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["embed"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    embed = model.base_model.model.embed
    parts = {f"embed.{end}": getattr(embed, f"lora_embedding_{end}")["default"] for end in "AB"}
    assert {name: rate[p] for name, p in parts.items()} == {"embed.A": 1e-6, "embed.B": 1e-6}
    assert loraplus_rates(list(parts), lr=0.5, ratio=8) == {"embed.A": 0.5, "embed.B": 4}


def adalora_model(torch, peft, base=None, **settings):
    """AdaLoRA on q, a projection from one feature to one: the model and its layer."""
    base = base or torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
    settings = {"init_r": 2, "target_r": 1, "total_step": 100} | settings
    model = peft.get_peft_model(base, peft.AdaLoraConfig(target_modules=["q"], **settings))
    layer = model.base_model.model.q
    layer.weight.data.fill_(1)
    for part in "AEB":
        getattr(layer, f"lora_{part}")["default"].data.fill_(1)
    return model, layer


def adalora_gradients(torch, layer, gradient):
    """The gradient of E that is given, and none of A and B."""
    for part in "AB":
        getattr(layer, f"lora_{part}")["default"].grad = torch.zeros_like(
            getattr(layer, f"lora_{part}")["default"]
        )
    layer.lora_E["default"].grad = torch.tensor(gradient)[:, None]


def adalora_loss(torch, peft, A, B):
    """A model whose own loss is 0, with AdaLoRA, its penalty at weight 1; and A and B."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(1, 1, bias=False)

        def forward(self):
            return SimpleNamespace(loss=torch.zeros(()))

    model, layer = adalora_model(torch, peft, Model(), init_r=1, orth_reg_weight=1.0)
    factors = layer.lora_A["default"], layer.lora_B["default"]
    for factor, value in zip(factors, (A, B), strict=True):
        factor.data.fill_(value)
    return model, factors


@pytest.mark.finding("peft.adalora-penalty")
def test_peft_averages_norms_where_adaloras_penalty_adds_their_squares(torch, peft):
    model, (A, B) = adalora_loss(torch, peft, 2, 3)
    loss = model.base_model().loss
    loss.backward()
    assert loss == ((2 * 2 - 1) + (3 * 3 - 1)) / 2
    assert (A.grad, B.grad) == (2, 3)

    R, back = orthogonality(*(factor.detach().numpy() for factor in (A, B)))
    assert R == (2 * 2 - 1) ** 2 + (3 * 3 - 1) ** 2
    assert back(1) == (4 * (2 * 2 - 1) * 2, 4 * (3 * 3 - 1) * 3)


@pytest.mark.finding("peft.adalora-penalty-where")
def test_peft_adds_adaloras_penalty_in_evaluation_and_never_without_a_task_type(torch, peft):
    model, (A, B) = adalora_loss(torch, peft, 2, 3)
    assert orthogonality(*(factor.detach().numpy() for factor in (A, B)))[0] > 0
    assert model().loss == 0  # PeftModel goes past the penalty; its subclasses for tasks do not
    assert model.base_model().loss > 0
    assert model.eval().base_model().loss == model.train().base_model().loss


@pytest.mark.finding("peft.adalora-saved-between")
def test_peft_saves_another_function_between_two_prunings_of_adalora(torch, peft, tmp_path):
    model, layer = adalora_model(torch, peft, deltaT=2)
    for step in (1, 2, 3):
        adalora_gradients(torch, layer, [2.0, 1.0])
        layer.lora_E["default"].data += 1.0  # as an optimizer moves it
        model.base_model.update_and_allocate(step)
    x = torch.ones(1, 1)
    assert layer.lora_E["default"].ravel().tolist() == [4, 1]  # pruned at 2, grown again since

    def saved():
        model.save_pretrained(tmp_path)
        base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
        base.q.weight.data.fill_(1)
        with pytest.warns(RuntimeWarning, match="rank_pattern keys .* were ignored"):  # they count
            loaded = peft.PeftModel.from_pretrained(base, tmp_path)
        return loaded.base_model.model.q(x)

    s = adalora_scale(8, r=2)
    one = np.ones((2, 1))
    trained, kept = (
        adalora_linear(x.numpy(), one[:1], None, one, one.T, np.array([[4], [E]]), s)[0]
        for E in (1, 0)
    )
    assert layer(x) == np.float32(trained)
    assert saved() == np.float32(kept)
    assert saved() < layer(x)
    layer.lora_E["default"].data[1] = 0
    assert saved() == layer(x)  # right after a pruning


@pytest.mark.finding("peft.adalora-equal-scores")
def test_peft_prunes_all_triplets_of_one_score_whatever_the_budget_of_adalora(torch, peft):
    model, layer = adalora_model(torch, peft, init_r=4, target_r=3, total_step=1)
    adalora_gradients(torch, layer, [1.0] * 4)
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    model.base_model.rankallocator.mask_to_budget(model.base_model.model, 3)
    assert layer.lora_E["default"].count_nonzero() == 0
    assert allocate({"q": np.ones((4, 1))}, 3)["q"].sum() == 3


@pytest.mark.finding("peft.adalora-alpha-0")
def test_peft_loads_an_adalora_adapter_of_alpha_0_with_another_scale(torch, peft, tmp_path):
    model, layer = adalora_model(torch, peft, lora_alpha=0, tfinal=99)
    adalora_gradients(torch, layer, [2.0, 1.0])
    model.base_model.update_and_allocate(0)
    model.base_model.update_and_allocate(1)
    model.save_pretrained(tmp_path)
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)})
    with pytest.warns(RuntimeWarning, match="rank_pattern keys .* were ignored"):
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).base_model.model.q
    trained, other = (at.get_delta_weight("default").item() for at in (layer, loaded))
    assert trained == np.float32(adalora_scale(0, r=2)) == np.float32(adalora_scale(2, r=2))
    assert other == np.float32(adalora_scale(1, r=2)) == trained / 2


@pytest.mark.finding("peft.adalora-ranknum")
def test_peft_trains_the_rank_that_adaloras_scale_divides_by(torch, peft, tmp_path):
    def base(dtype=torch.bfloat16):
        return torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1, bias=False)}).to(dtype)

    _, layer = adalora_model(torch, peft, base(torch.float32))
    assert not layer.ranknum["default"].requires_grad
    model, layer = adalora_model(torch, peft, base())
    rank, x, one = layer.ranknum["default"], torch.ones(1, 1, dtype=torch.bfloat16), np.ones((1, 1))

    def right():
        E = np.ones((2, 1))
        y, _ = adalora_linear(one, one, None, E, E.T, E, adalora_scale(8, r=2))
        return bfloat16(y.item())

    assert rank.requires_grad
    assert layer(x).item() == right() == 9
    rank.grad = torch.ones(1)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1).step()
    assert rank == 1
    assert layer(x).item() == 17
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path).base_model.model.q
    loaded.weight.data.fill_(1)
    assert loaded(x).item() == right()


@pytest.mark.finding("peft.adalora-scale")
def test_peft_ignores_rslora_and_alpha_pattern_in_adalora(torch, peft):
    settings = {"use_rslora": True, "alpha_pattern": {"q": 16}, "init_r": 4}
    _, layer = adalora_model(torch, peft, **settings)
    s = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)
    assert s == adalora_scale(8, r=4)
    assert s < scale(8, 4) < scale(16, 4) < scale(16, 4, rslora=True)


@pytest.mark.finding("peft.pissa-niter")
def test_peft_loads_a_pissa_by_fewer_iterations_as_another_function(torch, peft, tmp_path):
    W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

    def base():
        model = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8, bias=False)})
        model.q.weight.data = torch.from_numpy(W.copy())
        return model

    x = torch.eye(8)
    rounding = W.size * 2.0**-24 * abs(W).max()
    difference = {}
    for init in ("pissa", "pissa_niter_1"):
        config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=init)
        model = peft.get_peft_model(base(), config)
        trained = model.base_model.model.q(x)
        assert abs(trained.T.detach().numpy() - W).max() <= rounding
        model.save_pretrained(tmp_path / init)
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / init).base_model.model.q(x)
        difference[init] = abs(trained - loaded).max().item()
    assert difference["pissa"] == 0
    assert difference["pissa_niter_1"] > rounding
    assert all(same(a, b) for a, b in zip(pissa(W, 2, 1), pissa(W, 2, 1), strict=True))


@pytest.mark.finding("peft.pissa-converted")
@pytest.mark.filterwarnings("ignore:PiSSA changes the base:UserWarning")
def test_peft_drops_all_but_a_and_b_where_it_converts_pissa(torch, peft, tmp_path):
    base = torch.nn.ModuleDict(
        {"q": torch.nn.Linear(2, 2), "k": torch.nn.Linear(2, 2), "e": torch.nn.Embedding(3, 2)}
    )
    settings = {"target_modules": ["q", "e"], "modules_to_save": ["k"], "use_dora": True}
    config = peft.LoraConfig(r=1, init_lora_weights="pissa", **settings)
    model = peft.get_peft_model(base, config)
    config.init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    config.init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    before, after = (
        {
            name.removeprefix("base_model.model.")
            for name in load_file(folder / "adapter_model.safetensors")
        }
        for folder in (tmp_path / "start", tmp_path / "plain")
    )
    assert after == {"q.lora_A.weight", "q.lora_B.weight"}
    assert before - after == {
        "q.lora_magnitude_vector",
        "e.lora_embedding_A",
        "e.lora_embedding_B",
        "e.lora_magnitude_vector",
        "k.weight",
        "k.bias",
    }


def tied_gpt2(transformers, peft=None, **settings):
    """A GPT-2 of one layer, its head tied to its embedding; with an adapter on the two."""
    sizes = {"n_embd": 2, "n_layer": 1, "n_head": 1, "vocab_size": 3, "n_positions": 2}
    c = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(c)
    if peft is None:
        return model
    config = peft.LoraConfig(r=1, target_modules=["lm_head"], ensure_weight_tying=True, **settings)
    return peft.get_peft_model(model, config)


@pytest.mark.finding("peft.tied-factors")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_trains_tied_factors_by_two_optimizers(torch, transformers, peft):
    model = tied_gpt2(transformers, peft)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    A, B = embed.lora_embedding_A["default"], embed.lora_embedding_B["default"]
    head_A, head_B = head.lora_A["default"].weight, head.lora_B["default"].weight
    assert torch.equal(head_B, A.T)
    assert not A.any()
    for p in (A, B, head_A, head_B):
        p.grad = torch.ones_like(p)
    settings = {"lr": 1, "betas": (0.5, 0.5), "eps": 0}
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], **settings).step()
    assert A.tolist() == [[-2, -2, -2]]

    shapes = {"embed.A": (1, 3), "embed.B": (2, 1), "head.A": (1, 2), "head.B": (3, 1)}
    zeros = {name: np.zeros(shape) for name, shape in shapes.items()}
    g = tied_gradients({name: np.ones_like(w) for name, w in zeros.items()})
    right, _ = adamw(zeros, g, AdamState(), weight_decay=0, **settings)
    assert g["embed.A"].tolist() == [[2, 2, 2]]
    assert right["embed.A"].tolist() == [[-1, -1, -1]]
    assert same(right["head.B"], right["embed.A"].T)
    # Another dtype or device, and nothing ties them any more.
    model.double()
    A.data += 1
    assert not torch.equal(head_B, A.T)


@pytest.mark.finding("peft.gpt2-tied")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_gpt2_without_the_tied_half_of_its_adapter(
    torch, transformers, peft, tmp_path
):
    model = tied_gpt2(transformers, peft)
    embed, head = model.get_input_embeddings(), model.get_output_embeddings()
    embed.lora_embedding_A["default"].data.fill_(1)
    embed.lora_embedding_B["default"].data.fill_(1)
    for theirs, right in zip(
        (head.lora_A, head.lora_B), twin(np.ones((1, 3)), np.ones((2, 1))), strict=True
    ):
        assert theirs["default"].weight.tolist() == right.tolist()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "transformer.wte"
    ]
    with pytest.warns(UserWarning, match="no tied modules are added"):
        loaded = peft.PeftModel.from_pretrained(tied_gpt2(transformers), tmp_path)
    assert hasattr(loaded.get_input_embeddings(), "lora_embedding_A")
    assert not hasattr(loaded.get_output_embeddings(), "lora_A")


@pytest.mark.finding("peft.tied-merge")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True:UserWarning")
def test_peft_merges_a_tied_heads_adapter_into_the_embedding_and_tied_factors_twice(
    torch, transformers, peft
):
    only_head = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"])
    model = peft.get_peft_model(tied_gpt2(transformers), only_head)
    both = tied_gpt2(transformers, peft, lora_alpha=1)
    for each, uses in ((model, 1), (both, 2)):
        embed, head = each.get_input_embeddings(), each.get_output_embeddings()
        embed.weight.data.fill_(1)
        head.lora_A["default"].weight.data.fill_(1)
        head.lora_B["default"].weight.data.fill_(2)
        each.merge_adapter()
        # ΔW = B A is 2 in each entry, of the one table that both hold.
        assert embed.weight.unique() == head.weight.unique() == 1 + uses * 2
    W = {"embed.weight": np.ones((3, 2)), "head.A": np.ones((1, 2)), "head.B": 2 * np.ones((3, 1))}
    of_head = merge(W, TrainableSpec(scale={"head": 1}))
    assert (of_head["embed.weight"] == 1).all()
    assert (of_head["head.weight"] == 1 + 2).all()
    A, B = twin(W["head.A"], W["head.B"])
    of_both = merge(W | {"embed.A": A, "embed.B": B}, TrainableSpec(scale={"head": 1, "embed": 1}))
    assert (of_both["embed.weight"] == 1 + 2).all()
    assert "head.weight" not in of_both


@pytest.mark.finding("peft.trained-bias")
def test_peft_leaves_a_trained_bias_in_the_base(torch, peft, tmp_path):
    def layer(b):
        model = torch.nn.Sequential(torch.nn.Linear(1, 1))
        model[0].weight.data.fill_(1)
        model[0].bias.data.fill_(b)
        return model

    config = peft.LoraConfig(r=1, target_modules=["0"], bias="lora_only")
    trained = peft.get_peft_model(layer(1), config)
    trained.base_model.model[0].bias.data.fill_(8)  # as training would
    trained.save_pretrained(tmp_path)
    model = peft.get_peft_model(layer(1), peft.LoraConfig(r=1, target_modules=["0"]), "one")
    one = torch.ones(1, 1)
    assert model(one) == 1 + 1
    model.load_adapter(tmp_path, "two")
    assert model.active_adapters == ["one"]
    assert model(one) == 1 + 8
    with model.disable_adapter():
        assert model(one) == 1 + 8
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.load_adapter(tmp_path, "three")
    given = {"A": np.ones((1, 1)), "B": np.zeros((1, 1)), "alpha": 1, "r": 1}
    right = LayerState.of({"kind": "bias", "W": np.ones((1, 1)), "bias": np.ones(1)})
    right = right.add("one", given).activate(["one"]).add("two", given | {"bias": np.full(1, 8)})
    assert right.forward(np.ones((1, 1)))[0] == 1 + 1
    assert right.activate(["two"]).forward(np.ones((1, 1)))[0] == 1 + 8
    assert right.activate(["two"]).disable().forward(np.ones((1, 1)))[0] == 1 + 1


@pytest.mark.finding("peft.adalora-whole-budget")
def test_peft_fails_where_adaloras_budget_does_not_fall(torch, peft):
    model, layer = adalora_model(torch, peft, init_r=2, target_r=2)
    adalora_gradients(torch, layer, [2.0, 1.0])
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        model.base_model.update_and_allocate(1)
    right = allocate({"q": np.ones((2, 1))}, budget(1, 2, 2, 0, 0, 100))
    assert right["q"].all()


@pytest.mark.finding("peft.adalora-budget-rounded")
def test_peft_has_one_triplet_less_than_adaloras_budget_where_it_is_whole(torch, peft):
    model, _ = adalora_model(torch, peft, init_r=125, target_r=0, total_step=5)
    found, _ = model.base_model.rankallocator.budget_schedule(4)
    assert found == 0
    assert budget(4, 125, 0, 0, 0, 5) == 125 * (1 - 4 / 5) ** 3 // 1 + 1 == 1


def peft_pair(torch, peft, one, two, **settings):
    """A layer of weight 1 in float64 and two adapters, in PEFT and as an AdaptedLayer.

    Each adapter is (B, magnitude). A and s are 1; without a magnitude the adapter is plain LoRA
    and its change B.
    """
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=torch.float64))
    model, state = None, AdaptedLayer(np.ones((1, 1)))
    for name, (B, magnitude) in {"one": one, "two": two}.items():
        dora = magnitude is not None
        config = {"r": 1, "lora_alpha": 1, "target_modules": ["0"], "use_dora": dora} | settings
        if model is None:
            model = peft.get_peft_model(
                base, peft.LoraConfig(**config), name, autocast_adapter_dtype=False
            )
        else:
            model.add_adapter(name, peft.LoraConfig(**config), autocast_adapter_dtype=False)
        layer = model.base_model.model[0]
        layer.lora_A[name].weight.data.fill_(1)
        layer.lora_B[name].weight.data.fill_(B)
        parts = [np.ones((1, 1)), np.full((1, 1), float(B))]
        if dora:
            layer.lora_magnitude_vector[name].weight.data.fill_(magnitude)
            parts.append(np.full((1, 1), float(magnitude)))
        state = state.add(name, Adapter(tuple(parts), 1, *[DORA] * dora))
    layer.weight.data.fill_(1)
    model.base_model.set_adapter(["one", "two"])
    return model, layer, state.activate("one", "two")


@pytest.mark.finding("peft.merged-beside-active")
def test_peft_drops_the_active_adapters_beside_a_merged_one(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    assert model.eval()(one) == 1 + 2 + 4
    model.merge_adapter(["one"])
    assert model.active_adapters == ["one", "two"]
    assert model(one) == 1 + 2
    for merged in (state, state.merge("one"), state.merge()):
        assert merged.forward(np.ones((1, 1)))[0] == 1 + 2 + 4


@pytest.mark.finding("peft.unmerge-anew")
def test_peft_takes_away_what_an_adapter_is_by_then_and_not_what_it_added(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    model.merge_adapter()
    layer.set_scale("one", 3)
    model.unmerge_adapter()
    assert layer.weight == 1 + 2 - 3 * 2
    assert state.merge().set_scale("one", 3).unmerge().stored()[0] == 1


@pytest.mark.finding("peft.dora-in-a-row")
def test_peft_applies_dora_adapters_in_a_row_but_adds_them_where_they_drop_out(torch, peft):
    V, W, magnitude = {"one": 1 + 1, "two": 1 + 3}, 1, {"one": 4, "two": 2}
    g = {name: magnitude[name] / V[name] for name in V}
    settings = {"lora_dropout": 0.5}
    model, layer, state = peft_pair(torch, peft, (1, 4), (3, 2), **settings)
    one = layer.weight.new_ones(1, 1)
    for dropout in layer.lora_dropout.values():
        dropout.p = 0.0  # so that nothing is dropped, and training is evaluation
    added = W + (g["one"] * V["one"] - W) + (g["two"] * V["two"] - W)
    assert model.train()(one) == added == 5
    assert model.eval()(one) == g["two"] * (g["one"] * V["one"] + 3) == 3.5
    model.base_model.set_adapter(["two", "one"])
    assert model(one) == g["one"] * (g["two"] * V["two"] + 1) == 6
    model.merge_adapter()
    assert layer.weight == 6
    for way in (state, state.activate("two", "one"), state.merge("two"), state.merge()):
        assert way.forward(np.ones((1, 1)))[0] == added


def peft_alone(torch, peft, weight=1.0, **config):
    """An adapter's change and output, and those of it combined alone, W and x being 1."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.float64))
    config = peft.LoraConfig(target_modules=["0"], **config)
    model = peft.get_peft_model(base, config, "one", autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.weight.data.fill_(1)
    layer.bias.data.fill_(0)
    layer.lora_A["one"].weight.data.fill_(1)
    layer.lora_B["one"].weight.data.fill_(1)
    if layer.lora_bias["one"]:
        layer.lora_B["one"].bias.data.fill_(8)
    if layer.use_dora["one"]:
        layer.lora_magnitude_vector["one"].weight.data.fill_(8)
    model.add_weighted_adapter(["one"], [weight], "all", combination_type="linear")
    answers = []
    for name in ("one", "all"):
        model.set_adapter(name)
        answers += [layer.get_delta_weight(name).item(), model(layer.weight.new_ones(1, 1)).item()]
    return answers


@pytest.mark.finding("peft.combined-scale")
def test_peft_combines_an_adapter_of_rslora_into_one_of_another_scale(torch, peft):
    assert peft_alone(torch, peft, r=4, lora_alpha=4) == [4, 5, 4, 5]
    assert peft_alone(torch, peft, r=4, lora_alpha=8, use_rslora=True) == [16, 17, 32, 33]
    adapter = Adapter((np.ones((4, 1)), np.ones((1, 4))), scale(8, 4, rslora=True))
    assert combine_exact([adapter], [1]).change(np.ones((1, 1)), None)[0] == 16


@pytest.mark.finding("peft.combined-parts")
def test_peft_combines_an_adapter_without_its_bias_or_its_magnitude(torch, peft):
    assert peft_alone(torch, peft, r=1, lora_alpha=1, lora_bias=True) == [1, 2 + 8, 1, 2]
    W, b, one = np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1))
    alone = combine_exact([Adapter((one, one, 8 * one), 1, LORA_BIAS)], [1])
    assert AdaptedLayer(W, b, {"all": alone}, ("all",)).forward(one)[0] == 2 + 8

    change, answer, combined, other = peft_alone(torch, peft, r=1, lora_alpha=1, use_dora=True)
    assert (change, answer) == (combined, 8)
    assert other == 1  # the norm of W, where a new magnitude starts
    alone = combine_exact([Adapter((one, one, 8 * one), 1, DORA)], [1])
    assert AdaptedLayer(W, b, {"all": alone}, ("all",)).forward(one)[0] == 8


@pytest.mark.finding("peft.dora-zero-row")
def test_peft_makes_nan_of_a_row_of_zeros_under_dora(torch, peft):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    config = peft.LoraConfig(r=1, use_dora=True, target_modules=["0"])
    y = peft.get_peft_model(model, config)(torch.eye(2))
    assert torch.equal(y[:, 0], torch.tensor([3.0, 4.0]))
    assert y[:, 1].isnan().all()

    W = np.array([[3.0, 4.0], [0.0, 0.0]])
    base, P = start(DORA, "kaiming", np.random.default_rng(0), W, 1, 8.0)
    right, _ = dora_linear(np.eye(2), base, None, *P, 8.0)
    assert (right == W).all()


@pytest.mark.finding("peft.combined-weights")
def test_peft_rounds_the_weights_of_a_combination_to_float32(torch, peft):
    root = 1 + 2**-26
    change, _, combined, _ = peft_alone(torch, peft, root * root, r=1, lora_alpha=1)
    assert change == combined == 1
    one = np.ones((1, 1))
    A, B = combine_linear([(one, one, 1)], [root * root])
    assert B @ A == root * root > 1


def adapted(torch, peft, base, fill=1.0, **settings):
    """The layer that PEFT makes of base, with A and B full of one number unless it is None."""
    model = torch.nn.ModuleDict({"q": base})
    config = peft.LoraConfig(**{"r": 1, "lora_alpha": 1, "target_modules": ["q"]} | settings)
    layer = peft.inject_adapter_in_model(config, model).q
    for name, parameter in layer.named_parameters():
        if fill is not None and ("lora_A" in name or "lora_B" in name):
            parameter.data.fill_(fill)
    return layer


def convolution(torch, W, **settings):
    """A convolution of one dimension, without bias, of the kernels W."""
    W = torch.tensor(W)
    m, c, k = W.shape
    groups = settings.get("groups", 1)
    base = torch.nn.Conv1d(c * groups, m, k, bias=False, **settings)
    base.weight.data = W
    return base


@pytest.mark.finding("peft.conv-dilation")
def test_peft_moves_the_adapter_of_a_convolution_without_its_dilation(torch, peft):
    x, W, A = np.array([[[1.0, 2, 3, 4, 5]]]), np.zeros((1, 1, 3)), np.array([[1.0, 0, 0]])
    geometry = Geometry((3,), (1,), ((2, 2),), (2,))
    right, _ = adapted_conv(lora_linear, x, W, None, (A, np.ones((1, 1))), 1, None, geometry)
    assert right.tolist() == [[[0, 0, 1, 2, 3]]]

    for padding in ("same", 2):
        base = convolution(torch, W, dilation=2, padding=padding)
        layer = adapted(torch, peft, base)
        layer.lora_A["default"].weight.data = torch.from_numpy(A[None])
        if padding == "same":
            assert layer(torch.from_numpy(x)).tolist() == [[[0, 1, 2, 3, 4]]]
        else:
            with pytest.raises(RuntimeError, match="must match the size of tensor"):
                layer(torch.from_numpy(x))
        layer.merge()
        assert layer(torch.from_numpy(x)).tolist() == right.tolist()


@pytest.mark.finding("peft.conv-padding")
def test_peft_and_lycoris_pad_the_adapter_of_a_convolution_with_zeros(torch, peft, lycoris):
    x, W, A = np.array([[[1.0, 2, 3]]]), np.zeros((1, 1, 3)), np.array([[1.0, 0, 0]])
    geometry = Geometry((3,), (1,), ((1, 1),), (1,), "circular")
    right, _ = adapted_conv(lora_linear, x, W, None, (A, np.ones((1, 1))), 1, None, geometry)
    assert right.tolist() == [[[3, 1, 2]]]

    base = convolution(torch, W, padding=1, padding_mode="circular")
    other = lycoris.modules.locon.LoConModule("q", base, lora_dim=1).double()
    other.lora_down.weight.data = torch.from_numpy(A[None])
    other.lora_up.weight.data.fill_(1)
    layer = adapted(torch, peft, base)
    layer.lora_A["default"].weight.data = torch.from_numpy(A[None])
    for found in (layer, other):
        assert found(torch.from_numpy(x)).tolist() == [[[0, 1, 2]]]
    layer.merge()
    assert layer(torch.from_numpy(x)).tolist() == right.tolist()


@pytest.mark.finding("peft.dora-conv-padding")
def test_peft_pads_the_base_of_a_dora_convolution_with_zeros_in_training(torch, peft):
    x, W = np.array([[[1.0, 2, 3]]]), np.array([[[1.0, 0, 0]]])
    geometry = Geometry((3,), (1,), ((1, 1),), (1,), "circular")
    P = np.zeros((1, 3)), np.ones((1, 1)), np.array([[2.0]])
    right, _ = adapted_conv(dora_linear, x, W, None, P, 1, np.ones_like(x), geometry)
    assert right.tolist() == [[[6, 2, 4]]]

    base = convolution(torch, W, padding=1, padding_mode="circular")
    layer = adapted(torch, peft, base, use_dora=True, lora_dropout=0.5)
    layer.lora_A["default"].weight.data.fill_(0)
    layer.lora_magnitude_vector["default"].weight.data.fill_(2)
    layer.lora_dropout["default"].p = 0.0
    assert layer.train()(torch.from_numpy(x)).tolist() == [[[3, 2, 4]]]
    assert layer.eval()(torch.from_numpy(x)).tolist() == right.tolist()


@pytest.mark.finding("peft.dora-conv-groups")
def test_peft_takes_doras_norms_of_another_matrix_in_groups(torch, peft):
    x, W = np.array([[[1.0]], [[1.0]]]), np.full((2, 1, 1), 3.0)
    A, B, m = np.array([[0.0, 4], [0, 0]]), np.ones((2, 1)), np.array([[15.0], [21]])
    geometry = Geometry((1,), (1,), ((0, 0),), (1,))
    right, _ = adapted_conv(dora_linear, x, W, None, (A, B, m), 1, None, geometry, groups=2)
    V = np.array([[3, 4], [0, 3]])  # of norms 5 and 3
    assert (right[:, 0] == m / [[5], [3]] * V @ x[:, 0]).all()

    base = convolution(torch, W, groups=2)
    with pytest.warns(UserWarning, match="Merging is not supported"):
        layer = adapted(torch, peft, base, r=2, lora_alpha=2, use_dora=True)
    layer.lora_A["default"].weight.data = torch.from_numpy(A[:, :, None])
    layer.lora_magnitude_vector["default"].weight.data = torch.from_numpy(m[None])
    found = layer(torch.from_numpy(x.transpose(1, 0, 2)))
    assert found.ravel().tolist() == (m / [[3], [7]] * V @ x[:, 0]).ravel().tolist()


@pytest.mark.finding("peft.olora-transposed")
def test_peft_starts_olora_from_the_transpose_of_a_weight_stored_in_out(torch, transformers, peft):
    W, x = np.array([[0, 1], [4, 0]], np.float32), np.array([[1], [0]], np.float32)
    right, _ = linear(x, W)
    R, A, B = olora(W, 1, 1)
    assert same(lora_linear(x, R, None, A, B, 1)[0], right)

    def started(W):
        base = transformers.pytorch_utils.Conv1D(*W.shape)
        base.weight.data = torch.from_numpy(W.T.copy())
        settings = {"init_lora_weights": "olora", "fan_in_fan_out": True}
        return adapted(torch, peft, base, fill=None, **settings)

    assert right.T.tolist() == [[0, 4]]
    assert started(W)(torch.from_numpy(x.T)).tolist() == [[0, 5]]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        started(np.ones((2, 3), np.float32))(torch.ones(1, 3))


@pytest.mark.finding("peft.embedding-start")
def test_peft_starts_an_embedding_as_lora_whatever_start_is_asked_for(torch, peft):
    E = np.array([[4, 0, 0], [0, 1, 0]], np.float32)
    R, A, B = pissa(E.T, 1, 1)
    assert (R != E.T).any()
    assert A.any()
    assert B.any()
    for init in ("pissa", "olora", "orthogonal", "gaussian"):
        base = torch.nn.Embedding(2, 3)
        base.weight.data = torch.from_numpy(E.copy())
        layer = adapted(torch, peft, base, fill=None, r=2, init_lora_weights=init)
        assert same(layer.weight.detach(), E)
        assert not layer.lora_embedding_A["default"].any()


@pytest.mark.finding("peft.pissa-tied")
def test_peft_takes_pissas_part_out_of_the_embedding_that_is_tied_to_a_head(torch, peft):
    W, ids = np.array([[4, 0], [0, 1]], np.float32), np.array([0])
    embed, head = torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2, bias=False)
    embed.weight.data = torch.from_numpy(W.copy())
    head.weight = embed.weight
    h, _ = embedding(ids, W)
    right, _ = linear(h, W)
    assert head(embed(torch.from_numpy(ids))).tolist() == right.T.tolist() == [[16, 0]]

    R, A, B = pissa(W, 1, 1)
    assert same(lora_linear(h, R, None, A, B, 1)[0], right)
    layer = adapted(torch, peft, head, fill=None, init_lora_weights="pissa")
    assert layer(torch.from_numpy(h.T)).tolist() == right.T.tolist()
    assert layer(embed(torch.from_numpy(ids))).tolist() == [[0, 0]]


def experts(torch, W, transposed):
    """A module of one parameter W (e, out, in), or (e, in, out) if transposed; all add up."""

    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.is_transposed = transposed
            self.weight = torch.nn.Parameter(torch.tensor(W))

        def forward(self, x):
            return sum(x @ (w if self.is_transposed else w.T) for w in self.weight)

    return Experts()


PARAMETER = {"target_modules": [], "target_parameters": ["q.weight"]}


@pytest.mark.finding("peft.single-expert")
def test_peft_adds_the_transpose_to_the_only_expert_of_a_weight_stored_in_out(torch, peft):
    x, A, B = np.array([[1.0], [0]]), np.array([[1.0, 0]]), np.array([[0.0], [1]])
    right, _ = lora_linear(x, np.zeros((2, 2)), None, A, B, 1)
    assert right.T.tolist() == [[0, 1]]

    def found(count):
        base = experts(torch, np.zeros((count, 2, 2)), transposed=True)
        layer = adapted(torch, peft, base, fill=0.0, **PARAMETER)
        layer.lora_A["default"].weight.data[:1] = torch.from_numpy(A)
        layer.lora_B["default"].weight.data[:, :1] = torch.from_numpy(B)
        return layer(torch.from_numpy(x.T)).tolist()

    assert found(count=2) == right.T.tolist()
    assert found(count=1) == [[0, 0]]
    layer = adapted(torch, peft, experts(torch, np.zeros((1, 3, 2)), transposed=True), **PARAMETER)
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        layer(torch.ones(1, 3, dtype=torch.float64))


@pytest.mark.finding("peft.experts-orthogonal")
def test_peft_gives_experts_that_start_orthogonal_a_share_of_the_rank_and_no_zero(torch, peft):
    base = experts(torch, np.zeros((2, 3, 3)), transposed=False)
    settings = {"r": 2, "init_lora_weights": "orthogonal", **PARAMETER}
    layer = adapted(torch, peft, base, fill=None, **settings)
    assert layer.lora_A["default"].weight.shape == (2, 3)
    plain = adapted(torch, peft, base, fill=None, r=2, **PARAMETER)
    assert plain.lora_A["default"].weight.shape == (4, 3)  # two rows for each of two experts
    for delta in layer.get_delta_weight("default").detach().numpy():
        assert abs(delta).max() > 0
        assert np.linalg.matrix_rank(delta) == 1
    A, B = orthogonal(np.random.default_rng(0), 2, 3, 3)
    # Rows of a computed Q are orthogonal up to γ(8 r²) (Higham 2002, theorem 19.4), A and B round.
    bound = (8 * 2**2 + 8) * 2**-52
    assert abs(B @ A).max() <= bound * np.linalg.norm(B) * np.linalg.norm(A)


@pytest.mark.finding("peft.refused-merge")
def test_peft_leaves_the_weight_merged_where_it_refuses_to_merge(torch, peft):
    def refused(safe):
        base = torch.nn.Linear(1, 1, bias=False)
        base.weight.data.fill_(1)
        with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
            layer = adapted(torch, peft, base, lora_bias=True)
        assert layer(torch.ones(1, 1)) == right
        with pytest.raises(RuntimeError, match="Impossible to merge"):
            layer.merge(safe_merge=safe)
        assert not layer.merged
        return layer(torch.ones(1, 1))

    one = np.ones((1, 1))
    right, _ = lora_bias_linear(one, one, None, one, one, one, 1)
    assert refused(safe=True) == right == 3
    assert refused(safe=False) == 4
    assert merge_lora_bias(one, None, one, one, one, 1) == (2, 1)  # a bias of its own


@pytest.mark.finding("peft.max-norm")
def test_peft_shortens_lora_a_in_the_forward_of_an_embedding_with_max_norm(torch, peft):
    layer = adapted(torch, peft, torch.nn.Embedding(1, 1, max_norm=1.0), fill=None)
    layer.weight.data.fill_(0)
    layer.lora_embedding_A["default"].data.fill_(2)
    layer.lora_embedding_B["default"].data.fill_(0.5)
    row = merge_weight(*(np.array([[value]]) for value in (0.0, 2.0, 0.5)), 1)
    right, _ = embedding(np.array([0]), row)
    assert right == 1  # no longer than max_norm
    assert layer(torch.tensor([0])).item() < right
    assert layer.lora_embedding_A["default"] < 2


@pytest.mark.finding("peft.attention-output")
def test_peft_adds_the_change_of_an_attentions_output_twice(torch, peft):
    base = torch.nn.MultiheadAttention(1, 1, bias=False, batch_first=True)
    for weight in (base.in_proj_weight, base.out_proj.weight):
        weight.data.fill_(1)
    layer = adapted(torch, peft, base, fill=0.0)
    for factor in (layer.base_layer.out_proj.lora_A, layer.base_layer.out_proj.lora_B):
        factor["default"].weight.data.fill_(1)
    one = np.ones((1, 1))
    values, _ = linear(one, one)
    right, _ = lora_linear(values, one, None, one, one, 1)
    assert right == 2
    x = torch.ones(1, 1, 1, dtype=layer.in_proj_weight.dtype)
    assert layer(x, x, x)[0].item() == 3
    layer.merge()
    assert layer(x, x, x)[0].item() == 3


@pytest.mark.finding("peft.encoder-fast-path")
def test_peft_shows_an_encoders_layer_the_weight_without_the_adapter(torch, peft):
    torch.manual_seed(0)
    base = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double()
    plain = copy.deepcopy(base).eval()
    config = peft.LoraConfig(r=2, target_modules=["linear1"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, base)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        trained, evaluated, of_base = model.train()(x), model.eval()(x), plain(x)
        assert torch.equal(evaluated, of_base)
        assert not torch.allclose(trained, of_base)
        model.linear1.merge()
        assert torch.allclose(model(x), trained)


@pytest.mark.finding("peft.pointwise-merge")
def test_peft_fails_to_merge_a_pointwise_convolution_of_three_dimensions(torch, peft):
    def layer_of(*kernel):
        layer = adapted(torch, peft, torch.nn.Conv3d(2, 3, kernel, bias=False), fill=1.0)
        layer.weight.data.fill_(0)
        return layer

    x = torch.ones(1, 2, 1, 1, 3, dtype=torch.float64)
    for kernel in ((1, 1, 1), (1, 1, 3)):
        layer = layer_of(*kernel)
        assert (layer(x.to(layer.weight.dtype)) == 2 * kernel[2]).all()
        with pytest.raises(
            RuntimeError, match=r"size for first two dimensions|cannot be multiplied"
        ):
            layer.merge()
    layer = layer_of(1, 3, 1)
    layer.merge()
    assert (layer.weight == 1).all()


@pytest.fixture
def without_gpu(torch, bitsandbytes, monkeypatch):
    """LoftQ's start in PEFT asks for a GPU, come what may: here that is the CPU."""
    for kind in (torch.Tensor, bitsandbytes.nn.Params4bit):

        def to(tensor, *at, to=kind.to, **named):
            named |= {"device": "cpu"} if named.get("device") == "cuda" else {}
            return to(tensor, *("cpu" if place == "cuda" else place for place in at), **named)

        monkeypatch.setattr(kind, "to", to)


LOFTQ = {"init_lora_weights": "loftq", "fill": None}


@pytest.mark.finding("peft.loftq-scale")
@pytest.mark.usefixtures("without_gpu")
def test_peft_starts_loftq_without_its_scale(torch, peft):
    W = np.zeros((1, 64), np.float32)
    W[0, :2] = 1, 2**-6  # NF4 has the first, and 0 for the second
    x = np.float32(W.T != 0)

    def found(alpha):
        base = torch.nn.Linear(64, 1, bias=False)
        base.weight.data = torch.from_numpy(W.copy())
        settings = {"lora_alpha": alpha, "loftq_config": peft.LoftQConfig()}
        return adapted(torch, peft, base, **LOFTQ, **settings)(torch.from_numpy(x.T))

    right, _ = linear(x, W)
    assert found(alpha=1) == right == 1 + 2**-6
    assert found(alpha=4) == 1 + 4 * 2**-6
    Q, A, B = loftq(W, 1, 4, lambda M: dequantize(quantize(M, "nf4")))
    assert lora_linear(x, Q, None, A, B, 4)[0] == right


@pytest.mark.finding("peft.loftq-transposed")
@pytest.mark.usefixtures("without_gpu")
def test_peft_starts_loftq_from_the_transpose_of_a_weight_stored_in_out(torch, transformers, peft):
    base = transformers.pytorch_utils.Conv1D(3, 64)
    settings = {"fan_in_fan_out": True, "loftq_config": peft.LoftQConfig()}
    layer = adapted(torch, peft, base, **LOFTQ, **settings)
    A, B = (getattr(layer, f"lora_{end}")["default"].weight for end in "AB")
    assert (A.shape, B.shape) == ((1, 3), (64, 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(1, 64))
    _, A, B = loftq(np.ones((3, 64), np.float32), 1, 1, lambda M: M)
    assert (A.shape, B.shape) == ((1, 64), (3, 1))


@pytest.mark.finding("peft.unmerge-rounds")
def test_peft_and_loralib_do_not_restore_a_weight_by_unmerging(torch, peft, loralib):
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
    merged = merge(W, TrainableSpec(scale={"q": 1}))
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


@pytest.mark.finding("loralib.gradient-after-eval")
def test_loralib_gives_an_adapter_no_gradient_after_eval(torch, loralib):
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


@pytest.mark.finding("loralib.conv-dimensions")
@pytest.mark.parametrize(("kind", "dimensions"), [("Conv1d", 1), ("Conv3d", 3)])
def test_loralib_fails_in_convolutions_of_one_and_three_dimensions(
    torch, loralib, kind, dimensions
):
    def sizes(layer):
        return layer.conv.weight.numel(), (layer.lora_B @ layer.lora_A).numel()

    layer = getattr(loralib, kind)(4, 3, kernel_size=3, **LORA)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        layer(torch.ones(1, 4, *[5] * dimensions))
    weight, delta = sizes(layer)
    assert weight != delta
    weight, delta = sizes(loralib.Conv2d(4, 3, kernel_size=3, **LORA))
    assert weight == delta


@pytest.mark.finding("loralib.max-norm")
def test_loralib_shortens_lora_a_in_the_forward_of_an_embedding_with_max_norm(torch, loralib):
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


@pytest.mark.finding("bitsandbytes.rows-no-blocks")
def test_bitsandbytes_gives_an_entry_the_scale_of_another_block_where_rows_are_no_blocks(
    torch, bitsandbytes
):
    F = bitsandbytes.functional
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the kernel is that of processors with AVX-512")
    W = np.repeat([1, 2, 4], 64).astype(np.float32)  # three blocks, each of one number
    for shape in ((3, 64), (4, 48)):
        codes, state = F.quantize_4bit(torch.from_numpy(W.reshape(shape)), quant_type="nf4")
        assert state.absmax.tolist() == [1, 2, 4]
        q = quantize(W.reshape(shape), "nf4")
        assert (dequantize(q).ravel() == W).all()
        assert codes.numpy().ravel().tolist() == q.codes.tolist()
        found = F.dequantize_4bit(codes, state).numpy().ravel()
        assert (found == W).all() if shape == (3, 64) else (found == 1).all()


@pytest.mark.finding("bitsandbytes.zero")
def test_bitsandbytes_does_not_find_zero_in_a_map_that_has_it(torch, bitsandbytes):
    F = bitsandbytes.functional
    t = F.create_dynamic_map()
    assert 0 in t
    codes, state = F.quantize_blockwise(torch.tensor([0.0, 1.0]), blocksize=256)
    zero, one = F.dequantize_blockwise(codes, state).tolist()
    assert one == 1
    assert zero == t[t > 0][3]  # three values are nearer to 0, and 0 itself
    v = np.array([0, 1], np.float32)
    for points, wanted in ((None, 0), (2**16, zero)):
        codes, absmax = quantize_dynamic(v, points=points)
        assert dequantize_dynamic(codes, absmax).tolist() == [wanted, 1]


@pytest.mark.finding("peft.lorafa-bfloat16")
def test_peft_rounds_lorafas_gradient_to_bfloat16(torch, peft):
    from peft.optimizers import create_lorafa_optimizer

    base = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    optimizer = create_lorafa_optimizer(model, r=1, lora_alpha=1, lr=0.5)
    layer = model.base_model.model[0]
    layer.lora_A.default.weight.data.fill_(1)  # A Aᵀ = 4
    dB = np.array([[4 + 2**-8]], np.float32)  # 10 digits of the 24 in float32, one too many in 8
    layer.lora_B.default.weight.grad = torch.tensor(dB)
    optimizer.step()
    (state,) = optimizer.state.values()
    g = lorafa_gradient(dB, np.ones((1, 4), np.float32), 1)
    assert g == 1 + 2**-10
    first = {v: torch.zeros(1, 1).add_(torch.tensor([[v]]), alpha=1 - 0.9) for v in (1.0, g.item())}
    assert first[1.0] != first[g.item()]
    assert state["exp_avg_B"] == first[1.0]


@pytest.fixture
def lycoris(torch):
    return optional("lycoris")


@pytest.fixture
def mlx_lm():
    core = optional("mlx.core")
    models = optional("mlx_lm.models.llama")
    tuner = optional("mlx_lm.tuner.utils")
    core.set_default_device(core.cpu)
    sizes = {"hidden_size": 2, "num_hidden_layers": 2, "intermediate_size": 2, "vocab_size": 3}
    args = models.ModelArgs("llama", num_attention_heads=1, rms_norm_eps=1e-5, **sizes)
    return SimpleNamespace(
        core=core, args=models.ModelArgs, model=lambda: models.Model(args), tuner=tuner
    )


def identity(torch, factor=1.0):
    """A model of one projection, the identity times a factor."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.eye_(model[0].weight).data.mul_(factor)
    return model


@pytest.mark.finding("lycoris.dora-epsilon")
def test_lycoris_starts_dora_as_another_function_where_rows_are_small(torch, lycoris):
    small = torch.finfo(torch.float32).eps
    model = identity(torch, small)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, dora_wd=True)
    network.apply_to()
    W, B = small * np.eye(2), np.zeros((2, 2))
    right, _ = dora_linear(np.eye(2), W, None, np.eye(2), B, small * np.ones((2, 1)), 1 / 2)
    assert (right == W).all()
    assert (model(torch.eye(2)).detach().numpy() == W / 2).all()


@pytest.mark.finding("mlx-lm.rope")
def test_mlx_lm_passes_over_the_base_of_rope_in_rope_parameters(mlx_lm):
    c = Llama(vocab=3, d=4, layers=1, heads=1, ffn=2, kv_heads=1, head_dim=4, theta=5e5)
    written = config_to_json(c)
    assert written["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}
    assert mlx_lm.args.from_dict(written).rope_theta == written.pop("rope_theta") == 5e5
    taken = mlx_lm.args.from_dict(written).rope_theta
    assert taken == 1e4
    # The second pair of features turns by θ^(-1/2) per token.
    one = np.ones((1, 1))
    right, wrong = (rope_tables(one, 4, theta, float)[1] for theta in (c.theta, taken))
    assert (right != wrong).any()


@pytest.mark.finding("peft.saved-inside-saved")
def test_peft_trains_nothing_of_a_module_to_save_inside_another(torch, peft):
    def adapted(saved):
        block = torch.nn.Sequential(OrderedDict(inner=torch.nn.Linear(2, 2, bias=False)))
        base = torch.nn.Sequential(OrderedDict(q=torch.nn.Linear(2, 2), block=block))
        config = peft.LoraConfig(r=1, target_modules=["q"], modules_to_save=saved)
        return peft.get_peft_model(base, config)

    for saved, count in ((["block"], 1), (["block", "inner"], 0)):
        model = adapted(saved)
        model(torch.ones(1, 2)).sum().backward()
        moved = [name for name, p in model.named_parameters() if p.grad is not None]
        assert len([name for name in moved if "lora" not in name]) == count
        state = peft.get_peft_model_state_dict(model)
        assert "base_model.model.block.inner.weight" in state
        fails = pytest.raises(KeyError, match=r"model\.block\.inner\.weight")
        with nullcontext() if count else fails:
            peft.set_peft_model_state_dict(adapted(saved), state)


@pytest.mark.finding("peft.qwen2-replication")
def test_peft_fails_where_the_layers_of_a_qwen2_are_replicated(torch, peft, transformers):
    settings = {**TINY, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config = peft.LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
    ids = torch.zeros((1, 2), dtype=int)
    for kind in ("Llama", "Qwen2"):
        own = getattr(transformers, f"{kind}Config")(**settings)
        base = getattr(transformers, f"{kind}ForCausalLM")(own)
        with warnings.catch_warnings():  # of transformers' next release
            warnings.simplefilter("ignore", FutureWarning)
            model = peft.get_peft_model(base, config)
        if kind == "Llama":
            assert model(ids).logits.isfinite().all()
        else:
            with pytest.raises(IndexError):
                model(ids)


@pytest.mark.finding("peft.last-deleted")
def test_peft_fails_once_its_last_adapter_is_deleted(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    for name in ("two", "one"):
        model.delete_adapter(name)
        state = state.delete(name)
    with pytest.raises(KeyError, match="one"):
        model(one)
    assert model.base_model(one) == 1  # the layer itself is the base again
    assert state.forward(np.ones((1, 1)))[0] == 1


@pytest.mark.finding("peft.deleted-activates")
def test_peft_activates_another_adapter_for_a_deleted_one(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    model.base_model.set_adapter("one")
    assert model(one) == 1 + 2
    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert model(one) == 1 + 4
    assert state.activate("one").delete("one").forward(np.ones((1, 1)))[0] == 1


def hot_swapped(peft, torch, model, alpha):
    """The model whose adapter "one" is replaced by one of ones and of this alpha."""
    hotswap = optional("peft.utils.hotswap").hotswap_adapter_from_state_dict
    state = {f"base_model.model.0.lora_{part}.one.weight": torch.ones(1, 1) for part in "AB"}
    hotswap(model, state, "one", peft.LoraConfig(r=1, lora_alpha=alpha))
    return model


@pytest.mark.finding("peft.hotswap-similar")
def test_peft_empties_adapters_of_similar_names_when_one_is_hot_swapped(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    config = peft.LoraConfig(r=1, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model.add_adapter("onetwo", config)
    model.base_model.set_adapter("onetwo")
    before = model(one)
    assert before != 1
    hot_swapped(peft, torch, model, 2)
    assert model(one) == 1  # the base alone
    again = state.swap("one", state.adapters["two"])
    assert again.activate("two").forward(np.ones((1, 1)))[0] == 1 + 4


@pytest.mark.finding("peft.hotswap-scale")
def test_peft_scales_and_saves_a_hot_swapped_adapter_as_the_one_before(torch, peft, tmp_path):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    model.base_model.set_adapter("one")
    hot_swapped(peft, torch, model, 8)
    assert model(one) == 1 + 8
    layer = model.base_model.model[0]
    layer.set_scale("one", 1.0)
    assert model(one) == 1 + 1
    model.save_pretrained(tmp_path, selected_adapters=["one"])
    assert peft.LoraConfig.from_pretrained(tmp_path / "one").lora_alpha == 1
    swapped = state.swap("one", Adapter((np.ones((1, 1)), np.ones((1, 1))), 8))
    assert swapped.activate("one").forward(np.ones((1, 1)))[0] == 1 + 8


@pytest.mark.finding("peft.unknown-adapter")
def test_peft_passes_over_unknown_names_where_several_are_activated(torch, peft):
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("three")
    model.base_model.set_adapter(["one", "three"])
    assert model(one) == 1 + 2
    model.base_model.set_adapter(["three"])
    assert model(one) == 1
    with pytest.raises(ValueError, match="no adapter 'three'"):
        state.activate("one", "three")


def packed_layer(torch, bitsandbytes, W):
    """A four-bit layer of W, in which entries that are alone in their blocks are exact."""
    nn = bitsandbytes.nn
    layer = nn.Linear4bit(W.shape[1], len(W), compute_dtype=W.dtype, quant_type="nf4")
    how = {"quant_type": "nf4", "compress_statistics": False, "requires_grad": False}
    layer.weight = nn.Params4bit(W, **how).to("cpu")
    layer.bias = torch.nn.Parameter(torch.zeros(len(W), dtype=W.dtype))
    return layer


def packs(bitsandbytes):
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("the packing is that of processors with AVX-512 for bfloat16")


@pytest.mark.finding("bitsandbytes.packed-gradient")
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_bitsandbytes_loses_the_gradient_of_a_layer_that_was_evaluated(torch, bitsandbytes):
    packs(bitsandbytes)
    W = torch.zeros(32, 128)
    W[0, ::64] = torch.tensor([2.0, 3.0])
    layer = packed_layer(torch, bitsandbytes, W)
    layer.bias = None  # which would be added in place, and with an error

    def gradient():
        x = torch.zeros(1, 128, requires_grad=True)
        layer.train()(x).sum().backward()
        return x.grad if x.grad is None else x.grad[0, ::64].tolist()

    assert gradient() == [2, 3]
    with torch.no_grad():
        layer.eval()(torch.zeros(1, 128))
    assert gradient() is None


@pytest.mark.finding("mlx-lm.quantized-sum")
def test_mlx_lm_sums_a_quantized_product_in_half_precision(mlx_lm):
    mx = mlx_lm.core
    W, x = np.zeros((1, 64), np.float32), np.zeros((1, 64), np.float32)
    W[0, [0, 1, 2, 63]] = 1, 1, 1, 15  # steps of 1: each is exact
    x[0, :3] = 256, 1, 1
    with mx.stream(mx.cpu):
        w, x = (mx.array(v).astype(mx.bfloat16) for v in (W, x))
        held = mx.quantize(w, 64, 4)
        whole = mx.dequantize(*held, 64, 4)
        assert mx.array_equal(whole, w).item()
        assert (x @ whole.T).item() == 258
        product = mx.quantized_matmul(x, *held, transpose=True, group_size=64, bits=4)
    assert product.item() == 256


@pytest.fixture
def jax():
    return optional("jax")


@pytest.mark.finding("mlx-lm.dora-dropout")
def test_mlx_lm_drops_nothing_of_the_base_that_dora_rescales(mlx_lm, monkeypatch):
    mx, layers = mlx_lm.core, optional("mlx_lm.tuner.dora")
    W, x, B = np.array([[3.0, 4]]), np.ones((2, 1)), np.zeros((1, 1))
    base = optional("mlx.nn").Linear(2, 1, bias=False)
    base.weight = mx.array(W)
    layer = layers.DoRALinear.from_base(base, r=1, dropout=0.5).train()
    layer.m = 2 * layer.m  # of a row of norm 5
    found, right = [], []
    for keep in ([1, 1], [1, 0], [0, 1], [0, 0]):
        monkeypatch.setattr(mx.random, "bernoulli", lambda *_, keep=keep: mx.array([keep]))
        found.append(layer(mx.array(x.T)).item())
        K = 2.0 * np.array(keep)[:, None]
        y, _ = dora_linear(x, W, None, x.T, B, np.array([[10.0]]), 1.0, K)
        right.append(y.item())
    assert found == [14, 14, 14, 14]
    assert right == [7 + 14, 7 + 6, 7 + 8, 7]
    assert np.mean(found) == np.mean(right)


@pytest.fixture
def sglang():
    """A function that reads an adapter of q and what is saved beside it by SGLang."""
    lora = optional("sglang.srt.lora.lora")
    config = optional("sglang.srt.lora.lora_config").LoRAConfig

    def read(tensors, **settings):
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q"]} | settings
        base = SimpleNamespace(num_hidden_layers=1)
        adapter = lora.LoRAAdapter("one", config.from_dict(said), base, None, None)
        for name, tensor in tensors.items():
            adapter._process_weight(name, tensor)
        return adapter

    return read


def function_at(source, line):
    """The dotted name of the innermost function or class that the line is in."""
    names = []

    def look(node):
        for inner in ast.iter_child_nodes(node):
            first = getattr(inner, "lineno", line) - len(getattr(inner, "decorator_list", ()))
            if first <= line <= getattr(inner, "end_lineno", line):
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    names.append(inner.name)
                look(inner)

    look(ast.parse(source))
    return ".".join(names)


@pytest.fixture
def axolotl(torch, peft):
    return optional("axolotl.kernels.lora")


def adapted_by_peft(torch, peft, module, **settings):
    """A layer of PEFT's with the rank 1 and the scale 1."""
    config = peft.LoraConfig(target_modules=["0"], r=1, lora_alpha=1, **settings)
    return peft.get_peft_model(torch.nn.Sequential(module), config).base_model.model[0]


def fill_all(values):
    for parameter, value in values.items():
        parameter.data.fill_(value)


@pytest.mark.finding("axolotl.down-dropout")
def test_axolotl_drops_nothing_of_the_down_projections_branch(torch, peft, axolotl, monkeypatch):
    silu = torch.nn.functional.silu
    monkeypatch.setattr(axolotl, "swiglu_forward", lambda gate, up: silu(gate) * up)
    mlp = torch.nn.Module()
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = torch.nn.Linear(1, 1, bias=False)
        setattr(mlp, name, adapted_by_peft(torch, peft, linear, lora_dropout=0.5))
        fill_all({linear.weight: name != "down_proj"})
    down, one = mlp.down_proj, torch.ones(1, 1, 1)
    fill_all({down.lora_A["default"].weight: 1, down.lora_B["default"].weight: 1})
    h = silu(one)
    theirs = {axolotl.apply_lora_mlp_swiglu(mlp, one).item() for _ in range(30)}
    assert theirs == {h.item()}
    assert {down(h).item() for _ in range(30)} == {0, 2 * h.item()}


@pytest.mark.finding("axolotl.dora-norm-kept")
def test_axolotl_keeps_doras_norm_after_a_change_through_data(torch, peft, axolotl):
    base = torch.nn.Linear(1, 1, bias=False)
    layer = adapted_by_peft(torch, peft, base, use_dora=True)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    fill_all({base.weight: 1, A: 1, B: 0, magnitude: 1})
    one = torch.ones(1, 1, 1)
    assert layer(one) == axolotl.apply_lora_linear(layer, one) == 1
    B.data.fill_(1)
    right = dora_linear(*(np.ones((1, 1)) for _ in "xWbABm"), 1)[0] - 1  # b = 1
    assert layer(one).item() == right == 1
    assert axolotl.apply_lora_linear(layer, one) == 2


@pytest.fixture
def adapters(torch):
    return optional("adapters")


CODES = [finding for finding in FINDINGS.values() if finding.code]


@pytest.mark.parametrize("finding", CODES, ids=[finding.id for finding in CODES])
def test_the_cause_of_a_finding_is_where_it_says(finding):
    library = LIBRARIES[finding.library]
    place, _, function = finding.code.partition(" ")
    file, _, line = place.partition(":")
    try:
        installed = distribution(library.distribution)
    except PackageNotFoundError:
        pytest.skip(f"{library.distribution} is not installed")
    if installed.version != finding.seen:
        pytest.skip(f"{library.distribution} is {installed.version}")
    source = Path(str(installed.locate_file(file))).read_text()
    assert function_at(source, int(line)) == function or not function


def test_the_function_of_a_line_is_found():
    source = "class A:\n    def f(self):\n        return 1\n\n\ndef g():\n    pass\n"
    assert [function_at(source, line) for line in (1, 3, 6, 7)] == ["A", "A.f", "g", "g"]
    assert function_at(source, 4) == ""
