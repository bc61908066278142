"""PEFT's files of every variant: written here and loaded by PEFT, written by PEFT and read here.

Both put them beside the same base, in float64: the logits and the gradients of all that is trained
have to agree. Llama's and Qwen2's norms and RoPE are in float64 as in test_formats.
"""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from calculus import GRADIENT, greatest, record_worst, relative_error
from test_formats import MODELS, same, weights
from test_formats import libraries as libraries
from test_formats_variants import CASES, base_of, made, parts_of

from minilora import Batch, inject, logits
from minilora.io.architectures import tensor_names
from minilora.io.errors import FormatError
from minilora.io.files import read_json, read_tensors
from minilora.io.formats.huggingface import write_model
from minilora.io.formats.peft import (
    CONFIG,
    WEIGHTS,
    adapter_names,
    read_adapter,
    read_lora_config,
    vera_projections,
    write_adapter,
)
from minilora.spec.target_modules import LoraConfig, replicate_layers, with_invocation

IDS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 1, 4], [2, 7, 1, 8, 0]])  # with aLoRA's, without


def quietly(f, *arguments, **settings):
    """The call without the libraries' remarks, but for those on tensors that do not fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = f(*arguments, **settings)
    said = [str(w.message) for w in caught]
    assert not [text for text in said if "missing adapter keys" in text], said
    return result


def base_model(libraries, path, c):
    write_model(path, c, weights(c))
    return libraries.model(path)


def loaded(libraries, path, c, adapter):
    """The base with the folder's adapter, as PEFT puts it there."""
    model = base_model(libraries, path, c)
    model = quietly(libraries.peft.PeftModel.from_pretrained, model, adapter, is_trainable=True)
    return model.double().eval()


def trained_here(c, W, tuning, lora, ids):
    """The logits and their gradients for one and the same dz, by the names in the file."""
    tables = {f"{at}.weight" for at in lora.trainable_token_indices}
    tuning = replace(tuning, trained=tuning.trained | tables)
    if lora.alora_invocation_tokens:
        tuning = with_invocation(tuning, ids, lora.alora_invocation_tokens)
    z, back = logits(Batch(ids), W, c, tuning)
    dz = np.random.default_rng(7).standard_normal(z.shape)
    gradients = back(dz)
    for at, rows in lora.trainable_token_indices.items():
        gradients[f"{at}.tokens"] = gradients.pop(f"{at}.weight")[[*rows]]
    transposed = {name: lies for name, (_, lies) in tensor_names(c).items()}
    return (
        z,
        dz,
        {
            place: gradients[name].T if transposed.get(name) else gradients[name]
            for name, place in adapter_names(c, gradients).items()
        },
    )


def errors(libraries, model, c, W, tuning, lora, ids=IDS):
    """The relative errors of the logits and of each gradient of what PEFT trains."""
    z, dz, wanted = trained_here(c, W, tuning, lora, ids)
    torch = libraries.torch
    found = model(input_ids=torch.from_numpy(ids)).logits
    found = found.reshape(-1, found.shape[-1])
    found.backward(torch.from_numpy(dz.T.copy()))
    given = {}
    for name, p in model.named_parameters():
        name = name.replace(".default", "").replace(".modules_to_save", "")
        name = name.replace("magnitude_vector.weight", "magnitude_vector")
        if p.requires_grad and not name.endswith("ranknum"):  # as in test_findings
            given[name] = p.grad
    extra = wanted.keys() ^ given.keys()
    assert not extra, sorted(extra)
    result = {"logits": relative_error(found.detach().numpy().T, z)}
    for name, g in wanted.items():
        array = given[name].numpy()
        # The bias of a key moves all scores of a query alike: 0 but for rounding.
        size = greatest(g) or greatest(array) or 1.0
        if ".key." in name and name.endswith(".bias"):
            queries = [n for n in wanted if ".query." in n and n.endswith(".bias")]
            size = max(greatest(wanted[n]) for n in queries)
        result[name] = relative_error(array.reshape(g.shape), g, size)
    return result


def agree(what, found, condition=1.0):
    figure = max(found.values()) / condition
    record_worst(f"PEFT's files, {what}", figure)
    return figure <= GRADIENT


