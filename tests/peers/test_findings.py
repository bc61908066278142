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

import copy
import json
import pickle
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from extras import optional
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from minilora import Batch, TrainableSpec, logits, lora_linear, merge, scale, unmerge
from minilora.io.formats.huggingface import config_to_json, read_model
from minilora.spec.adalora import adalora_scale, allocate, budget, orthogonality
from minilora.spec.initialization import loftq, olora, orthogonal, pissa
from minilora.spec.layers import Geometry, adapted_conv, with_tokens
from minilora.spec.lora import merge_weight, twin
from minilora.spec.models import Llama
from minilora.spec.multi_adapter import AdaptedLayer, Adapter, combine_exact, combine_linear
from minilora.spec.ops import attention, cross_entropy, embedding, linear, rmsnorm, rope_tables
from minilora.spec.optim import AdamState, adamw, lorafa_gradient, loraplus_rates, schedule
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


def test_transformers_computes_the_loss_of_a_float64_model_in_float32(torch, transformers):
    """The loss of a float64 model is computed in float32.

    `ForCausalLMLoss` starts with `logits.float()`, whatever the model's dtype.

    **Right.** The losses of two labels share the logarithm of the sum, so that $L_i - L_j = z_j -
    z_i$. Logits that float32 cannot tell apart get the same loss.

    **Consequence.** For half precision the cast is a gain. In float64, finite differences,
    `gradcheck` and reference values that pass through `.loss` have float32's accuracy. Take the
    logits, and compute the loss from them.

    Found by `verify peft`: `model.gpt2`, `model.llama`, `train.prompt`.

    Seen in transformers 5.24.0.
    """
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
    """A float64 Llama computes RMSNorm in float32.

    RMSNorm casts its input to float32, RoPE its angles and tables, and the eager attention its
    softmax. The maintainers give the reason, the stability of half precision, in issues
    [24519](https://github.com/huggingface/transformers/issues/24519) and
    [30186](https://github.com/huggingface/transformers/issues/30186).

    **Right.** RMSNorm divides a token's features by one number, so it keeps their order.

    **Consequence.** A Llama in float64 is no reference for another one: its logits and gradients
    carry float32's rounding. minilora's own comparison replaces the casts
    (`tests/test_against_transformers.py`), and `minilora verify` counts them as known.

    Found by `verify peft`: `model.llama`, `grad-flow.first-layer`.

    Seen in transformers 5.24.0.
    """
    x = np.array([[1], [1 + 2**-40]])
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(2, eps=1e-6).double()
    first, second = norm(torch.from_numpy(x.T))[0]
    assert first == second
    y, _ = rmsnorm(x, np.ones((2, 1)), eps=1e-6)
    assert y[0] < y[1]


def test_transformers_computes_rope_of_a_float64_llama_in_float32(torch, transformers):
    r"""A float64 Llama computes RoPE in float32.

    RoPE casts its angles and tables to float32.

    **Right.** RoPE's matrix is orthogonal: $\cos^2 + \sin^2 = 1$.

    Found by `verify peft`: `model.llama`, `grad-flow.first-layer`.

    Seen in transformers 5.24.0.
    """
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
    """A float64 Llama computes its softmax in float32.

    The eager attention casts its scores to float32.

    **Right.** Of two keys, softmax gives the one with the higher score more than half of the
    weight.

    Found by `verify peft`: `model.llama`, `grad-flow.first-layer`.

    Seen in transformers 5.24.0.
    """
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
    r"""Padding on the left makes a float64 Llama NaN.

    With eager attention the mask is filled with the least number of the model's dtype, and
    float64's is −∞ in the float32 softmax. A padding query at the left has no key besides, and
    its softmax is 0/0.

    **Right.** No real token attends to padding, so any finite answer for it is right. NaN is not:
    in the next layer the padding's value is NaN and its weight 0, and $0 \cdot \text{NaN} =
    \text{NaN}$.

    **Consequence.** From the second layer on, every token of such a sequence is NaN, and so is
    the batch's loss, which it is not in float32. Use `attn_implementation="sdpa"`, or pad on the
    right.

    Found by `verify peft`: `model.llama.padding`, `train.labels`.

    Seen in transformers 5.24.0.
    """
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


def test_transformers_ignores_the_warm_up_of_a_constant_schedule(torch, transformers):
    r"""The warm-up of a constant schedule is ignored.

    `get_scheduler("constant", …)` takes `num_warmup_steps` and drops it without a word. The
    library has another name for what is meant, `constant_with_warmup`.

    **Right.** A warm-up multiplies the rate of step $k$ by $k / \text{warmup}$, whatever follows.

    **Consequence.** Training starts at the full rate. The trainer's
    `lr_scheduler_type="constant"` with `warmup_steps` comes to the same function.

    Not asked by `verify`: the peers ask for a warm-up by the library's name for it,
    `constant_with_warmup`.

    Seen in transformers 5.24.0.
    """

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


