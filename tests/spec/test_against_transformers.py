"""Whole models against transformers and PEFT in float64, both reading the same files.

transformers casts to float32 in places, whatever the model's dtype: Llama's and Qwen2's RMSNorm,
their RoPE tables and the softmax of their attention, and the logits before a language model's loss.
For these tests, and in those modules alone, the name float32 means float64; nothing else of theirs
is changed. The base model's dropout is off; that of the adapters multiplies by the same masks.
"""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, OPTIMIZER, greatest, record_worst, relative_error
from extras import optional

import minilora as ml
from minilora import testing as draw
from minilora.io.architectures import module_paths, tensor_names
from minilora.io.files import read_json
from minilora.io.formats.huggingface import read_model
from minilora.io.formats.peft import adapter_names, read_adapter
from minilora.spec import initialization, optim

torch = optional("torch")
transformers = optional("transformers")
peft = optional("peft")
SIZES = {"vocab_size": 23, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = SIZES | {
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
CAUSAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "Llama": (
        "LlamaForCausalLM",
        LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
        {"target_modules": [*CAUSAL, "lm_head"], "rank_pattern": {"k_proj": 4}},
    ),
    "Llama, tied": (
        "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0}},
        {"target_modules": "all-linear", "use_rslora": True},
    ),
    "Qwen2": (
        "Qwen2ForCausalLM",
        LLAMA | {"rms_norm_eps": 0.1},
        {"target_modules": CAUSAL, "alpha_pattern": {"up_proj": 5}},
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        SIZES | {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20, "n_positions": 16},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "BERT": (
        "BertForSequenceClassification",
        SIZES
        | {
            "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_labels": 4,
            "num_attention_heads": 3, "max_position_embeddings": 16, "type_vocab_size": 2,
        },
        {"target_modules": ["query", "key", "value", "dense", "classifier"]},
    ),
}  # fmt: skip


class Doubles:
    """The module torch, but for the name float32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def float32_is_float64(monkeypatch):
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2

    monkeypatch.setattr(modeling_llama, "torch", Doubles())
    monkeypatch.setattr(modeling_qwen2, "torch", Doubles())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    transformers.utils.logging.disable_progress_bar()


class Kept(torch.nn.Module):
    """Dropout with its mask given: multiplication by K, (tokens, features) here."""

    def __init__(self, K):
        super().__init__()
        self.K = torch.tensor(K.T)

    def forward(self, x):
        return x * self.K.reshape(x.shape)


def quietly(f, *arguments, **settings):
    """The call without the libraries' remarks on tied and on adapted heads."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `T", UserWarning)
        return f(*arguments, **settings)


def move(parameters, rng):
    """Away from zero biases, norms of one and B = 0."""
    with torch.no_grad():
        for p in parameters:
            p += torch.tensor(0.3 * rng.standard_normal(p.shape))


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A model and an adapter on every projection, written by transformers and PEFT."""
    cls, settings, choice = MODELS[request.param]
    cls = getattr(transformers, cls)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = cls(cls.config_class(**settings)).double()
    move(model.parameters(), rng)
    model.save_pretrained(tmp_path / "model")
    choice = peft.LoraConfig(r=3, lora_alpha=7, **choice)
    adapted = quietly(peft.get_peft_model, model, choice)
    move((p for p in adapted.parameters() if p.requires_grad), rng)
    quietly(adapted.save_pretrained, tmp_path / "adapter")
    return tmp_path


def ours(folder, everything):
    c, W = read_model(folder / "model")
    adapter, tuning = read_adapter(folder / "adapter", c)
    W = W | adapter
    return c, W, replace(tuning, trained=frozenset(W)) if everything else tuning


def theirs(folder, c, W, keep):
    """The module, and its parameters by our names."""
    cls = getattr(transformers, read_json(folder / "model" / "config.json")["architectures"][0])
    model = cls.from_pretrained(folder / "model", dtype=torch.float64, attn_implementation="eager")
    model = quietly(peft.PeftModel.from_pretrained, model, folder / "adapter", is_trainable=True)
    model = model.eval()
    for at, K in keep.items():
        model.get_submodule(f"base_model.model.{module_paths(c)[at]}").lora_dropout["default"] = (
            Kept(K)
        )
    parameters = {n.replace(".default", ""): p for n, p in model.named_parameters()}
    return model, {name: parameters[place] for name, place in adapter_names(c, W).items()}


def as_ours(c, name, array):
    """Conv1D's weights lie transposed, and vectors are columns here."""
    array = array.detach().numpy()
    array = array.T if tensor_names(c).get(name, ("", False))[1] else array
    return array.reshape(len(array), -1)


def their_loss(model, batch):
    given = {
        "input_ids": batch.ids, "attention_mask": batch.mask.astype(int), "labels": batch.labels,
        "position_ids": batch.positions, "token_type_ids": batch.types,
    }  # fmt: skip
    return model(**{n: torch.tensor(a) for n, a in given.items() if a is not None}).loss


def errors(folder, factor=1.0):
    """The greatest relative errors: of the loss, of adapters' gradients, of all the others."""
    c, W, tuning = ours(folder, everything=True)
    rng = np.random.default_rng(1)
    batch = draw.draw_batch(c, rng, 4, 7)
    keep = initialization.draw_dropout(
        rng, 0.25, initialization.input_shapes(c, *batch.ids.shape), float
    )
    keep = {at: K for at, K in keep.items() if at in tuning.scale}
    model, parameters = theirs(folder, c, W, keep)
    for p in parameters.values():
        p.requires_grad_(True)
    L = their_loss(model, batch)
    L.backward()
    scale = {at: s * factor for at, s in tuning.scale.items()}
    found_L, back = ml.loss(batch, W, c, replace(tuning, dropout_scale=keep, scale=scale))
    found = back(1.0)
    wanted = {name: as_ours(c, name, p.grad) for name, p in parameters.items()}
    assert found.keys() == wanted.keys()
    # The bias of a key moves all scores of a query alike: its gradient is 0 but for rounding.
    scales = {n: greatest(wanted[n.replace(".k.bias", ".k.weight")]) for n in wanted}
    each = {n: relative_error(found[n], wanted[n], scales[n]) for n in wanted}
    factors = [n for n in wanted if n.endswith((".A", ".B"))]
    assert len(factors) == 2 * len(tuning.scale)
    return (
        relative_error(found_L, L.item()),
        max(each[n] for n in factors),
        max(each[n] for n in each.keys() - set(factors)),
    )


def test_loss_and_every_gradient_are_those_of_transformers_and_peft(folder, request):
    name = request.node.callspec.params["folder"]
    for what, error in zip(("loss", "adapters", "base"), errors(folder), strict=True):
        record_worst(f"6. transformers + PEFT, {what}, {name}", error)
        assert error <= GRADIENT


def test_a_scale_off_in_the_eleventh_digit_is_noticed(folder):
    assert max(errors(folder, factor=1 + 1e-11)) > GRADIENT


N = 10


def test_ten_steps_of_training_are_those_of_transformers_and_peft(folder, request):
    """Two micro-batches a step, clipped by their norm, at a rate that warms up and then falls."""
    c, W, tuning = ours(folder, everything=False)
    model, parameters = theirs(folder, c, W, {})
    trained = {name: parameters[name] for name in tuning.trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, weight_decay=0.1)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 12)
    settings = {"warmup": 3, "total": 12}
    params = {name: W[name] for name in tuning.trained}
    state = optim.AdamState()
    rng = np.random.default_rng(2)
    worst = 0.0
    for k in range(N):
        batches = [draw.draw_batch(c, rng, b, 6) for b in (1, 3)]
        counts = [labels_that_count(c, batch) for batch in batches]
        for batch, n in zip(batches, counts, strict=True):
            (their_loss(model, batch) * (n / sum(counts))).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

        parts = [ml.loss(batch, W | params, c, tuning)[1](1.0) for batch in batches]
        g, norm = optim.clip(optim.accumulate(list(zip(counts, parts, strict=True))), 0.5)
        rate = 0.01 * optim.schedule("cosine", k, **settings)
        params, state = optim.adamw(params, g, state, rate, weight_decay=0.1)
        assert norm > 0.5
        worst = max(
            worst, *(relative_error(p, as_ours(c, n, trained[n])) for n, p in params.items())
        )
    name = request.node.callspec.params["folder"]
    record_worst(f"7. ten steps of training by transformers + PEFT, {name}", worst)
    assert worst <= OPTIMIZER
    # The base is what was read, to the bit, here and there.
    for name, w in read_model(folder / "model")[1].items():
        assert np.array_equal(W[name], w)
        assert np.array_equal(as_ours(c, name, parameters[name]), w)


def labels_that_count(c, batch):
    labels = batch.labels[:, 1:] if c.causal else batch.labels
    return int((labels != -100).sum())