def condition(init, base, read):
    """How much a decomposition's factors may differ more than the weight that is decomposed.

    Singular vectors turn by the error of the weight over the gap to the next singular value
    (Wedin 1972), Q's columns by it over the least singular value of the columns before them
    (Stewart 1977): relative to the greatest singular value, by at least 1.
    """
    worst = 1.0
    for name in (name for name in read if name.endswith(".A")):
        W, r = base[name.removesuffix("A") + "weight"], read[name].shape[0]
        values = np.linalg.svd(W if init == "pissa" else W[:, :r], compute_uv=False)
        least = min(-np.diff(values[: r + 1])) if init == "pissa" else values[-1]
        worst = max(worst, values[0] / least)
    return worst


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_and_trains_what_is_written(case, libraries, tmp_path):
    c, W, tuning, lora = made(case)
    write_adapter(tmp_path / "adapter", c, W, tuning, lora)
    model = loaded(libraries, tmp_path / "model", MODELS[CASES[case][0]], tmp_path / "adapter")
    found = errors(libraries, model, c, W, tuning, lora)
    assert agree(f"written here, {lora.variant}", found), found
    if case == "tie, gpt2":  # as in test_findings
        return
    quietly(model.save_pretrained, tmp_path / "again")
    read, tuning_read = read_adapter(tmp_path / "again", c, base=base_of(case))
    assert same({k: read[k] for k in parts_of(W)}, {k: W[k] for k in parts_of(W)})
    assert tuning_read == tuning


WRONG = {
    "A and B of another layer": ("dora", lambda W: W | {"layers.0.v.A": W["layers.1.v.A"]}),
    "another magnitude": (
        "dora",
        lambda W: W | {"layers.1.v.magnitude": W["layers.0.v.magnitude"]},
    ),
    "another bias": ("bias", lambda W: W | {"layers.1.o.c": W["layers.0.o.c"]}),
    "another vector": ("vera", lambda W: W | {"layers.1.q.lambda_b": W["layers.0.q.lambda_b"]}),
    "a rotated B": ("adalora", lambda W: W | {"layers.1.o.B": W["layers.1.o.B"][:, ::-1]}),
    "a rotated A": ("tables", lambda W: W | {"embed.A": W["embed.A"][::-1]}),
    "the base's rows": (
        "tokens",
        lambda W: W | {"embed.weight": weights(MODELS["llama"])["embed.weight"]},
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_part_in_the_place_of_one_is_noticed(wrong, libraries, tmp_path):
    case, change = WRONG[wrong]
    c, W, tuning, lora = made(case)
    write_adapter(tmp_path / "adapter", c, change(W), tuning, lora)
    model = loaded(libraries, tmp_path / "model", c, tmp_path / "adapter")
    assert errors(libraries, model, c, W, tuning, lora)["logits"] > 1e6 * GRADIENT


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("dora, rslora, gpt2", {"use_rslora": False}),
        ("dora", {"lora_alpha": 5 / 3}),  # s for alpha
        ("bias", {"alpha_pattern": {}}),
        ("adalora, gpt2", {"lora_alpha": 2.6}),
        ("alora", {"alora_invocation_tokens": [1]}),
        ("tie", {"lora_alpha": 3.1}),
    ],
)
def test_another_scale_is_noticed(case, change, libraries, tmp_path):
    c, W, tuning, lora = made(case)
    write_adapter(tmp_path / "adapter", c, W, tuning, lora)
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps(read_json(file) | change))
    model = loaded(libraries, tmp_path / "model", c, tmp_path / "adapter")
    assert errors(libraries, model, c, W, tuning, lora)["logits"] > 1e6 * GRADIENT
    _, read = read_adapter(tmp_path / "adapter", c)
    assert read != tuning or "alora_invocation_tokens" in change