def test_transformers_cosine_rises_again_after_its_end(torch, transformers):
    r"""A cosine schedule rises again after its end.

    `get_cosine_schedule_with_warmup` takes the progress $q = k / \text{total}$ as it is: beyond
    the last step, where $q > 1$, the rate goes up again, to the full one at twice the steps.

    **Right.** The rate falls over the steps that were announced, and has then fallen: $q =
    \min(1, k / \text{total})$, as the linear schedule of the same library has it.

    **Consequence.** A run that goes on for longer than its schedule was made for trains at a
    growing rate.

    Found by `verify peft`: `optimizer.cosine-schedule.past-end`.

    Seen in transformers 5.24.0.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, num_training_steps=4)
    rates = []
    for _ in range(9):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    right = [schedule("cosine", k, total=4) for k in range(9)]
    assert right[4:] == [0] * 5
    assert rates[4] < rates[5] < rates[6] < rates[7] < rates[8] == 1
    assert rates[2] == right[2] == 0.5


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
    r"""A weight decay given for LoRA+ becomes zero.

    `create_loraplus_optimizer` passes `weight_decay` on as the optimizer's default, but gives
    each group of parameters a decay of its own, `loraplus_weight_decay`, which is 0 unless given.
    The review of [PEFT 1915](https://github.com/huggingface/peft/pull/1915), which added the
    function, discusses what an ordinary `weight_decay` should do.

    **Right.** Without gradients AdamW is its decay alone, $p \leftarrow (1 - \eta\lambda)\,p$,
    each parameter with its own rate $\eta$.

    **Consequence.** Nothing decays, and nothing says so. Write `loraplus_weight_decay`; in
    [axolotl 4010](https://github.com/axolotl-ai-cloud/axolotl/issues/4010) a trainer did not.

    Not asked by `verify`: the peer gives a decay by the name that the library reads,
    `loraplus_weight_decay`.

    Seen in peft 0.21.2.
    """
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


def test_peft_loads_an_adapter_with_another_scale_than_it_was_trained_with(torch, peft, tmp_path):
    r"""A loaded adapter may have another scale than the saved one.

    `rank_pattern` and `alpha_pattern` map patterns to ranks and alphas, and the first pattern
    that fits a module counts. `save_pretrained` sorts their keys, so another one may come first
    when the adapter is loaded.

    **Right.** What is saved and loaded is the same function, with the same $s = \alpha / r$.

    **Consequence.** The branch of an adapter is scaled otherwise after loading, without a word.
    Write patterns of which only one fits each module. `read_adapter` reads what PEFT loads.

    Not asked by `verify`: no case saves patterns of which several fit one module.

    Seen in peft 0.21.2.
    """

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
    """A safe merge rounds twice.

    Beside a base in half precision, PEFT keeps adapters in float32. `merge_adapter()` adds the
    float32 delta and rounds the sum; with `safe_merge=True` the delta is rounded first, and then
    the sum. [PEFT 3396](https://github.com/huggingface/peft/pull/3396) describes the difference.

    **Right.** The merged weight is the number nearest to $W + sBA$, and rounding once gives it.

    **Consequence.** "Safe" means checked for NaN and infinity. It is the less accurate of the
    two, in the last place of some weights.

    Not asked by `verify`: the contract has no word for a safe merge, and the peer asks for none.

    Seen in peft 0.21.2.
    """
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
    """Layers are counted by their experts where they are outermost.

    `layers_to_transform` keeps the modules of some layers. Without `layers_pattern` the number is
    the first one that follows any part of the name but its first: in a bare model, whose names
    start with `layers.`, that of the expert. [PEFT
    3318](https://github.com/huggingface/peft/pull/3318) let the first number count, and [PEFT
    3610](https://github.com/huggingface/peft/issues/3610) is the same of `layers_pattern`, where
    it is mended.

    **Right.** A module lies in the same layer, whatever the model lies in.

    **Consequence.** Other modules are adapted than were asked for, without a word; in a bare
    model without experts none is, which is an error. Give `layers_pattern="layers"`.

    Not asked by `verify`: all names are drawn inside a tower, so that no layers are outermost.

    Seen in peft 0.21.2.
    """

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


def test_peft_adapts_the_head_where_another_projection_bears_the_end_of_its_name(
    torch, transformers, peft
):
    """The head is adapted where another projection bears the end of its name.

    "all-linear" is resolved to the names of all projections but the output head. These then match
    as any list does: a whole name or its dotted end.

    **Right.** "all-linear" leaves the output head out.

    **Consequence.** It needs a projection outside all blocks with such a name. Name the head in
    `exclude_modules`, which comes first.

    Not asked by `verify`: no projection is drawn whose name ends like that of the head.

    Seen in peft 0.21.2.
    """

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
    """What only ends like a module to save is trained in full.

    `modules_to_save` is compared with the end of each name, with no dot before it, where a target
    is compared with a dotted end. In [PEFT 1917](https://github.com/huggingface/peft/issues/1917)
    it met a user.

    **Right.** A name in a list means one thing: the module of that name or of that dotted end.

    **Consequence.** Another module is trained and saved as a whole, without a word; if it is
    adapted, PEFT stops with an error. Give whole names.
    [`is_saved`](spec/target_modules.md#is_saved) says what is hit.

    Not asked by `verify`: no name is drawn that ends like a module to save without a dot before it.

    Seen in peft 0.21.2.
    """
    names = ["k", "q", "seq"]
    base = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in names})
    config = peft.LoraConfig(target_modules=["k"], modules_to_save=["q"])
    model = peft.get_peft_model(base, config).base_model.model
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"k", "q", "seq"}
    assert trained == {"k", *(name for name in names if is_saved(name, ["q"]))}
    assert [name for name in names if matches(name, ["q"])] == ["q"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_lists_a_classifiers_heads_again_at_each_saving(torch, peft, transformers, tmp_path):
    """A classifier's heads are listed again at each saving.

    Of a model with `task_type="SEQ_CLS"` PEFT adds the heads that it knows to the list
    `modules_to_save`, of whatever is there: to the caller's own list, and to the one that it has
    saved.

    **Right.** What was loaded and is saved again is the same.

    **Consequence.** The function stays the same; `adapter_config.json` grows with every round,
    and a configuration that is used for two models is not what its caller wrote. Give each model
    a list of its own.

    Not asked by `verify`: no method answers a configuration; the peer hands the library a copy of
    the list.

    Seen in peft 0.21.2.
    """
    size = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**size))
    mine, listed = ["classifier"], []
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=mine)
    model = peft.get_peft_model(bert, config)
    assert mine == ["classifier", "classifier", "score"]
    for _ in range(3):
        model.save_pretrained(tmp_path)
        listed.append(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"])
        model = peft.PeftModel.from_pretrained(model.unload(), tmp_path)
    assert [len(names) for names in listed] == [3, 5, 7]
    assert {name for names in listed for name in names} == {"classifier", "score"}


def test_peft_drops_the_bias_of_a_head_whose_tokens_are_trained(torch, peft):
    """A head whose tokens are trained loses its bias.

    `trainable_token_indices` trains some rows of an embedding, and of the head that is tied to
    it. The adapted head multiplies by the new table and adds nothing, as was reported in [PEFT
    3649](https://github.com/huggingface/peft/issues/3649).

    **Right.** Rows that are as they were change nothing.

    **Consequence.** Heads without a bias, as those of most language models, are right. A masked
    BERT is trained without the bias and has it again once it is merged.

    Not asked by `verify`: no method trains single rows of an embedding.

    Seen in peft 0.21.2.
    """
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


def test_peft_gives_every_trained_vector_the_rate_of_b_for_loraplus(torch, peft):
    r"""Trained vectors have the rate of B with LoRA+.

    `create_loraplus_optimizer` gives the greater rate to every parameter of one dimension:
    biases, norms, DoRA's magnitudes. So does the code of the paper's authors.

    **Right.** LoRA+ says what the rates of $A$ and $B$ are, $\eta_A = \eta$ and $\eta_B =
    \lambda\eta$, for factors of which one starts at zero; of a bias it says nothing. That is a
    choice, then, and the pages of `optim` make the other one: whatever is no $B$ keeps $\eta$.

    **Consequence.** With `bias="lora_only"` the base's biases learn by the ratio faster than they
    would with the plain optimizer.

    Found by `verify peft`: `train.loraplus.other-params`.

    Seen in peft 0.21.2.
    """
    from peft.optimizers import create_loraplus_optimizer

    base = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 1)})
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q"], bias="lora_only"))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8)
    rate = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    q = model.base_model.model.q
    parts = {"q.A": q.lora_A.default.weight, "q.B": q.lora_B.default.weight, "q.bias": q.bias}
    assert {name: rate[p] for name, p in parts.items()} == {"q.A": 0.5, "q.B": 4, "q.bias": 4}
    assert loraplus_rates(list(parts), lr=0.5, ratio=8) == {"q.A": 0.5, "q.B": 4, "q.bias": 0.5}


def test_peft_gives_an_embeddings_adapter_a_rate_of_its_own_for_loraplus(torch, peft):
    r"""The adapter of an embedding has a rate of its own with LoRA+.

    It is `loraplus_lr_embedding`, whose default is fixed, for $A$ and $B$ alike; neither `lr` nor
    the ratio acts on it.

    **Right.** $\eta_A = \eta$ and $\eta_B = \lambda\eta$.

    **Consequence.** With usual rates an embedding's adapter hardly moves, and nothing says so.
    Give `loraplus_lr_embedding`.

    Found by `verify peft`: `train.loraplus.other-params`.

    Seen in peft 0.21.2.
    """
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


def test_peft_averages_norms_where_adaloras_penalty_adds_their_squares(torch, peft):
    r"""AdaLoRA's penalty is a mean of norms.

    The paper's term is $\gamma \sum_k R_k$ with $R = \lVert B^\top B - I \rVert_F^2 + \lVert A
    A^\top - I \rVert_F^2$. PEFT adds `orth_reg_weight` times the mean of the norms themselves
    over all $A$ and $B$; so does the code of the paper's authors.

    **Right.** With one row and one column, $R = (B^2 - 1)^2 + (A^2 - 1)^2$ and $\partial R /
    \partial A = 4 (A^2 - 1) A$. The gradient vanishes as $A$ becomes orthogonal; that of the
    norm, $2A$ here, does not.

    **Consequence.** The paper's $\gamma$ is not `orth_reg_weight`: the one's pull grows with the
    distance and the number of projections, the other's depends on neither.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
    model, (A, B) = adalora_loss(torch, peft, 2, 3)
    loss = model.base_model().loss
    loss.backward()
    assert loss == ((2 * 2 - 1) + (3 * 3 - 1)) / 2
    assert (A.grad, B.grad) == (2, 3)

    R, back = orthogonality(*(factor.detach().numpy() for factor in (A, B)))
    assert R == (2 * 2 - 1) ** 2 + (3 * 3 - 1) ** 2
    assert back(1) == (4 * (2 * 2 - 1) * 2, 4 * (3 * 3 - 1) * 3)


def test_peft_adds_adaloras_penalty_in_evaluation_and_never_without_a_task_type(torch, peft):
    """AdaLoRA's penalty is in an evaluation's loss, and in none without a task type.

    `AdaLoraModel.forward` adds the penalty wherever the outputs have a loss. A `PeftModel`, which
    is what a configuration without `task_type` gives, calls the model below it and goes past that
    forward, as [PEFT 432](https://github.com/huggingface/peft/issues/432) found; its subclasses
    for the tasks do not.

    **Right.** The penalty belongs to the loss of training, and only there; it is above 0 unless
    $A$ and $B$ are orthogonal.

    **Consequence.** Without `task_type` nothing keeps $A$ and $B$ orthogonal, and nothing says
    so. With it, losses and perplexities of evaluations are too high by the penalty; compute them
    from the logits.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
    model, (A, B) = adalora_loss(torch, peft, 2, 3)
    assert orthogonality(*(factor.detach().numpy() for factor in (A, B)))[0] > 0
    assert model().loss == 0  # PeftModel goes past the penalty; its subclasses for tasks do not
    assert model.base_model().loss > 0
    assert model.eval().base_model().loss == model.train().base_model().loss


def test_peft_saves_another_function_between_two_prunings_of_adalora(torch, peft, tmp_path):
    """AdaLoRA's adapter is saved as another function between two prunings.

    With `deltaT` above 1 a pruned singular value is trained on until the next pruning, and is no
    zero then. `save_pretrained` leaves out the triplets that the last pruning took away, whatever
    they have become.

    **Right.** What is saved and loaded is the same function, as it is right after a pruning.

    **Consequence.** A checkpoint from the middle of training computes something else than the
    model that was evaluated beside it. Save at steps that prune. (The warning on loading is
    beside the point: the rank pattern that it calls ignored is the one that gives the tensors
    their shapes.)

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
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


def test_peft_prunes_all_triplets_of_one_score_whatever_the_budget_of_adalora(torch, peft):
    """AdaLoRA prunes all triplets of one score.

    The threshold is the greatest score that is to go, and all that does not exceed it goes.

    **Right.** The budget is the number of triplets that stay; of equal scores, some do.

    **Consequence.** Scores in floating point are seldom equal, but where gradients are zero, as
    in a projection that the batch does not reach, all are.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
    model, layer = adalora_model(torch, peft, init_r=4, target_r=3, total_step=1)
    adalora_gradients(torch, layer, [1.0] * 4)
    model.base_model.rankallocator.update_ipt(model.base_model.model)
    model.base_model.rankallocator.mask_to_budget(model.base_model.model, 3)
    assert layer.lora_E["default"].count_nonzero() == 0
    assert allocate({"q": np.ones((4, 1))}, 3)["q"].sum() == 3


def test_peft_loads_an_adalora_adapter_of_alpha_0_with_another_scale(torch, peft, tmp_path):
    """AdaLoRA's adapter of alpha 0 is loaded with another scale.

    For `lora_alpha=0` the layer takes the rank in its place, so that the scale is about 1. When
    an adapter is loaded that has been pruned, it takes the pruned rank, and divides by the rank
    of the start.

    **Right.** What is saved and loaded is the same function. With any other alpha it is: then the
    rank of the start, which is kept for the purpose, is the only rank in the scale.

    **Consequence.** The branch of each projection shrinks by the share of its triplets that stay.
    Write the initial rank as `lora_alpha`.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
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


def test_peft_trains_the_rank_that_adaloras_scale_divides_by(torch, peft, tmp_path):
    r"""AdaLoRA's rank is trained where the base is in half precision.

    The scale of AdaLoRA divides by the rank of the start, which the layer keeps as a parameter
    without a gradient. Moving it to where the base is makes a new parameter of it, with one, if
    that changes the dtype, as it does for a base in bfloat16: the optimizer then trains the rank.
    It is not saved.

    **Right.** The scale is a constant, $s = \alpha / (r + 10^{-5})$.

    **Consequence.** The scales drift apart from projection to projection as training goes on, and
    the saved adapter is loaded with the scale of the start: another function than the one that
    was evaluated. Set `requires_grad` of every `ranknum` to false before the optimizer is made.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """

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


def test_peft_ignores_rslora_and_alpha_pattern_in_adalora(torch, peft):
    r"""AdaLoRA ignores rsLoRA and the patterns of alpha.

    `AdaLoraConfig` takes `use_rslora` and `alpha_pattern`, saves them and computes nothing by
    them.

    **Right.** A setting that is taken acts: with rsLoRA $s = \alpha / \sqrt{r}$, with a pattern
    the $\alpha$ of the projection.

    **Consequence.** The scale is not the one that was asked for. minilora's reader refuses the
    two by name.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
    settings = {"use_rslora": True, "alpha_pattern": {"q": 16}, "init_r": 4}
    _, layer = adalora_model(torch, peft, **settings)
    s = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)
    assert s == adalora_scale(8, r=4)
    assert s < scale(8, 4) < scale(16, 4) < scale(16, 4, rslora=True)


def test_peft_loads_a_pissa_by_fewer_iterations_as_another_function(torch, peft, tmp_path):
    """PiSSA by a few iterations is loaded as another function.

    With `init_lora_weights="pissa_niter_…"` the singular values are approximated from a random
    start. Loading takes the start out of the base again, and draws anew: the residual is another
    than the one that A and B were trained beside. Plain `"pissa"` computes the same residual each
    time.

    **Right.** $W = R + s B A$, so that R is W less the very start of B and A.

    **Consequence.** What is loaded is not what was trained, the more so the closer the singular
    values are. Convert such an adapter where it was trained. minilora's reader refuses it.

    Not asked by `verify`: no check saves after a start, and none starts PiSSA by iterations.

    Seen in peft 0.21.2.
    """
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


@pytest.mark.filterwarnings("ignore:PiSSA changes the base:UserWarning")
def test_peft_drops_all_but_a_and_b_where_it_converts_pissa(torch, peft, tmp_path):
    """Converting PiSSA drops all but A and B.

    `save_pretrained` with `path_initial_model_for_weight_conversion` writes the doubled A and B
    and nothing else: no magnitude of DoRA, no module that is saved in full, no adapter of an
    embedding.

    **Right.** $R + s B A = W + s (B A - B_0 A_0)$ is about the projection's A and B; everything
    else that was trained stays part of the function. DoRA's magnitude too: it rescales the rows
    of the same matrix.

    **Consequence.** The loaded adapter has an embedding without an adapter and magnitudes as they
    started, or fails for a module that is missing. minilora converts and keeps all of them.

    Not asked by `verify`: no method converts an adapter.

    Seen in peft 0.21.2.
    """
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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_trains_tied_factors_by_two_optimizers(torch, transformers, peft):
    """Tied factors are trained by two optimizers.

    With `ensure_weight_tying` the head's A and B are parameters of their own that share the
    embedding's memory. Each has its own gradient and its own state in the optimizer, and both
    write to the same numbers. Moving the model to another dtype or device unties them.

    **Right.** One factor that is used twice has one gradient, the sum of the two. Only an
    optimizer that is linear in the gradient, plain SGD, gives the same by two steps.

    **Consequence.** With Adam the tied factors move up to twice as far as the rate says. What is
    saved after a move holds two adapters that are no longer each other's transpose.

    Not asked by `verify`: a session's step is plain SGD, of which two steps are one of the sum.

    Seen in peft 0.21.2.
    """
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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_peft_loads_a_gpt2_without_the_tied_half_of_its_adapter(
    torch, transformers, peft, tmp_path
):
    """A GPT-2 is loaded without the tied half of its adapter.

    `target_modules=["lm_head"]` with `ensure_weight_tying` adapts head and embedding, and is
    saved as an adapter of `transformer.wte`. On loading, only modules called `embed_tokens` or
    `lm_head` are known to be tied: the head's factors in the file are passed over.

    **Right.** What is saved and loaded is the same function.

    **Consequence.** The logits are the base's head on adapted embeddings. A file that names both
    modules, as minilora writes it, is loaded whole; PEFT's own is refused here, as tensors would
    be left over.

    Not asked by `verify`: no adapter of both uses of a table is asked of a model in a file.

    Seen in peft 0.21.2.
    """
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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings=True:UserWarning")
def test_peft_merges_a_tied_heads_adapter_into_the_embedding_and_tied_factors_twice(
    torch, transformers, peft
):
    """A tied head's adapter is merged into the embedding, and tied factors twice.

    A merge adds to the parameter, which head and embedding share. An adapter of one use then acts
    in both; one of both uses, with `ensure_weight_tying`, is added once by each. The library
    warns of the former, [PEFT 2018](https://github.com/huggingface/peft/issues/2018), and not of
    the latter.

    **Right.** Merging changes no output. Where one use alone changes, the tie ends; where both
    change by one matrix and its transpose, the table takes it once.

    **Consequence.** The merged model is another one than was trained, and disabling does not hide
    it for the use whose layer has no adapter. Untie the weights before merging.

    Found by `verify peft`: `lifecycle.tied.embedding`, `lifecycle.tied.head`,
    `lifecycle.tied.both`, `lifecycle.gradients.tied`, `inference.deltas.tied`.

    Seen in peft 0.21.2.
    """
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


def test_peft_leaves_a_trained_bias_in_the_base(torch, peft, tmp_path):
    """A trained bias stays in the base.

    `bias="all"` and `"lora_only"` train the base's own biases. A file's bias acts as soon as it
    is loaded, whichever adapter is active, and while all are disabled, of which [the library
    warns](https://github.com/huggingface/peft/pull/741); a second adapter with one is refused.

    **Right.** Where each adapter has its own, loading changes no output and disabling gives the
    base's.

    **Consequence.** The base is gone once such an adapter is trained or loaded. `lora_bias=True`
    trains a bias that comes and goes with its adapter.

    Found by `verify peft`: `lifecycle.bias`, `lifecycle.bias.scaled`, `lifecycle.save.bias`.

    Seen in peft 0.21.2.
    """

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


def test_peft_fails_where_adaloras_budget_does_not_fall(torch, peft):
    """AdaLoRA fails where the budget does not fall.

    **Right.** A budget of as many triplets as there are prunes none.

    **Consequence.** `target_r` equal to `init_r`, AdaLoRA without pruning, raises at the first
    step that would prune, with an error that names neither.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
    model, layer = adalora_model(torch, peft, init_r=2, target_r=2)
    adalora_gradients(torch, layer, [2.0, 1.0])
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        model.base_model.update_and_allocate(1)
    right = allocate({"q": np.ones((2, 1))}, budget(1, 2, 2, 0, 0, 100))
    assert right["q"].all()


def test_peft_has_one_triplet_less_than_adaloras_budget_where_it_is_whole(torch, peft):
    r"""AdaLoRA's budget is one triplet short where it is a whole number.

    The cube is computed in floating point and its product cut to a whole number.

    **Right.** $125 \, (1 - \tfrac45)^3 = 1$.

    **Consequence.** One triplet of a step, and at the last step none. Who compares two
    implementations step by step meets it.

    Not asked by `verify`: no method has AdaLoRA.

    Seen in peft 0.21.2.
    """
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


def test_peft_drops_the_active_adapters_beside_a_merged_one(torch, peft):
    r"""Beside a merged adapter the other active ones do not act.

    Once a layer has merged an adapter, its forward is the merged weight's alone. The others are
    still reported as active; [PEFT 3756](https://github.com/huggingface/peft/issues/3756).

    **Right.** Merging changes no output: $(W + \Delta W_1) x + \Delta W_2 x$ is what it was
    before.

    **Consequence.** `merge_adapter` with a part of the active adapters switches off the rest.
    Merge all that are active, or none.

    Not asked by `verify`: a session's `merge` merges all adapters that are active.

    Seen in peft 0.21.2.
    """
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    assert model.eval()(one) == 1 + 2 + 4
    model.merge_adapter(["one"])
    assert model.active_adapters == ["one", "two"]
    assert model(one) == 1 + 2
    for merged in (state, state.merge("one"), state.merge()):
        assert merged.forward(np.ones((1, 1)))[0] == 1 + 2 + 4


def test_peft_takes_away_what_an_adapter_is_by_then_and_not_what_it_added(torch, peft):
    """Unmerging takes away what the adapter is by then.

    A merge adds $sBA$, an unmerge subtracts the $sBA$ of its own time. Deleting and hot-swapping
    what is merged are refused; `set_scale` is not.

    **Right.** What is unmerged is the weight that was merged. Subtraction would have to remember
    $s$, $A$ and $B$, and [would still round](#unmerging-does-not-restore-the-weight-loralib-too).

    **Consequence.** The base weight is another one afterwards, for every adapter. Unmerge before
    a scale is set.

    Found by `verify peft`: `lifecycle.scale-while-merged`, `lifecycle.random-steps`.

    Seen in peft 0.21.2.
    """
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    model.merge_adapter()
    layer.set_scale("one", 3)
    model.unmerge_adapter()
    assert layer.weight == 1 + 2 - 3 * 2
    assert state.merge().set_scale("one", 3).unmerge().stored()[0] == 1


def test_peft_applies_dora_adapters_in_a_row_but_adds_them_where_they_drop_out(torch, peft):
    r"""Several DoRA adapters act in a row, and side by side where they train with dropout.

    Each adapter rescales what the ones before it gave, by $g_i = m_i / \|W + \Delta_i\|$ with the
    norm of its own sum with the base. So does the merge ([PEFT
    3609](https://github.com/huggingface/peft/pull/3609)). With dropout each computes the base's
    part from the dropped input itself, and so from the base alone.

    **Right.** Neither is what the paper says, which has one adapter. But an adapter is trained on
    the base and on nothing else, $W + \sum_i (g_i (W + \Delta_i) - W)$ does not ask for an order,
    and with it one function is trained and evaluated. $g_2 (g_1 (W + \Delta_1) + \Delta_2)$ is
    another one in each order.

    **Consequence.** With `lora_dropout` several active DoRA adapters train as one function and
    answer as another, even if nothing is dropped. minilora adds the branches; with one active
    adapter nothing differs.

    Found by `verify peft`: `lifecycle.dora.several`.

    Seen in peft 0.21.2.
    """
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


def test_peft_combines_an_adapter_of_rslora_into_one_of_another_scale(torch, peft):
    r"""What is combined of rsLoRA has another scale.

    `add_weighted_adapter` puts all scales into the factors and gives the new adapter $\alpha =
    r$, for $s = 1$. But it takes `use_rslora` over from the first adapter, and then $\alpha /
    \sqrt r = \sqrt r$ ([PEFT 3449](https://github.com/huggingface/peft/pull/3449),
    [3761](https://github.com/huggingface/peft/issues/3761)).

    **Right.** An adapter combined alone at weight 1 is itself.

    **Consequence.** The combination acts $\sqrt r$ times as strongly as the adapters it is made
    of, in each of the types. Divide the weights by it.

    Found by `verify peft`: `combine.weighted`, `combine.order`, `combine.cat`, `combine.many`.

    Seen in peft 0.21.2.
    """
    assert peft_alone(torch, peft, r=4, lora_alpha=4) == [4, 5, 4, 5]
    assert peft_alone(torch, peft, r=4, lora_alpha=8, use_rslora=True) == [16, 17, 32, 33]
    adapter = Adapter((np.ones((4, 1)), np.ones((1, 4))), scale(8, 4, rslora=True))
    assert combine_exact([adapter], [1]).change(np.ones((1, 1)), None)[0] == 16


def test_peft_combines_an_adapter_without_its_bias_or_its_magnitude(torch, peft):
    r"""What is combined has neither the bias nor the magnitude.

    Of an adapter with `lora_bias` or `use_dora` only $A$ and $B$ are combined; the bias is 0
    again and the magnitude $\|W\|$, as at the start of a training ([PEFT
    3761](https://github.com/huggingface/peft/issues/3761)).

    **Right.** As above. A sum of biases is $\sum_i w_i s_i c_i$. Of several DoRA adapters there
    is no exact sum with one magnitude, and an error says so.

    **Consequence.** The combination is another function than its parts, without a word.

    Not asked by `verify`: `combine` is given adapters of A and B alone.

    Seen in peft 0.21.2.
    """
    assert peft_alone(torch, peft, r=1, lora_alpha=1, lora_bias=True) == [1, 2 + 8, 1, 2]
    W, b, one = np.ones((1, 1)), np.zeros((1, 1)), np.ones((1, 1))
    alone = combine_exact([Adapter((one, one, 8 * one), 1, LORA_BIAS)], [1])
    assert AdaptedLayer(W, b, {"all": alone}, ("all",)).forward(one)[0] == 2 + 8

    change, answer, combined, other = peft_alone(torch, peft, r=1, lora_alpha=1, use_dora=True)
    assert (change, answer) == (combined, 8)
    assert other == 1  # the norm of W, where a new magnitude starts
    alone = combine_exact([Adapter((one, one, 8 * one), 1, DORA)], [1])
    assert AdaptedLayer(W, b, {"all": alone}, ("all",)).forward(one)[0] == 8


def test_peft_makes_nan_of_a_row_of_zeros_under_dora(torch, peft):
    """A row of zeros becomes NaN under DoRA.

    Each row of the weight is divided by its norm, whatever that is.

    **Right.** A row without a direction has none to rescale; with $m = 0$ and the norm taken for
    one it stays what it is, and so it starts as the base.

    **Consequence.** Pruned weights and vocabularies padded with rows of zeros are NaN from the
    first step on, and one such output makes the whole loss NaN. Leave these modules out.

    Not asked by `verify`: no weight with a row of zeros is drawn for DoRA.

    Seen in peft 0.21.2.
    """
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


def test_peft_rounds_the_weights_of_a_combination_to_float32(torch, peft):
    """The weights of a combination are rounded to float32.

    The types "linear" and "ties" take roots in double precision and put them into a tensor of the
    default dtype, whatever the adapter's is; "svd" does so with the weights. "cat" does not.

    **Right.** Two adapters in float64 have a combination in float64.

    **Consequence.** A combination of a float64 model is no reference. The comparison here uses
    weights with roots that float32 holds.

    Found by `verify peft`: `combine.single`.

    Seen in peft 0.21.2.
    """
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


def test_peft_moves_the_adapter_of_a_convolution_without_its_dilation(torch, peft):
    """The adapter of a convolution moves without dilation.

    PEFT's $A$ is a convolution with the kernel, the stride and the padding of the base. It has
    neither its dilation nor what its `padding_mode` puts beside the input; LyCORIS, which adds up
    the weight in each forward, pads it with zeros too. [PEFT
    3697](https://github.com/huggingface/peft/issues/3697) reports both, and [PEFT
    3758](https://github.com/huggingface/peft/pull/3758) mends them.

    **Right.** A convolution is $W$ over patches, and $W + sBA$ over the same patches is the
    adapted one: merging changes no output.

    **Consequence.** With dilation the first forward fails, unless the padding is `"same"`: then,
    as with any other padding mode, one function is trained and another one is merged. Put the
    padding into a module of its own before the convolution.

    Found by `verify peft`: `module.conv.dilation.forward`, `module.conv.dilation.gradients`.

    Seen in peft 0.21.2.
    """
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


def test_peft_and_lycoris_pad_the_adapter_of_a_convolution_with_zeros(torch, peft, lycoris):
    """The adapter of a convolution pads with zeros, whatever the padding mode.

    As with dilation: PEFT's $A$ and LyCORIS do not take over the base's `padding_mode`.

    **Right.** Merging changes no output.

    Found by `verify peft`: `module.conv.padding-mode.forward`,
    `module.conv.padding-mode.gradients`.

    Seen in peft 0.21.2 and lycoris_lora 4.1.3.
    """
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


def test_peft_pads_the_base_of_a_dora_convolution_with_zeros_in_training(torch, peft):
    """A DoRA convolution pads its base with zeros where it trains with dropout.

    With dropout PEFT computes the base's part of the branch anew, from what dropout leaves, and
    without the padding mode.

    **Right.** Where nothing is dropped, training and evaluation are one function: with $B = 0$
    and twice the magnitude, twice the base.

    **Consequence.** Near the border training and evaluation differ, adapter or not.

    Not asked by `verify`: dropout is asked of convolutions that pad with zeros.

    Seen in peft 0.21.2.
    """
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


def test_peft_takes_doras_norms_of_another_matrix_in_groups(torch, peft):
    """DoRA's norms in groups are those of another matrix.

    In groups $B$ has $r/g$ columns, each row those of its group. For the norm PEFT reads its
    entries as if they had $r$, and lays the product over the weight, which happens to have as
    many entries. [PEFT 2567](https://github.com/huggingface/peft/pull/2567) made it so, where it
    was an error before.

    **Right.** The norms are those of the rows of $V = W + sBA$, both block-diagonal, over all
    channels: what the branch multiplies by.

    **Consequence.** What is trained is no DoRA: a row's norm depends on other rows' adapters.
    With $B = 0$, at the start, nothing shows.

    Found by `verify peft`: `module.conv.groups-dora.forward`, `module.conv.groups-dora.gradients`.

    Seen in peft 0.21.2.
    """
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


def test_peft_starts_olora_from_the_transpose_of_a_weight_stored_in_out(torch, transformers, peft):
    """OLoRA starts from the transpose of a weight that is stored (in, out).

    GPT-2's `Conv1D` is such a layer. PiSSA's start transposes it since [PEFT
    2103](https://github.com/huggingface/peft/issues/2103); these two do not. The residual is
    right, and the factors are exchanged.

    **Right.** $R + sBA = W$, so that the start leaves the output as it is.

    **Consequence.** The first forward fails; where the weight is square, as GPT-2's
    `attn.c_proj`, training starts from another model, without a word.

    Found by `verify peft`: `init.fresh.olora`.

    Seen in peft 0.21.2.
    """
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


def test_peft_starts_an_embedding_as_lora_whatever_start_is_asked_for(torch, peft):
    """An embedding starts as LoRA's, whatever start is asked for.

    PEFT's embeddings have one start and take the name of any other one for it, where convolutions
    refuse an unknown name.

    **Right.** Each of these starts is one of a matrix, and a table is one. What cannot be done is
    an error.

    **Consequence.** The model trains, with LoRA's start in its embeddings.

    Not asked by `verify`: `init` starts the weight of a linear layer alone.

    Seen in peft 0.21.2.
    """
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


def test_peft_takes_pissas_part_out_of_the_embedding_that_is_tied_to_a_head(torch, peft):
    """PiSSA in a head takes its part out of the tied embedding too.

    The residual is put into the weight that the two share. OLoRA and LoftQ do the same.

    **Right.** $R + sBA = W$ in the head, and the embedding keeps $W$: the start changes no
    output. The tie has to end there.

    **Consequence.** Training starts from a model whose embedding lacks its greatest singular
    values, and nothing says so.

    Not asked by `verify`: `init` starts the weight of a linear layer alone.

    Seen in peft 0.21.2.
    """
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


def test_peft_adds_the_transpose_to_the_only_expert_of_a_weight_stored_in_out(torch, peft):
    r"""The only expert of a weight stored (in, out) gets the transpose.

    `target_parameters` adapts weights (e, out, in), and (e, in, out) where the module says
    `is_transposed`. One expert alone is taken for a plain matrix (out, in).

    **Right.** An expert is computed as it is among others.

    **Consequence.** The first forward fails; a square weight gets $A^\top B^\top$ for $BA$.

    Found by `verify peft`: `module.experts.single.forward`, `module.experts.single.gradients`,
    `module.experts.single.merged`.

    Seen in peft 0.21.2.
    """
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


def test_peft_gives_experts_that_start_orthogonal_a_share_of_the_rank_and_no_zero(torch, peft):
    """Experts that start orthogonal share one rank, and do not start at zero.

    The start makes $A$ and $B$ of one matrix of rank $r$, where there should be one for each
    expert. Cut into the experts' parts, their halves of the rank are no longer opposite each
    other.

    **Right.** $BA = 0$ in each expert.

    **Consequence.** Training starts from another model, with rank $r / e$; where $e$ does not
    divide $r$, the first forward fails.

    Not asked by `verify`: `init` starts the weight of a linear layer alone.

    Seen in peft 0.21.2.
    """
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


def test_peft_leaves_the_weight_merged_where_it_refuses_to_merge(torch, peft):
    """A merge that is refused leaves the weight merged.

    A trained bias of $B$ needs a bias of the base to be merged into. PEFT finds that there is
    none after it has added $sBA$.

    **Right.** What is refused changes nothing. (minilora's merge gives the layer a bias.)

    **Consequence.** Who catches the error goes on with a model that has its adapter twice. With
    `safe_merge=True` the weight stays.

    Not asked by `verify`: beside a bias of B the layer has a bias in every case, so that no merge
    is refused.

    Seen in peft 0.21.2.
    """

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


def test_peft_shortens_lora_a_in_the_forward_of_an_embedding_with_max_norm(torch, peft):
    """Embedding with max_norm shortens lora_A in its forward (as loralib's).

    The columns of $A$ are looked up with the bound that is meant for the table's rows.

    **Right.** The row of $W + sBA$ is within the bound: nothing is to be shortened.

    **Consequence.** A forward changes what is trained.

    Found by `verify peft`: `module.embedding.max-norm.forward`,
    `module.embedding.max-norm.gradients`.

    Seen in peft 0.21.2.
    """
    layer = adapted(torch, peft, torch.nn.Embedding(1, 1, max_norm=1.0), fill=None)
    layer.weight.data.fill_(0)
    layer.lora_embedding_A["default"].data.fill_(2)
    layer.lora_embedding_B["default"].data.fill_(0.5)
    row = merge_weight(*(np.array([[value]]) for value in (0.0, 2.0, 0.5)), 1)
    right, _ = embedding(np.array([0]), row)
    assert right == 1  # no longer than max_norm
    assert layer(torch.tensor([0])).item() < right
    assert layer.lora_embedding_A["default"] < 2


def test_peft_adds_the_change_of_an_attentions_output_twice(torch, peft):
    """The change of an attention's output is added twice.

    PEFT adapts `torch.nn.MultiheadAttention`, which reads its weights itself, by merging before
    the forward. Its `merge` adds $sBA$ to the weight of `out_proj`, and then merges `out_proj`,
    itself an adapted layer, which adds it once more. Unmerging takes both away.

    **Right.** With one token attention is $W_o W_v x$, and with an adapter of $W_o$ alone
    $(W_o + sBA) W_v x$.

    **Consequence.** What is trained, evaluated and merged has twice the change of `out_proj`; its
    gradient is that of one. Files are right, so that other programs, and a merge by hand, compute
    another function.

    Found by `verify peft`: `module.attention.out.forward`, `module.attention.out.gradients`,
    `module.attention.out.merged`.

    Seen in peft 0.21.2.
    """
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


def test_peft_shows_an_encoders_layer_the_weight_without_the_adapter(torch, peft):
    """An adapter in an encoder's layer does not act in evaluation.

    In evaluation `torch.nn.TransformerEncoderLayer` calls no module, but one kernel with the
    weights that it reads from `linear1` and `linear2`. The layers that PEFT puts in their places
    have a `weight`, the base's.

    **Right.** Without dropout training and evaluation are one function, and a layer whose adapter
    is not 0 is not the base.

    **Consequence.** In evaluation the base answers, and no error tells. Merge before, or keep
    PyTorch from its fast path: `torch.backends.mha.set_fastpath_enabled(False)`.

    Found by `verify peft`: `module.encoder.forward`.

    Seen in peft 0.21.2.
    """
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


def test_peft_fails_to_merge_a_pointwise_convolution_of_three_dimensions(torch, peft):
    """A convolution of three dimensions and kernel 1 cannot be merged.

    `get_delta_weight` knows a kernel of one entry by the sizes of two dimensions, and multiplies
    the factors as matrices, from which it has taken these two. The third one is still there.

    **Right.** A kernel of one entry is a matrix, whatever the dimensions: $W + sBA$.

    **Consequence.** Merging fails, also with a kernel such as $(1, 1, 3)$; the forward is right.

    Found by `verify peft`: `module.conv.pointwise.merged`, `module.conv.pointwise.evaluation`.

    Seen in peft 0.21.2.
    """

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


@pytest.mark.usefixtures("without_gpu")
def test_peft_starts_loftq_without_its_scale(torch, peft):
    r"""LoftQ starts without its scale.

    PEFT hands the weight and the rank to the start, and not $s$. The question is open in [PEFT
    1982](https://github.com/huggingface/peft/issues/1982). The start asks for a GPU, whatever
    there is:

    **Right.** What acts is $Q + sBA$, and it should be near $W$. With $BA$ the best for $W - Q$,
    the scale 2 is as far from $W$ as $Q$ alone, and a greater one farther: $W - Q - sBA = (W - Q
    - BA) + (1 - s)BA$, two parts at right angles.

    **Consequence.** With $\alpha = 2r$, as is usual, LoftQ gains nothing over the quantized
    weight. Start it with $\alpha = r$.

    Not asked by `verify`: no check starts LoftQ.

    Seen in peft 0.21.2.
    """
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


@pytest.mark.usefixtures("without_gpu")
def test_peft_starts_loftq_from_the_transpose_of_a_weight_stored_in_out(torch, transformers, peft):
    """LoftQ starts from the transpose of a weight that is stored (in, out).

    As OLoRA does.

    **Right.** $R + sBA = W$.

    Not asked by `verify`: no check starts LoftQ.

    Seen in peft 0.21.2.
    """
    base = transformers.pytorch_utils.Conv1D(3, 64)
    settings = {"fan_in_fan_out": True, "loftq_config": peft.LoftQConfig()}
    layer = adapted(torch, peft, base, **LOFTQ, **settings)
    A, B = (getattr(layer, f"lora_{end}")["default"].weight for end in "AB")
    assert (A.shape, B.shape) == ((1, 3), (64, 1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(1, 64))
    _, A, B = loftq(np.ones((3, 64), np.float32), 1, 1, lambda M: M)
    assert (A.shape, B.shape) == ((1, 64), (3, 1))


def test_peft_fails_to_start_loftq_in_convolutions_and_embeddings(torch, peft):
    """LoftQ fails in convolutions and embeddings.

    They call the start without the configuration that it needs.

    **Right.** The matrix of an embedding is as good as another one; what is not supported is
    refused by name, as in convolutions every other start is.

    **Consequence.** An error that names an argument of the library's own.

    Not asked by `verify`: no check starts LoftQ.

    Seen in peft 0.21.2.
    """
    settings = {"loftq_config": peft.LoftQConfig()}
    for base in (torch.nn.Conv1d(1, 1, 1), torch.nn.Embedding(1, 1)):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'config'"):
            adapted(torch, peft, base, **LOFTQ, **settings)


def test_peft_and_loralib_do_not_restore_a_weight_by_unmerging(torch, peft, loralib):
    """Unmerging does not restore the weight (loralib too).

    Both libraries unmerge by subtraction.

    **Right.** The sum $W + sBA$ is rounded to its own spacing. What $W$ has below that is gone,
    and no subtraction brings it back, as a maintainer remarks in [PEFT
    3166](https://github.com/huggingface/peft/pull/3166) of another method. It needs the old
    array, which minilora's [`merge`](spec/lora.md#merge) keeps.

    **Consequence.** The frozen base changes with every merge and unmerge, in half precision
    visibly; loralib does one at each `eval()` and `train()`. Keep a copy of the base, or give
    loralib's layers `merge_weights=False`.

    Not asked by `verify`: `unmerge` may differ from the old weight by the rounding of the merged
    one.

    Seen in peft 0.21.2 and loralib 0.1.2.
    """
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


def test_loralib_returns_nothing_from_train_and_eval(torch, loralib):
    """train() and eval() return nothing.

    **Right.** As in all of PyTorch's modules, both return the module itself.

    **Consequence.** `layer = layer.eval()` is `None`. A model that holds the layer is not
    affected.

    Not asked by `verify`: what `train()` and `eval()` return is no number.

    Seen in loralib 0.1.2.
    """
    adapted, plain = loralib.Linear(4, 3, **LORA), torch.nn.Linear(4, 3)
    assert adapted.eval() is None
    assert adapted.train() is None
    assert plain.eval() is plain.train() is plain


def test_loralib_merges_twice_what_was_saved_after_eval(loralib):
    """What is saved after eval() is merged twice.

    `eval()` merges into the base weight and notes that in an attribute, which no `state_dict`
    holds. The README saves `lora_state_dict`, without the base; the trap is the whole
    `state_dict`.

    **Right.** Saving and loading change no weight: $W + sBA$ is right and $W + 2sBA$ is not.

    **Consequence.** A checkpoint written during evaluation counts its adapter once more. [LoRA
    190](https://github.com/microsoft/LoRA/issues/190) reports base weights that change so. Call
    `train()` before saving, or set `merge_weights=False`.

    Not asked by `verify`: the peer's session has no `save`.

    Seen in loralib 0.1.2.
    """
    saved, W, _, A, B = filled(loralib.Linear(4, 3, **LORA))
    once = merge_weight(W, A, B, S)
    saved.eval()
    assert same(saved.weight.detach(), once)
    loaded = loralib.Linear(4, 3, **LORA)
    loaded.load_state_dict(saved.state_dict())
    loaded.eval()
    assert same(loaded.weight.detach(), merge_weight(once, A, B, S))


def test_loralib_drops_an_adapter_that_is_loaded_after_eval(loralib):
    """What is loaded after eval() loses its adapter.

    The same attribute: a layer that takes itself for merged gets an unmerged weight.

    **Right.** The loaded layer is the saved one, $y = Wx + b + sBAx$. It answers $Wx + b$, and
    then `train()` leaves $W - sBA$.

    **Consequence.** Evaluation shows the base model, and training goes on from a damaged one;
    [ESPnet 5722](https://github.com/espnet/espnet/pull/5722) met it. Load in training mode.

    Found by `verify loralib`: `lifecycle.random-steps`.

    Seen in loralib 0.1.2.
    """
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
    r"""After eval() an adapter has no gradient.

    **Right.** $y$ depends on $A$ and $B$ in both modes alike: $\d A = s B^\top \d y\, x^\top$ and
    $\d B = s\, \d y\, (Ax)^\top$. Merged, they are no part of the forward.

    **Consequence.** Who trains in evaluation mode, to be without dropout, trains no adapter, and
    where a bias is trained no error tells. Set `merge_weights=False`.

    Not asked by `verify`: the contract asks for no gradients while an adapter is merged.

    Seen in loralib 0.1.2.
    """

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
    """Convolutions of one and three dimensions fail.

    **Right.** A delta has as many entries as its weight. $BA$ has a factor of the kernel's size
    in its rows and one in its columns, which is right for two dimensions only.

    **Consequence.** `Conv1d` and `Conv3d` work with kernels of size 1 only; reported as [LoRA
    115](https://github.com/microsoft/LoRA/issues/115).

    Not asked by `verify`: the peer refuses kernels of several entries, whose factors are those of
    another matrix.

    Seen in loralib 0.1.2.
    """

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
    r"""Convolutions ignore lora_dropout.

    They take the argument, build the dropout and never call it.

    **Right.** The branch sees $K \circ x$. Where everything is dropped the base alone is left, as
    `Linear` has it.

    **Consequence.** Adapters of convolutions train without the regularisation that was asked for.

    Found by `verify loralib`: `module.conv.pointwise.dropout`.

    Seen in loralib 0.1.2.
    """
    none = np.zeros_like(X)  # p = 1: every feature of the branch is dropped
    layer, *arrays = filled(loralib.Linear(4, 3, lora_dropout=1.0, **LORA))
    assert same(answer(layer, X), lora_linear(X, *arrays, S, none)[0])
    layer, *arrays = filled(loralib.Conv2d(4, 3, kernel_size=1, lora_dropout=1.0, **LORA))
    y = layer(torch.from_numpy(X).float()[None, :, :, None]).detach()[0, :, :, 0]
    assert same(y, lora_linear(X, *arrays, S)[0])
    assert not same(y, lora_linear(X, *arrays, S, none)[0])


def test_loralib_fails_in_a_merged_linear_with_nothing_enabled(torch, loralib):
    """MergedLinear fails where nothing is enabled.

    Nothing is the default of `enable_lora`.

    **Right.** Without an adapter the layer is $Wx + b$, which it is after `eval()`.

    **Consequence.** In training mode the first forward raises. Name the parts, as the README
    does.

    Not asked by `verify`: some part of a fused layer is enabled in every case.

    Seen in loralib 0.1.2.
    """
    layer = loralib.MergedLinear(4, 3, **LORA)
    x = torch.from_numpy(X.T).float()
    with pytest.raises(AttributeError, match="lora_A"):
        layer(x)
    layer.eval()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_loralib_drops_the_adapter_of_a_merged_linear_built_on_the_meta_device(loralib):
    """MergedLinear built on the meta device loses its adapter.

    `lora_ind`, the mask of the rows that have an adapter, is a plain attribute and no buffer, so
    it stays on the device where it was made. On the meta device it has no values; PyTorch assigns
    nothing through it, and does not complain.

    **Right.** Where a layer was built changes nothing of $y = Wx + b + sBAx$.

    **Consequence.** Models that are built empty and filled later compute with the base alone, and
    no error tells.

    Not asked by `verify`: no layer is built on the meta device.

    Seen in loralib 0.1.2.
    """
    built = {"enable_lora": [True], **LORA}
    layer, *arrays = filled(loralib.MergedLinear(4, 3, **built))
    right, _ = lora_linear(X, *arrays, S)
    assert same(answer(layer, X), right)
    later = loralib.MergedLinear(4, 3, **built, device="meta").to_empty(device="cpu")
    later.load_state_dict(layer.state_dict())
    W, b, *_ = arrays
    assert same(answer(later, X), linear(X, W, b)[0])


def test_loralib_shortens_lora_a_in_the_forward_of_an_embedding_with_max_norm(torch, loralib):
    """Embedding with max_norm shortens lora_A in its forward.

    `max_norm` bounds the rows of an embedding, and PyTorch documents that looking up shortens
    them in place. loralib looks up the columns of $A$ with the same bound.

    **Right.** Merging changes no output. The row of $W + sBA$ here is within the bound, so
    nothing is to be shortened; unmerged, the answer is shorter, and $A$ is another one
    afterwards.

    **Consequence.** A forward changes what is trained, and training and evaluation differ.

    Found by `verify loralib`: `module.embedding.max-norm.forward`,
    `module.embedding.max-norm.gradients`.

    Seen in loralib 0.1.2.
    """
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
    """A layer without dropout cannot be pickled.

    In the place of the dropout stands a `lambda`; `torch.nn.Identity` would be the same function.

    **Right.** A layer can be pickled and is the same afterwards, as it is with a dropout.

    **Consequence.** `torch.save` of a whole model fails, and so does sending one to another
    process; reported as [LoRA 200](https://github.com/microsoft/LoRA/pull/200).

    Not asked by `verify`: no method pickles a layer.

    Seen in loralib 0.1.2.
    """
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(loralib.Linear(4, 3, **LORA))
    layer, W, b, A, B = filled(loralib.Linear(4, 3, lora_dropout=0.5, **LORA))
    layer.eval()
    copied = pickle.loads(pickle.dumps(layer))
    assert same(answer(copied, X), lora_linear(X, W, b, A, B, S)[0])


def test_bitsandbytes_gives_an_entry_the_scale_of_another_block_where_rows_are_no_blocks(
    torch, bitsandbytes
):
    r"""Weights whose rows are no whole blocks are dequantized with other scales.

    NF4's blocks run through the rows on end, so that a row of another length than a multiple of
    the block shares some with its neighbours. That is how `quantize_4bit` makes them. On
    processors with AVX-512, `dequantize_4bit` counts the blocks anew in each row wherever the
    row's length is a multiple of its registers', and takes the first scales again and again. FP4
    goes through the same lines.

    **Right.** The entry $i$ of all, counted through the rows, has the scale of block $\lfloor i /
    64 \rfloor$. The same bytes and scales give the weight back as soon as the rows are as long as
    a block.

    **Consequence.** The base is another one, without a word, and by as much as scales of blocks
    differ. An adapter that is trained beside it computes something else on any other machine.
    `Linear4bit` is hit where its input features are no multiple of its block, as in a model that
    [bitsandbytes 1628](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1628) names.
    Blocks longer than most rows have been kept from this path since
    [1828](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1828), as inaccurate
    there. Choose a block that divides the rows.

    Not asked by `verify`: quantized weights are drawn with rows of whole blocks.

    Seen in bitsandbytes 0.50.2.
    """
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


def test_bitsandbytes_does_not_find_zero_in_a_map_that_has_it(torch, bitsandbytes):
    """Zero is not found in a map that has it.

    `quantize_blockwise` looks its codes up in a table of equally spaced points between -1 and 1.
    Zero lies between two of them, and the point that it is rounded to is nearer to another value.
    Double quantization goes this way with the constants of NF4.

    **Right.** The map contains zero, and zero is nearest to itself.

    **Consequence.** Slight: of each block's greatest modulus, what the page of
    [`quantize_dynamic`](spec/quantization.md#quantize_dynamic) prints. But what is zero does not
    stay so.

    Not asked by `verify`: a quantized weight may lose what its scheme loses, which is more.

    Seen in bitsandbytes 0.50.2.
    """
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


def test_peft_rounds_lorafas_gradient_to_bfloat16(torch, peft):
    r"""LoRA-FA's gradient is rounded to bfloat16.

    The optimizer of `create_lorafa_optimizer` computes its gradient of $B$ under `autocast` to
    bfloat16 wherever the device has bfloat16, a CPU included, whatever the parameters' dtype and
    whether or not the training uses autocast.

    **Right.** The gradient is $g = \d B \, (A A^\top)^{-1} / s^2$ (`lorafa_gradient` in `optim`),
    in the dtype of the parameters: float32 training keeps its digits everywhere else.

    **Consequence.** Float32 training has gradients of eight bits. The decay, too, differs from
    AdamW's: it acts after the step, on what the step has made.

    Not asked by `verify`: no method has LoRA-FA.

    Seen in peft 0.21.2.
    """
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


def kohya_state(torch, at="lycoris_0"):
    """An adapter of rank 2 and alpha 8 as a file has it, A and B the identity."""
    eye = torch.eye(2)
    return {
        f"{at}.lora_down.weight": eye,
        f"{at}.lora_up.weight": eye,
        f"{at}.alpha": torch.tensor(8.0),
    }


def test_lycoris_loads_an_adapter_with_the_scale_it_was_built_with(torch, lycoris):
    r"""An adapter is loaded with the scale that the network was built with.

    `alpha` is a buffer that `load_state_dict` and `load_weights` fill; the scale is a number that
    was computed from the constructor's argument, and nothing computes it anew.

    **Right.** $h = W x + (\alpha / r) B A x$ with the $\alpha$ of the file.

    **Consequence.** The function is another one, without a word, unless the network is built with
    the same alpha. `create_lycoris_from_weights` takes the file's.

    Not asked by `verify`: the peer has no method that loads.

    Seen in lycoris_lora 4.1.3.
    """
    W = x = np.eye(2)
    right, _ = lora_linear(x, W, None, np.eye(2), np.eye(2), scale(8, 2))

    model = identity(torch)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1)
    network.apply_to()
    network.load_state_dict(kohya_state(torch), strict=True)
    assert network.loras[0].alpha == 8
    assert (model(torch.eye(2)).detach().numpy() == lora_linear(x, W, None, x, x, 1 / 2)[0]).all()

    model = identity(torch)
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", model, kohya_state(torch))
    network.apply_to()
    assert (model(torch.eye(2)).detach().numpy() == right).all()


def test_lycoris_loads_an_adapter_of_another_model_as_none(torch, lycoris):
    """An adapter of another model is loaded as none.

    A name that is no module's is passed over.

    **Right.** Every tensor of an adapter has a place in the model, or the adapter is another
    model's.

    **Consequence.** A wrong prefix or another model's file leaves the base as it is. Count
    `loras`.

    Not asked by `verify`: the peer has no method that loads.

    Seen in lycoris_lora 4.1.3.
    """
    state = kohya_state(torch, at="lycoris_layers_7_q")
    network, _ = lycoris.create_lycoris_from_weights(1.0, "", identity(torch), state)
    assert len(network.loras) == 0


def test_lycoris_fails_on_an_adapter_without_alpha(torch, lycoris):
    """An adapter without alpha fails.

    The constructor says that no alpha means the rank, and so it is for an alpha of 0. sd-scripts
    read an absent one so too.

    **Right.** Without an alpha $s = 1$.

    **Consequence.** Files of the time before alphas are not read. Put the rank into them.

    Not asked by `verify`: the peer has no method that loads.

    Seen in lycoris_lora 4.1.3.
    """
    state = kohya_state(torch)
    for alpha, works in ((torch.tensor(0.0), True), (None, False)):
        state["lycoris_0.alpha"] = alpha
        given = {key: value for key, value in state.items() if value is not None}
        if works:
            network, _ = lycoris.create_lycoris_from_weights(1.0, "", identity(torch), given)
            assert network.loras[0].scale == 1
        else:
            with pytest.raises(TypeError, match="float"):
                lycoris.create_lycoris_from_weights(1.0, "", identity(torch), given)


def test_keras_loses_the_alpha_of_its_constructor():
    """The constructor's `lora_alpha` is lost.

    `build` calls `enable_lora(self.lora_rank)` without it, and `enable_lora` then sets alpha to
    the rank.

    **Right.** `Dense(…, lora_rank=r, lora_alpha=alpha)` has $s = alpha / r$, as
    `enable_lora(r, lora_alpha=alpha)` has.

    **Consequence.** A layer made by the constructor trains and acts with $s = 1$.

    Found by `verify keras-constructor`: `linear.forward`, `linear.vjp`, `merge.weight`.

    Seen in keras 3.15.1.
    """
    keras = optional("keras")
    found = []
    for how in ({"lora_rank": 2, "lora_alpha": 8}, {}):
        layer = keras.layers.Dense(1, use_bias=False, **how)
        layer.build((None, 1))
        if not how:
            layer.enable_lora(2, lora_alpha=8)
        layer._kernel.assign([[0.0]])
        layer.lora_kernel_a.assign([[1.0, 1.0]])
        layer.lora_kernel_b.assign([[1.0], [1.0]])
        found.append(layer(np.ones((1, 1), np.float32)).item())
    assert found == [2, 8]


def test_flax_draws_a_with_six_times_the_variance():
    r"""A fresh A has six times the variance.

    `nnx.LoRA` draws $A$ by `he_uniform`, $U(-\sqrt{6/n}, \sqrt{6/n})$; and it has no scale.

    **Right.** loralib, PEFT and the others draw $U(-1/\sqrt n, 1/\sqrt n)$.

    **Consequence.** A learning rate that is carried over acts six times as strongly on $B$.

    Found by `verify flax`: `init.distribution`.

    Seen in flax 0.12.8.
    """
    nnx = optional("flax.nnx")
    A = np.asarray(nnx.LoRA(6, 1000, 1, rngs=nnx.Rngs(0)).lora_a[...])
    assert 1 / 6**0.5 < abs(A).max() <= 1


def test_lycoris_starts_dora_as_another_function_where_rows_are_small(torch, lycoris):
    r"""DoRA starts as another function where rows are small.

    To the norm of each row float32's $\epsilon$ is added, absolute, but not to the magnitude,
    which is that norm.

    **Right.** With $B = 0$ the rescaled row is $m\, W / \lVert W \rVert = W$. A row of norm
    $\epsilon$ becomes half of itself.

    **Consequence.** Rows of ordinary size change in their last bit. A row that is near zero, such
    as a pruned one, shrinks, and a scale of all weights does not pass through.

    Found by `verify lycoris`: `variants.dora.forward.all`, `variants.dora.vjp.all`,
    `variants.dora.merge.all`.

    Seen in lycoris_lora 4.1.3.
    """
    small = torch.finfo(torch.float32).eps
    model = identity(torch, small)
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, dora_wd=True)
    network.apply_to()
    W, B = small * np.eye(2), np.zeros((2, 2))
    right, _ = dora_linear(np.eye(2), W, None, np.eye(2), B, small * np.ones((2, 1)), 1 / 2)
    assert (right == W).all()
    assert (model(torch.eye(2)).detach().numpy() == W / 2).all()


def mlx_folder(path, tensors, num_layers=1):
    """An adapter of rank 1 for one projection of the last layers."""
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    said = {"num_layers": num_layers, "lora_parameters": parameters}
    (path / "adapter_config.json").write_text(json.dumps(said))
    save_file(tensors, path / "adapters.safetensors")
    return str(path)


def test_mlx_lm_leaves_a_missing_factor_as_it_was_drawn(mlx_lm, tmp_path):
    """A missing factor stays as it was drawn.

    Loading refuses a tensor that has no place, but no place that has no tensor: A is then random.

    **Right.** What is loaded is a function of the file.

    **Consequence.** A file cut in two, or named by other rules in part, gives other answers in
    each process. minilora's reader refuses it by the name of the missing factor.

    Not asked by `verify`: the peer reads files by minilora, which refuses one that lacks a factor.

    Seen in mlx_lm 0.32.2.
    """
    b = {"model.layers.1.mlp.up_proj.lora_b": np.ones((1, 2), np.float32)}
    folder = mlx_folder(tmp_path, b)
    changes = []
    for seed in (0, 1):
        mlx_lm.core.random.seed(seed)
        up = mlx_lm.tuner.load_adapters(mlx_lm.model(), folder).layers[1].mlp.up_proj
        changes.append(np.array(up.lora_b).T @ np.array(up.lora_a).T)
    assert (changes[0] != changes[1]).all()


def test_mlx_lm_adapts_all_layers_where_none_is_asked_for(mlx_lm):
    """All layers are adapted where none is asked for.

    The last $k$ layers are `layers[-k:]`, which for 0 is all of them.

    **Right.** Of the last 0 layers there are none.

    **Consequence.** To adapt what lies outside the layers only, give whole names as keys;
    minilora's reader resolves 0 as it is resolved here.

    Not asked by `verify`: no method has a number of layers.

    Seen in mlx_lm 0.32.2.
    """
    parameters = {"rank": 1, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj"]}
    adapted = {}
    for count in (0, 1, 2):
        model = mlx_lm.model()
        mlx_lm.tuner.linear_to_lora_layers(model, count, parameters)
        adapted[count] = ["lora_a" in layer.mlp.up_proj for layer in model.layers]
    assert adapted == {0: [True, True], 1: [False, True], 2: [True, True]}


def test_mlx_lm_passes_over_the_base_of_rope_in_rope_parameters(mlx_lm):
    r"""The base of RoPE is passed over in rope_parameters.

    transformers `5` writes RoPE's base inside `rope_parameters`. The Llama of mlx-lm reads
    `rope_theta` beside it and has a default.

    **Right.** The pair $i$ of features turns by $\theta^{-2i/d}$ per token, with the $\theta$
    that the model was trained with.

    **Consequence.** A model that transformers `5` saved computes something else in mlx-lm, and in
    transformers `4`, without a word, and so does its adapter. Write `rope_theta` into
    `config.json` too, as minilora does.

    Not asked by `verify`: the files of the drawn models have RoPE's base in both places.

    Seen in mlx_lm 0.32.2.
    """
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


def test_peft_trains_nothing_of_a_module_to_save_inside_another(torch, peft):
    """A module to save inside another is not trained, nor is the other.

    `modules_to_save` is gone through module by module. One that lies in another is wrapped in the
    copy that the other's wrapper has made, which freezes that copy: what the model computes with
    is trained by nobody, and the file cannot be loaded. It takes no more than a name whose end
    fits both, such as `embeddings` of a BERT.

    **Right.** What is named is trained, once.

    **Consequence.** Name the outer module alone, in full. minilora refuses to read such an
    adapter.

    Not asked by `verify`: no module to save is drawn inside another.

    Seen in peft 0.21.2.
    """

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


def test_peft_fails_where_the_layers_of_a_qwen2_are_replicated(torch, peft, transformers):
    """The layers of a Qwen2 cannot be replicated.

    `layer_replication` lengthens the model's list of layers, and not `layer_types` of its
    configuration, which Qwen2 reads by the layer's number.

    **Right.** A copy of a layer is a layer of its kind.

    **Consequence.** None in numbers: the call fails. minilora refuses to write such an adapter.

    Not asked by `verify`: no configuration replicates layers.

    Seen in peft 0.21.2.
    """
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


def test_peft_rounds_the_gradient_of_a_bias_three_times_under_dora(torch, peft):
    r"""A bias loses its gradient under DoRA in half precision.

    With $g$ the magnitude over the norm, PEFT adds $(g - 1) (W x + b - b)$ to the base's output
    $W x + b$. The bias's gradient comes by three ways, $\sum \d y + (g - 1) \sum \d y - (g - 1)
    \sum \d y$, and each is rounded.

    **Right.** $\d b = \sum \d y$: DoRA rescales the weight, and not the bias.

    **Consequence.** Where $g$ is large, a bias that is trained beside DoRA in bfloat16 is trained
    by rounding errors, or not at all.

    Found by `verify peft`: `variants.dora.vjp`.

    Seen in peft 0.21.2.
    """
    base = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.bfloat16))
    config = peft.LoraConfig(r=1, target_modules=["0"], use_dora=True, bias="all")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.base_layer.weight.data.fill_(1)
    found = {}
    for g in (2, 512):  # the magnitude over the norm
        model.zero_grad()
        layer.lora_magnitude_vector["default"].weight.data.fill_(g)
        model(torch.ones(1, 1, dtype=torch.bfloat16)).backward()
        found[g] = layer.base_layer.bias.grad.item()
    assert found == {2: 1, 512: 0}  # 1 + 511 - 511, and 1 is right


def test_peft_warns_that_a_whole_bias_of_lora_b_is_a_shard(torch, peft):
    """A whole bias of B is taken for a shard.

    With `lora_bias=True`, saving warns that `lora_B.bias` has an invalid shape and that shards
    were not gathered: what is of one dimension counts as a shard, and a bias has one dimension.

    **Right.** The bias is a vector of the layer's outputs; it is saved whole and comes back.

    **Consequence.** A false alarm at every save; where warnings are errors, no save.

    Not asked by `verify`: it is a warning, and no number.

    Seen in peft 0.21.2.
    """
    base = torch.nn.Sequential(torch.nn.Linear(4, 3))
    config = peft.LoraConfig(r=1, lora_bias=True, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    with pytest.warns(UserWarning, match=r"invalid shape: base_model.model.0.lora_B.bias:\(3,\)"):
        tensors = peft.get_peft_model_state_dict(model)
    bias = model.base_model.model[0].lora_B.default.bias
    assert torch.equal(tensors["base_model.model.0.lora_B.bias"], bias)  # whole, and right


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_transformers_loads_dora_without_its_magnitude(torch, transformers, peft, tmp_path):
    """DoRA is loaded without its magnitude.

    `model.load_adapter` renames the file's `lora_magnitude_vector` to
    `lora_magnitude_vector.default`; the parameter is called `….default.weight`. A report that is
    logged names the one as unexpected and the other as missing, and the magnitude stays the norm of
    the base's rows.

    **Right.** $W' = m\\, (W + s B A) / \\lVert W + s B A \\rVert$ with the magnitude in the file.

    **Consequence.** The model computes with untrained magnitudes. Load with
    `PeftModel.from_pretrained`.

    Found by `verify transformers`: `inference.logits.dora`.

    Seen in transformers 5.24.0.
    """
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
    W = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=1, target_modules=["layers.0.self_attn.q_proj"], use_dora=True)
    adapted = peft.get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(3)
    adapted.save_pretrained(tmp_path / "adapter")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter", adapter_kwargs={"local_files_only": True})
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    m = loaded.pop("model.layers.0.self_attn.q_proj.lora_magnitude_vector.default.weight")
    assert all((factor == 3).all() for factor in loaded.values())
    assert torch.allclose(m, torch.linalg.norm(W, dim=1))
    assert not (m == 3).any()


def test_peft_serves_the_base_where_the_names_of_an_adapter_fit_nothing(torch, peft, tmp_path):
    """The base is served where the names of an adapter fit nothing.

    `PeftModel.from_pretrained` builds the adapter of `adapter_config.json`, fills in the tensors
    whose names fit, and leaves the others out: the factors B that it found nothing for stay 0. It
    warns of missing tensors; of tensors that are left over it says nothing.

    **Right.** An adapter that does not fit is refused, or has its effect.

    **Consequence.** A checkpoint with other names (without the prefix, of another version of the
    model) answers as the base does, and one that fits in part as a mixture. Make the warning an
    error, and compare the names in the file with `get_peft_model_state_dict`.

    Found by `verify peft`: `inference.names.prefix`, `inference.names.adapter-name`,
    `inference.names.misspelt`, `inference.names.other-model`, `inference.names.partial`.

    Seen in peft 0.21.2.
    """

    def base():
        return torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))

    config = peft.LoraConfig(target_modules=["0"], r=1, lora_alpha=1)
    model = peft.get_peft_model(base(), config)
    for factor in ("lora_A", "lora_B"):
        getattr(model.base_model.model[0], factor)["default"].weight.data.fill_(1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    stored = load_file(file)
    for rename, warned in ((lambda n: n, False), (lambda n: n.removeprefix("base_model."), True)):
        save_file({rename(n): array for n, array in stored.items()} | {"over": np.ones(1)}, file)
        said = pytest.warns(UserWarning, match="missing adapter keys") if warned else nullcontext()
        with said:
            loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
        change = loaded.base_model.model[0].get_delta_weight("default")
        assert change.item() == (0 if warned else 1)


def test_peft_fails_once_its_last_adapter_is_deleted(torch, peft):
    """A model whose last adapter is deleted fails.

    `delete_adapter` leaves the name of the deleted adapter as the active one, and the model's
    forward looks up its configuration; the layers themselves are the base's again.

    **Right.** Without adapters a model is its base.

    **Consequence.** A server that unloads its last adapter stops answering. Disable adapters
    first, or use `unload`.

    Found by `verify peft`: `lifecycle.modules-to-save.delete`, `lifecycle.random-steps`.

    Seen in peft 0.21.2.
    """
    model, layer, state = peft_pair(torch, peft, (2, None), (4, None))
    one = layer.weight.new_ones(1, 1)
    for name in ("two", "one"):
        model.delete_adapter(name)
        state = state.delete(name)
    with pytest.raises(KeyError, match="one"):
        model(one)
    assert model.base_model(one) == 1  # the layer itself is the base again
    assert state.forward(np.ones((1, 1)))[0] == 1


def test_peft_activates_another_adapter_for_a_deleted_one(torch, peft):
    """Another adapter acts for a deleted one.

    Deleting the only active adapter activates the first of those that are left, with a warning.

    **Right.** That is a choice: minilora's `AdaptedLayer` has none act in the stead of one that is
    gone, since nobody asked for it.

    **Consequence.** The function after a deletion depends on the order in which adapters were
    added.

    Found by `verify peft`: `lifecycle.random-steps`.

    Seen in peft 0.21.2.
    """
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


def test_peft_empties_adapters_of_similar_names_when_one_is_hot_swapped(torch, peft):
    """Hot-swapping an adapter empties others whose names contain its own.

    `hotswap_adapter_from_state_dict` fills with 0 whatever tensor has the adapter's name somewhere
    in its own and no new value: those of `two` too, where `tw` is swapped.

    **Right.** Another adapter stays as it is.

    **Consequence.** With the adapters `v1` and `v10`, swapping `v1` makes `v10` the base, without a
    word. Give adapters names of which none contains another.

    Found by `verify peft`: `lifecycle.replace-similar`.

    Seen in peft 0.21.2.
    """
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


def test_peft_scales_and_saves_a_hot_swapped_adapter_as_the_one_before(torch, peft, tmp_path):
    """A hot-swapped adapter is scaled and saved by the numbers of the one before.

    Hot-swapping sets the layers' `scaling`. Their `r` and `lora_alpha`, which `set_scale` takes,
    and the configuration, which is saved, stay those of the adapter that was replaced.

    **Right.** The scale of an adapter is its own alpha over its own rank.

    **Consequence.** A scale that is set after a swap, and a file that is saved after it, are off by
    the ratio of both scales; where the ranks differ, the file cannot be loaded. Load the adapter
    anew before you save or scale it.

    Found by `verify peft`: `lifecycle.replace-scaled`, `lifecycle.replace.save`.

    Seen in peft 0.21.2.
    """
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


def test_peft_passes_over_unknown_names_where_several_are_activated(torch, peft):
    """An unknown adapter is passed over where several are activated.

    `PeftModel.set_adapter` takes one name and refuses one that it does not know. `set_adapter` of
    the model below, which takes several, passes over what its layers lack.

    **Right.** A name that there is not is an error.

    **Consequence.** A misspelt name makes the others act, or the base alone, without a word.

    Found by `verify peft`: `lifecycle.unknown`.

    Seen in peft 0.21.2.
    """
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


def test_peft_hot_swaps_no_embedding(torch, peft, tmp_path):
    """The adapter of an embedding cannot be hot-swapped.

    The layer of a tensor is found by taking the last three words off its name. The factors of an
    embedding are no modules, and their names have no `.weight`: the layer above is found instead.

    **Right.** An embedding's adapter is replaced as a linear layer's is.

    **Consequence.** An AttributeError, from which nothing is lost but the cause.

    Found by `verify peft`: `lifecycle.replace.embedding`.

    Seen in peft 0.21.2.
    """
    hotswap_adapter = optional("peft.utils.hotswap").hotswap_adapter
    base = torch.nn.Sequential(torch.nn.Embedding(4, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(AttributeError, match="scaling"):
        hotswap_adapter(model, tmp_path, "default", torch_device="cpu")


def test_peft_makes_a_row_of_a_vector_with_dora(torch, peft):
    """DoRA makes a row of a vector.

    PyTorch's linear takes one vector without a batch. With DoRA on it the output is a row: the
    factor is viewed as a matrix of one row, and that is how the sum comes out.

    **Right.** An adapter changes the values of a layer's output, never its shape.

    **Consequence.** What comes after the layer fails, or broadcasts without a word. Give a batch
    of one.

    Found by `verify peft`: `variants.dora.unbatched`, `variants.dora.unbatched-vjp`.

    Seen in peft 0.21.2.
    """
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3))
    x = torch.ones(2)
    assert layers(x).shape == (3,)
    config = peft.LoraConfig(r=1, use_dora=True, target_modules=["0"])
    model = peft.get_peft_model(layers, config)
    assert model(x).shape == (1, 3)
    with model.disable_adapter():
        assert model(x).shape == (3,)


def packed_layer(torch, bitsandbytes, W):
    """A four-bit layer of W, in which entries that are alone in their blocks are exact."""
    nn = bitsandbytes.nn
    layer = nn.Linear4bit(W.shape[1], len(W), compute_dtype=W.dtype, quant_type="nf4")
    how = {"quant_type": "nf4", "compress_statistics": False, "requires_grad": False}
    layer.weight = nn.Params4bit(W, **how).to("cpu")
    layer.bias = torch.nn.Parameter(torch.zeros(len(W), dtype=W.dtype))
    return layer


def test_bitsandbytes_fails_on_the_gradient_of_a_bias_from_one_token(torch, bitsandbytes):
    r"""The gradient of a bias is summed over the first axis.

    `Linear4bit` sums dy over its first axis alone, and rounds. What remains of a batch of
    sequences autograd sums; of one token without a batch a number remains, and it fails.

    **Right.** $\partial L / \partial b = \sum_t dy_t$ over all tokens, one or many.

    **Consequence.** For biases that are trained beside a four-bit weight, one rounding more. Give
    a single token its batch.

    Found by `verify bitsandbytes`: `linear.vjp.bias`, `linear.vjp.all`.

    Seen in bitsandbytes 0.50.2.
    """
    layer = packed_layer(torch, bitsandbytes, torch.zeros(2, 64, dtype=torch.bfloat16))

    def gradient(dy):
        x = torch.zeros(*dy.shape[:-1], 64, dtype=dy.dtype)
        return torch.autograd.grad(layer(x), layer.bias, dy)[0].tolist()

    dy = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert gradient(dy[None]) == [1, 2]
    with pytest.raises(RuntimeError, match="invalid gradient"):
        gradient(dy)
    # Two sequences of two tokens: 256 + 1 is rounded before -256 + 0 comes to it.
    dy = torch.tensor([[[256], [-256]], [[1], [0]]], dtype=torch.bfloat16).expand(2, 2, 2)
    assert dy.sum((0, 1)).tolist() == [1, 1]
    assert gradient(dy) == [0, 0]


def packs(bitsandbytes):
    if not bitsandbytes.functional.has_avx512bf16():
        pytest.skip("the packing is that of processors with AVX-512 for bfloat16")


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_bitsandbytes_loses_the_gradient_of_a_layer_that_was_evaluated(torch, bitsandbytes):
    r"""The gradient of a layer that was evaluated is lost.

    On a processor with AVX-512 for bfloat16, a `Linear4bit` packs its weight anew in its first
    evaluation, for a kernel that came with [bitsandbytes
    1804](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804). Back in training it
    goes on with that kernel, which has no gradient. PyTorch warns; a layer with a bias fails.

    **Right.** $\d x = W^\top \d y$, whatever was computed before.

    **Consequence.** A training run that evaluates in between goes on with other gradients:
    through the adapters and around the layers alone, no longer through the frozen weights. Put
    the model together again after an evaluation, or keep its four-bit layers in training.

    Found by `verify bitsandbytes`: `quantized.gradients`.

    Seen in bitsandbytes 0.50.2.
    """
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


def test_bitsandbytes_rounds_to_bfloat16_once_a_layer_was_evaluated(torch, bitsandbytes):
    """A layer that was evaluated rounds to bfloat16.

    The same packing rounds the constants of the blocks to bfloat16, and its kernel the inputs, in
    a float32 model as well. It refuses layers whose output features are no multiple of 32.

    **Right.** Packing is another order of the same numbers.

    **Consequence.** Evaluation and training are two functions, and what is trained after an
    evaluation is another function than before. `minilora verify bitsandbytes` keeps the frozen
    layer in training.

    Found by `verify bitsandbytes`: `quantized.forward`.

    Seen in bitsandbytes 0.50.2.
    """
    packs(bitsandbytes)
    w = 1 + 2**-20
    x, W = torch.ones(1, 64), torch.zeros(32, 64)
    W[:, 0] = w
    layer = packed_layer(torch, bitsandbytes, W)
    with torch.no_grad():
        assert (layer.train()(x) == w).all()
        assert (layer.eval()(x) == 1).all()
        assert (layer.train()(x) == 1).all()
        with pytest.raises(AssertionError, match="N must be divisible"):
            packed_layer(torch, bitsandbytes, W[:5]).eval()(x)


def test_transformers_sums_the_micro_batches_of_a_classifier(torch, transformers, tmp_path):
    r"""A classifier is trained by the sum of its micro-batches' losses.

    `Trainer` divides a loss by the number of micro-batches of a step, unless the model's forward
    takes further keyword arguments: then it hands it `num_items_in_batch`, and expects a loss that
    is divided by it. The forward of a classifier takes them, and its loss is the mean of the
    micro-batch as before.

    **Right.** Two equal micro-batches have the gradient of one, $\nabla \tfrac12 (L + L) = \nabla
    L$.

    **Consequence.** With `gradient_accumulation_steps=k` a classifier's gradient is k times as
    large: clipping acts, or the rate is in fact k times as high.

    Found by `verify trainer`: `train.classifier`.

    Seen in transformers 5.24.0.
    """
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "num_labels": 2}
    config = transformers.BertConfig(vocab_size=5, intermediate_size=4, **sizes)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}

    def step(micro_batches):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        how = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
        how |= {"lr_scheduler_type": "constant", "use_cpu": True, "report_to": []}
        how |= {"disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 1}
        arguments = transformers.TrainingArguments(
            str(tmp_path), gradient_accumulation_steps=micro_batches, **how
        )
        transformers.Trainer(
            model, arguments, lambda items: items[0], [batch] * micro_batches
        ).train()
        return model.classifier.bias.detach()  # which began at 0

    assert step(1).abs().min() > 0
    assert (step(2) == 2 * step(1)).all()


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_peft_merges_another_weight_once_a_four_bit_layer_was_evaluated(torch, peft, bitsandbytes):
    r"""An evaluated layer in four bits is merged into another weight.

    On a processor with AVX-512 for bfloat16, `Linear4bit` packs its weight anew in its first
    evaluation, in an order that its `quant_state` does not tell. PEFT's merge unpacks it by
    `dequantize_4bit`, in the order that it had.

    **Right.** The merged weight is $\tilde W + s B A$, whatever was computed before; with $B = 0$
    it is $\tilde W$.

    **Consequence.** Evaluate, then merge, and the model is destroyed, without an error. Merge
    before the first evaluation, or in a model that was loaded anew.

    Found by `verify bitsandbytes`: `quantized.merge-after-forward`.

    Seen in peft 0.21.2.
    """
    packs(bitsandbytes)
    W = torch.zeros(32, 128)
    W[0, ::64] = torch.tensor([2.0, 3.0])

    def merged(evaluate):
        whole = torch.nn.Sequential(packed_layer(torch, bitsandbytes, W))
        whole.is_loaded_in_4bit = True
        model = peft.get_peft_model(whole, peft.LoraConfig(r=1, target_modules=["0"]))  # B = 0
        if evaluate:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 128))
        model.merge_adapter()
        held = model.base_model.model[0].get_base_layer().weight
        return bitsandbytes.functional.dequantize_4bit(held.data, held.quant_state)

    assert (merged(evaluate=False) == W).all()
    assert (merged(evaluate=True) != W).any()


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_peft_merges_the_bias_of_B_without_its_scale_into_few_bits(torch, peft, bitsandbytes):
    r"""A bias of B is merged without its scale into a layer in four or eight bits.

    `merge` of `tuners/lora/bnb.py` adds the bias of B to the layer's bias as it is. In the forward
    it is scaled with the branch, and so it is when a dense layer is merged.

    **Right.** $y = W x + b + s (B A x + c)$, so that the merged bias is $b + s c$.

    **Consequence.** With `lora_bias=True` and $\alpha \neq r$ a merged model in few bits is another
    one, without an error.

    Found by `verify bitsandbytes`: `merge.bias-of-B`.

    Seen in peft 0.21.2.
    """
    whole = torch.nn.Sequential(packed_layer(torch, bitsandbytes, torch.zeros(1, 64)))
    whole.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=1, lora_alpha=2, lora_bias=True, target_modules=["0"])
    model, x = peft.get_peft_model(whole, config).train(), torch.zeros(1, 64)
    torch.nn.init.ones_(model.base_model.model[0].lora_B["default"].bias)
    assert model(x).item() == 2  # b = 0, s = 2, c = 1
    model.merge_adapter()
    assert model(x).item() == 1


def test_bitsandbytes_rounds_activations_to_eight_bits_in_evaluation(torch, bitsandbytes):
    r"""A layer in eight bits rounds its inputs too, in evaluation alone.

    On a CPU `Linear8bitLt` multiplies by the dequantized weight in training. In evaluation it
    quantizes each row of x to eight bits first, as LLM.int8 does on a GPU in both.

    **Right.** Without dropout evaluation is the function that was trained.

    **Consequence.** What is small beside the greatest input of a token is lost in evaluation: 0.4 %
    of it and less. An adapter is trained beside another base than it is used with.

    Found by `verify bitsandbytes`: `quantized.forward`.

    Seen in bitsandbytes 0.50.2.
    """
    nn, W = bitsandbytes.nn, torch.ones(1, 2)
    layer = nn.Linear8bitLt(2, 1, bias=False, has_fp16_weights=False)
    layer.weight = nn.Int8Params(W, requires_grad=False, has_fp16_weights=False).to("cpu")
    x = torch.tensor([[1, 2.0**-9]])  # 127 / 512 rounds to 0
    with torch.no_grad():
        assert layer.train()(x).item() == 1 + 2.0**-9
        assert layer.eval()(x).item() < 1 + 2.0**-10


def test_mlx_lm_sums_a_quantized_product_in_half_precision(mlx_lm):
    r"""A product with a quantized weight is summed in half precision.

    On the CPU `quantized_matmul` keeps its running sums in the inputs' dtype; the product with the
    same weight dequantized keeps them in float32.

    **Right.** $y = W x$, here $256 + 1 + 1 = 258$, which bfloat16 has.

    **Consequence.** In bfloat16 the output of a quantized layer is off by several per cent, and
    its input's gradient too.

    Found by `verify mlx-lm`: `quantized.merge`.

    Seen in mlx_lm 0.32.2.
    """
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


def test_jax_sums_the_gradient_of_a_bias_in_half_precision(jax):
    r"""The gradient of a bias is summed in half precision.

    A bias is added by broadcasting, whose transpose is a sum in the array's own dtype. `jnp.sum`
    itself sums half precisions in float32.

    **Right.** $\partial L / \partial b = \sum_t dy_t$, here a number that bfloat16 has.

    **Consequence.** From 256 on a bfloat16 sum of ones may stand still; what counts is the
    greatest partial sum against the end. The same goes for every parameter that is broadcast over
    tokens, as a norm's weight is.

    Found by `verify jax`: `linear.vjp.bias`.

    Seen in jax 0.10.2.
    """
    dy = np.array([[256], [1], [1]], bfloat16)
    b = np.zeros(1, bfloat16)
    _, back = jax.vjp(lambda b: np.zeros_like(dy) + b, b)
    assert back(dy)[0] == 256
    assert jax.numpy.sum(dy, 0) == 258 == bfloat16(258)


def test_mlx_lm_drops_nothing_of_the_base_that_dora_rescales(mlx_lm, monkeypatch):
    r"""Nothing is dropped of the base that DoRA rescales.

    `DoRALinear` computes $g \circ (W x + s B A h)$ with $h = K \circ x$, the input that dropout
    has left. DoRA's authors, and PEFT after them, compute $W x + (g - 1) \circ W h + g \circ s B
    A h$: see [DoRA 2](https://github.com/nbasyl/DoRA/issues/2).

    **Right.** The paper's equation has no dropout. In the mean over masks both are the layer
    without one, so that this is a choice; but then a run is not the one that the paper's code
    makes.

    **Consequence.** With dropout, training differs from PEFT's, and the magnitude's gradient is
    less noisy. Without dropout, and in evaluation, the two are one function.

    Not asked by `verify`: the peer declares it as its convention, `dora_dropout`.

    Seen in mlx_lm 0.32.2.
    """
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