ADALORA = {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 6}
Q = {"target_modules": ["q_proj"]}
PEFT_SAYS = [  # the kind of model, PEFT's configuration and its arguments, the variant read
    ("llama", "Lora", Q | {"use_dora": True, "use_rslora": True, "r": 2}, "dora"),
    ("gpt2", "Lora", {"use_dora": True, "target_modules": ["wte", "c_attn"]}, "dora"),
    ("qwen2", "Lora", {"use_dora": True, "target_modules": ["embed_tokens", "lm_head"]}, "dora"),
    ("bert", "Lora", {"lora_bias": True, "target_modules": ["dense", "query"]}, "lora-bias"),
    ("gpt2", "Lora", {"lora_bias": True, "target_modules": ["c_attn"], "bias": "all"}, "lora-bias"),
    (
        "bert",
        "Lora",
        {"r": 4, "init_lora_weights": "orthogonal", "target_modules": "all-linear"},
        "lora",
    ),
    (
        "llama",
        "Lora",
        {
            "target_modules": ["q_proj", "k_proj"],
            "alora_invocation_tokens": [1, 4],
            "task_type": "CAUSAL_LM",
        },
        "alora",
    ),
    ("llama", "Lora", {"target_modules": ["embed_tokens", "q_proj"]}, "lora"),
    ("llama", "Lora", {"target_modules": ["model.embed_tokens", "lm_head"], "r": 3}, "lora"),
    ("qwen2", "Lora", {"target_modules": r".*(embed_tokens|v_proj)"}, "lora"),
    ("qwen2", "Lora", {"target_modules": ["lm_head", "v_proj"]}, "lora"),
    ("qwen2", "Lora", {"target_modules": ["lm_head"], "ensure_weight_tying": True}, "lora"),
    (
        "qwen2",
        "Lora",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
        | {"alpha_pattern": {"lm_head": 5}},
        "lora",
    ),
    ("bert", "Lora", {"target_modules": [".embeddings", "word_embeddings", "dense"]}, "lora"),
    ("llama", "Lora", Q | {"trainable_token_indices": [5, 2]}, "lora"),
    ("qwen2", "Lora", Q | {"trainable_token_indices": [5, 2]}, "lora"),
    (
        "qwen2",
        "Lora",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5]},
        },
        "lora",
    ),
    ("gpt2", "Lora", {"target_modules": ["c_fc"], "trainable_token_indices": {"wpe": [0]}}, "lora"),
    ("bert", "Lora", {"target_modules": ["query"], "trainable_token_indices": [5, 2]}, "lora"),
    ("llama", "Lora", Q | {"layer_replication": [[0, 1], [0, 2]]}, "lora"),
    ("bert", "Lora", {"target_modules": ["value"], "layer_replication": [[1, 2], [0, 2]]}, "lora"),
    ("llama", "AdaLora", ADALORA | {"target_modules": ["q_proj", "up_proj"]}, "adalora"),
    ("gpt2", "AdaLora", ADALORA | {"target_modules": ["c_attn", "c_proj"]}, "adalora"),
    ("bert", "AdaLora", ADALORA | {"target_modules": ["dense"], "bias": "lora_only"}, "adalora"),
    ("llama", "Vera", {"r": 3, "target_modules": ["q_proj", "down_proj"]}, "vera"),
    ("gpt2", "Vera", {"r": 3, "target_modules": ["c_attn", "c_proj"], "bias": "vera_only"}, "vera"),
    ("bert", "Vera", {"r": 3, "target_modules": ["query"], "bias": "all"}, "vera"),
    (
        "llama",
        "Vera",
        {"r": 2, "target_modules": ["v_proj", "up_proj"], "save_projection": False}
        | {"projection_prng_key": 77},
        "vera",
    ),
]  # fmt: skip


def adapted(libraries, model, kind, said):
    """The model with a fresh adapter of PEFT's, everything that it trains moved at random."""
    libraries.torch.manual_seed(0)
    config = quietly(getattr(libraries.peft, f"{kind}Config"), **said)
    model = quietly(libraries.peft.get_peft_model, model, config)
    rng = np.random.default_rng(3)
    with libraries.torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p += libraries.torch.from_numpy(0.3 * rng.standard_normal(p.shape))
    return model.eval()


def base_for(c, lora):
    W = weights(c)
    return replicate_layers(W, c, lora.layer_replication) if lora.layer_replication else (W, c)


@pytest.mark.parametrize(("kind", "config", "said", "variant"), PEFT_SAYS)
def test_what_peft_writes_of_each_variant_is_read(kind, config, said, variant, libraries, tmp_path):
    c = MODELS[kind]
    model = adapted(libraries, base_model(libraries, tmp_path / "model", c), config, said)
    quietly(model.save_pretrained, tmp_path / "adapter")
    if config == "Vera":
        model.double()
    lora = read_lora_config(tmp_path / "adapter", c)
    assert lora.variant == variant
    base, c = base_for(c, lora)
    read, tuning = read_adapter(tmp_path / "adapter", c, base=base)
    changed = {f"{at}.weight" for at in (*lora.trainable_token_indices, "embed", "head")}
    assert {name for name in read if name.endswith(".weight")} <= changed
    found = errors(libraries, model, c, base | read, tuning, lora)
    assert agree(f"written by PEFT, {variant}", found), found
    write_adapter(tmp_path / "ours", c, base | read, tuning, lora)
    again, tuning_again = read_adapter(tmp_path / "ours", c, base=base)
    assert same(again, {name: read[name] for name in again})
    assert tuning_again == tuning


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_pruned_singular_values_are_read_and_written(bias, libraries, tmp_path):
    """Some values of q, all of one v and none of the other: what is left has the first scale.

    PEFT keeps the bias of what is pruned to nothing under its base layer, and trains it with those
    of the others.
    """
    c = MODELS["qwen2"]
    said = ADALORA | {"target_modules": ["q_proj", "v_proj"], "bias": bias}
    model = adapted(libraries, base_model(libraries, tmp_path / "model", c), "AdaLora", said)
    at = "model.layers.{}.self_attn.{}_proj.lora_E.default"
    pattern = {at.format(0, "q"): [True, False, True, False], at.format(1, "v"): [False] * 4}
    for name, row in pattern.items():
        E = model.get_parameter(f"base_model.model.{name}")
        E.data[~libraries.torch.tensor(row)] = 0
    model.peft_config["default"].rank_pattern = pattern
    quietly(model.save_pretrained, tmp_path / "adapter")
    read, tuning = read_adapter(tmp_path / "adapter", c)
    assert {at: read[f"{at}.A"].shape[0] for at in tuning.scale} == {
        "layers.0.q": 2, "layers.1.q": 4, "layers.0.v": 4,
    }  # fmt: skip
    assert {*tuning.scale.values()} == {6 / (4 + 1e-5)}
    W = weights(c) | read
    z, _ = logits(Batch(IDS), W, c, tuning)
    torch = libraries.torch
    theirs = model(input_ids=torch.from_numpy(IDS)).logits.detach().reshape(-1, c.vocab).numpy().T
    assert relative_error(theirs, z) <= GRADIENT
    assert ("layers.1.v.bias" in tuning.trained) == (bias != "none")
    if bias != "none":
        return  # a choice of adapters has no word for the bias of what has none
    lora = read_lora_config(tmp_path / "adapter", c)
    write_adapter(tmp_path / "ours", c, W, tuning, lora)
    model = loaded(libraries, tmp_path / "again", c, tmp_path / "ours")
    found = errors(libraries, model, c, W, tuning, lora)
    assert agree("pruned", found), found


def test_doras_magnitude_is_read_under_both_its_names(libraries, tmp_path):
    c, W, tuning, lora = made("dora")
    write_adapter(tmp_path / "adapter", c, W, tuning, lora)
    file = tmp_path / "adapter" / WEIGHTS
    tensors = read_tensors(file)
    from safetensors.numpy import save_file

    magnitude = "lora_magnitude_vector"
    save_file({k + ".weight" * k.endswith(magnitude): v for k, v in tensors.items()}, file)
    read, _ = read_adapter(tmp_path / "adapter", c)
    assert same(read, {name: W[name] for name in read})
    model = loaded(libraries, tmp_path / "model", c, tmp_path / "adapter")
    found = errors(libraries, model, c, W, tuning, lora)
    assert agree("another name of DoRA's magnitude", found), found


@pytest.mark.parametrize("key", [0, 7, 2**31 + 5, 2**40 + 3])
@pytest.mark.parametrize(("r", "m", "n"), [(1, 1, 1), (3, 5, 4), (16, 40, 33)])
def test_veras_projections_are_drawn_as_peft_draws_them(key, r, m, n, libraries):
    from peft.tuners.vera.model import _kaiming_init

    torch = libraries.torch
    generator = torch.Generator().manual_seed(key)
    A, B = vera_projections(key, r, m, n)
    for ours, shape in ((A, (r, n)), (B, (m, r))):
        theirs = _kaiming_init(shape, generator=generator).numpy()
        assert ours.dtype == theirs.dtype == np.float32
        assert ours.tobytes() == theirs.tobytes()
    other = vera_projections(key + 1, r, m, n)
    assert other[0].tobytes() != A.tobytes()
    assert vera_projections(key, r, n, m)[1].tobytes() != B.tobytes() or m == n == 1


@pytest.fixture
def float64_is_allowed(libraries, monkeypatch):
    """PEFT's starts in float64, where they ask for float32 or less."""
    from peft.tuners.lora import layer

    class Doubles:
        float32 = libraries.torch.float64

        def __getattr__(self, name):
            return getattr(libraries.torch, name)

    monkeypatch.setattr(layer, "torch", Doubles())


STARTS = [
    ("llama", "pissa", {"target_modules": "all-linear", "rank_pattern": {"v_proj": 1}}),
    ("gpt2", "pissa", {"target_modules": ["c_attn", "c_fc"], "use_rslora": True}),
    ("bert", "pissa", {"target_modules": ["query"], "use_dora": True}),
    ("llama", "olora", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    ("bert", "olora", {"target_modules": ["dense"], "bias": "lora_only"}),
]


@pytest.mark.parametrize(("kind", "init", "said"), STARTS)
@pytest.mark.usefixtures("float64_is_allowed")
def test_a_start_is_taken_out_of_the_base_when_it_is_loaded(kind, init, said, libraries, tmp_path):
    c = MODELS[kind]
    said = {"r": 2, "lora_alpha": 3, "init_lora_weights": init} | said
    model = adapted(libraries, base_model(libraries, tmp_path / "model", c), "Lora", said)
    quietly(model.save_pretrained, tmp_path / "adapter")
    assert read_lora_config(tmp_path / "adapter", c).init_lora_weights == init
    with pytest.raises(FormatError, match=f'init_lora_weights: found "{init}", expected a base'):
        read_adapter(tmp_path / "adapter", c)
    base = weights(c)
    read, tuning = read_adapter(tmp_path / "adapter", c, base=base)
    lora = read_lora_config(tmp_path / "adapter", c)
    found = errors(libraries, model, c, base | read, tuning, lora)
    times = condition(init, base, read)
    assert times < 1e6  # so that what is allowed is far below what is wrong
    assert agree(f"{init}, written by PEFT", found, times), found
    again = loaded(libraries, tmp_path / "again", c, tmp_path / "adapter")
    found = errors(libraries, again, c, base | read, tuning, lora)
    assert agree(f"{init}, loaded again", found, times), found
    # Beside the base as it was, the same factors are another function.
    factors = {name: w for name, w in read.items() if not name.endswith(".weight")}
    assert (
        errors(libraries, again, c, base | factors, tuning, lora)["logits"] > 100 * times * GRADIENT
    )


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"use_rslora": True}, {"variant": "dora"}, {"variant": "lora-bias", "tables": ()}],
)
def test_a_start_is_written_for_the_base_as_it_was_or_as_it_is(init, chosen, libraries, tmp_path):
    c, base = MODELS["llama"], weights(MODELS["llama"])
    chosen = dict(chosen)
    tables = chosen.pop("tables", ("embed",))
    lora = LoraConfig(
        r=2, lora_alpha=3, init_lora_weights=init, target_modules=["q", "down", *tables],
        rank_pattern={"1.q": 3}, alpha_pattern={"down": 5}, **chosen,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    W, tuning = inject(base, lora, c.matrices(), rng)
    W |= {k: W[k] + 0.3 * rng.standard_normal(W[k].shape) for k in sorted(tuning.trained)}
    z, _ = logits(Batch(IDS), W, c, tuning)
    residual = {name: W[name] for name in base}
    with pytest.raises(FormatError, match=f"base: found none, expected one, as {init} changed"):
        write_adapter(tmp_path / "none", c, W, tuning, lora)
    for name, on in (("as it was", base), ("as it is", residual)):
        write_adapter(tmp_path / name, c, W, tuning, lora, base=on)
        read, tuning_read = read_adapter(tmp_path / name, c)
        assert not {n for n in read if n.endswith(".weight")}
        z_read, _ = logits(Batch(IDS), on | read, c, tuning_read)
        figure = relative_error(z_read, z)
        record_worst(f"{init} written for the base {name}", figure)
        assert figure <= GRADIENT
        assert len(read["layers.1.q.A"]) == (6 if on is base else 3)
        assert {len(read[f"{at}.A"]) for at in tables} == ({2} if tables else set())
        write_model(tmp_path / f"{name}, model", c, dict(on))
        model = libraries.model(tmp_path / f"{name}, model")
        model = quietly(libraries.peft.PeftModel.from_pretrained, model, tmp_path / name)
        theirs = model(input_ids=libraries.torch.from_numpy(IDS)).logits.detach().numpy()
        assert relative_error(theirs.reshape(-1, c.vocab).T, z) <= GRADIENT
    assert same(read, {k: W[k] for k in read})
    other = base | {"layers.0.q.weight": 2 * base["layers.0.q.weight"]}
    with pytest.raises(
        FormatError, match=r"base: found another layers\.0\.q\.weight, expected W's"
    ):
        write_adapter(tmp_path / "other", c, W, tuning, lora, base=other)
