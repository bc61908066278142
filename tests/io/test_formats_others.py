"""Adapters of MLX, kohya and loralib: written, read, refused, and seen by these libraries."""

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from calculus import GRADIENT, record_worst, relative_error
from extras import optional
from hypothesis import given
from hypothesis import strategies as st
from marks import examples
from safetensors.numpy import load_file, save_file

from minilora.io.architectures import module_paths
from minilora.io.errors import FormatError
from minilora.io.files import read_json
from minilora.io.formats import kohya, loralib, mlx, peft
from minilora.io.formats.factors import (
    alpha_of,
    check_factors,
    config_from_factors,
    parameter_shapes,
)
from minilora.io.formats.huggingface import write_model
from minilora.spec.initialization import draw_weights
from minilora.spec.layers import Geometry, adapted_conv
from minilora.spec.lora import (
    LORA,
    TABLES,
    TrainableSpec,
    lora_linear,
    merge,
    merge_weight,
    scale,
    twin,
)
from minilora.spec.models import GPT2, Batch, Bert, Llama, logits
from minilora.spec.target_modules import LoraConfig, inject
from minilora.spec.variants import DORA, DORA_FULL, VERA
from minilora.testing import configurations, generators

MODELS = {
    "llama": Llama(vocab=13, d=8, layers=3, heads=4, ffn=6, kv_heads=2, head_dim=4),
    "tied": Llama(vocab=13, d=8, layers=2, heads=2, ffn=6, kv_heads=1, head_dim=4, tied=True),
    "gpt2": GPT2(vocab=13, d=8, layers=2, heads=2, ffn=32, positions=9),
    "bert": Bert(vocab=13, d=8, layers=2, heads=2, ffn=12, positions=9, types=2, classes=3),
}
F32 = np.float32


def is_tied(c):
    return c.causal and "head" not in c.linears()


def adapters(c, ranks, scales, seed=0, variant=LORA, dtype=F32, whole=False):
    """Factors for the modules, no two entries alike, or small whole numbers, and their
    TrainableSpec."""
    rng = np.random.default_rng(seed)
    W = {}
    for at, r in ranks.items():
        for name, shape in parameter_shapes(c, at, r, variant).items():
            drawn = rng.integers(-3, 4, shape) if whole else rng.standard_normal(shape)
            W[name] = drawn.astype(dtype)
    variants = {} if variant is LORA else dict.fromkeys(ranks, variant)
    return W, TrainableSpec(dict(scales), {}, frozenset(W), variants)


def twinned(c, W, tuning):
    """The same, a tied head's adapter the embedding's twin, as MLX has it."""
    if not (is_tied(c) and {"embed.A", "head.A"} & W.keys()):
        return W, tuning
    W = W | dict(zip(("head.A", "head.B"), twin(W["embed.A"], W["embed.B"]), strict=True))
    s = tuning.scale | {"head": tuning.scale["embed"]}
    return W, replace(tuning, scale=s, trained=frozenset(W))


def same(one, other):
    """Whether two adapters are one: names, dtypes, bits, scales, variants, what is trained."""
    (W, tuning), (V, told) = one, other
    return (
        W.keys() == V.keys()
        and all(W[k].dtype == V[k].dtype and W[k].shape == V[k].shape for k in W)
        and all(W[k].tobytes() == V[k].tobytes() for k in W)
        and tuning == told
    )


def chosen(draw, c, among):
    """Some of the modules."""
    some = draw(st.sets(st.sampled_from(sorted(among)), min_size=1))
    return [at for at in among if at in some]


@st.composite
def mlx_adapters(draw):
    """A model and an adapter that MLX can say: one rank, one scale, one variant."""
    c = draw(configurations((Llama, GPT2)))
    variant = draw(st.sampled_from((LORA, DORA)))
    tables = {} if variant is DORA else c.tables()
    ats = chosen(draw, c, [*c.linears(), *tables])
    r = draw(st.integers(1, 3))
    ats += ["head"] if is_tied(c) and "embed" in ats else []
    s = draw(st.sampled_from((2.0, 0.75, 7 / 3, math.sqrt(2))))
    dtype = draw(st.sampled_from((F32, np.float16, ml_dtypes.bfloat16)))
    seed = draw(st.integers(0, 99))
    made = adapters(c, dict.fromkeys(ats, r), dict.fromkeys(ats, s), seed, variant, dtype)
    return c, *twinned(c, *made)


@st.composite
def kohya_adapters(draw):
    """A model and an adapter that kohya's layout can say: a rank and an alpha for each module."""
    c = draw(configurations())
    ats = chosen(draw, c, [*c.linears(), *(["head"] if is_tied(c) else [])])
    ranks = {at: draw(st.integers(1, 3)) for at in ats}
    alphas = {at: draw(st.sampled_from((1, 2.5, 4, -0.1))) for at in ats}
    scales = {at: float(F32(alphas[at])) / r for at, r in ranks.items()}
    dtype = draw(st.sampled_from((F32, np.float64, ml_dtypes.bfloat16)))
    seed, variant = draw(st.integers(0, 99)), draw(st.sampled_from((LORA, DORA_FULL)))
    return c, *adapters(c, ranks, scales, seed, variant, dtype)


few = examples(8)


@few
@given(mlx_adapters())
def test_what_mlx_can_say_comes_back_bit_for_bit(case):
    c, W, tuning = case
    with tempfile.TemporaryDirectory() as folder:
        mlx.write_adapter(folder, c, W, tuning, dropout=0.25)
        assert same(mlx.read_adapter(folder, c), (W, tuning))
        assert mlx.read_settings(folder, c).dropout == 0.25
        before = {p.name: p.read_bytes() for p in Path(folder).iterdir()}
        mlx.write_adapter(folder, c, *mlx.read_adapter(folder, c), dropout=0.25)
        assert {p.name: p.read_bytes() for p in Path(folder).iterdir()} == before


@few
@given(kohya_adapters())
def test_what_kohyas_layout_can_say_comes_back_bit_for_bit(case):
    c, W, tuning = case
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        kohya.write_adapter(file, c, W, tuning, prefix="lora_te")
        assert same(kohya.read_adapter(file, c, prefix="lora_te"), (W, tuning))
        before = file.read_bytes()
        read = kohya.read_adapter(file, c, prefix="lora_te")
        kohya.write_adapter(file, c, *read, prefix="lora_te")
        assert file.read_bytes() == before


def lora_choices(c):
    """Choices of adapters as PEFT has them, with and without what MLX cannot say."""
    at = st.sampled_from([*c.linears()])
    return st.builds(
        lambda r, alpha, rslora, targets, patterns: LoraConfig(
            r, alpha, rslora, 0.0, sorted(targets | patterns.keys()), rank_pattern=patterns
        ),
        st.integers(1, 3),
        st.sampled_from((1, 3, 0.1, 16)),
        st.booleans(),
        st.sets(at, min_size=1),
        st.just({}) | st.dictionaries(at, st.integers(1, 3), max_size=1),
    )


@pytest.mark.slow
@examples(15)
@given(configurations(), st.data(), generators())
def test_from_peft_and_back_everything_is_kept_or_refused(c, data, rng):
    """PEFT → MLX → PEFT and PEFT → kohya → PEFT: the same tensors and scales, or a refusal."""
    lora = data.draw(lora_choices(c))
    W, tuning = inject(
        {k: v.astype(F32) for k, v in draw_weights(c, rng).items()}, lora, c.linears(), rng
    )
    W = {k: W[k] + rng.standard_normal(W[k].shape).astype(F32) for k in sorted(tuning.trained)}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        peft.write_adapter(at / "one", c, W, tuning, lora)
        first = peft.read_adapter(at / "one", c)
        one_for_all = (
            len({*tuning.scale.values()}) == len({len(W[k]) for k in W if k[-1] == "A"}) == 1
        )
        alphas = {a: alpha_of(s, len(W[f"{a}.A"])) for a, s in tuning.scale.items()}
        writers = {
            "mlx": (mlx, c.causal and one_for_all),
            "kohya": (kohya, all(v is not None and float(F32(v)) == v for v in alphas.values())),
        }
        for name, (module, can) in writers.items():
            if not can:
                with pytest.raises(FormatError, match=r"architecture|rank|scale|found \d of them"):
                    module.write_adapter(at / name, c, *first)
                assert not (at / name).exists()
                continue
            module.write_adapter(at / name, c, *first)
            there = module.read_adapter(at / name, c)
            assert same(there, first)
            peft.write_adapter(at / "two", c, *there, config_from_factors(at, c, *there))
            assert same(peft.read_adapter(at / "two", c), first)
            tensors = [(at / n / peft.WEIGHTS).read_bytes() for n in ("one", "two")]
            assert tensors[0] == tensors[1]


def made(kind="llama", r=2, s=1.5, ats=("layers.0.o", "layers.1.o"), **more):
    """A model with an adapter; those of "o" have A and B both square enough to be exchanged."""
    c = MODELS[kind]
    return c, *adapters(c, dict.fromkeys(ats, r), dict.fromkeys(ats, s), **more)


def swapped(tensors, one, other):
    return (
        tensors
        | {k.replace(one, other): v for k, v in tensors.items() if one in k}
        | {k.replace(other, one): v for k, v in tensors.items() if other in k}
    )


def permuted(tensors):
    return {k: np.roll(v, 1, -1) if v.ndim else v for k, v in tensors.items()}


def transposed(tensors):
    return {
        k: v.T.copy() if v.ndim == 2 and k.endswith(("a", "down.weight")) else v
        for k, v in tensors.items()
    }


def test_a_wrong_mlx_folder_is_noticed(tmp_path):
    """Transposed, scale stored as alpha, permuted, in the wrong layer: each is no round trip."""
    c, W, tuning = made(r=8, ats=("layers.1.q", "layers.2.q"))
    mlx.write_adapter(tmp_path, c, W, tuning)
    file, config = tmp_path / mlx.WEIGHTS, tmp_path / mlx.CONFIG
    tensors, said = load_file(file), read_json(config)
    assert said["num_layers"] == 2
    assert (
        tensors["model.layers.1.self_attn.q_proj.lora_a"].tobytes() == W["layers.1.q.A"].T.tobytes()
    )
    assert said["lora_parameters"] == {
        "rank": 8,
        "scale": 1.5,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj"],
    }
    wrong = [transposed(tensors), permuted(tensors), swapped(tensors, "layers.1", "layers.2")]
    for other in wrong:
        save_file(other, file)
        assert not same(mlx.read_adapter(tmp_path, c), (W, tuning))
    save_file(tensors, file)
    assert same(mlx.read_adapter(tmp_path, c), (W, tuning))
    parameters = said["lora_parameters"] | {"scale": 1.5 * 8}
    config.write_text(json.dumps(said | {"lora_parameters": parameters}))
    assert not same(mlx.read_adapter(tmp_path, c), (W, tuning))
    config.write_text(json.dumps(said | {"num_layers": 1}))
    with pytest.raises(FormatError, match=r"tensors: found model\.layers\.1.*these 2 only"):
        mlx.read_adapter(tmp_path, c)


def test_a_wrong_kohya_file_is_noticed(tmp_path):
    c, W, tuning = made(r=8, ats=("layers.1.q", "layers.2.q"))
    file = tmp_path / "a.safetensors"
    kohya.write_adapter(file, c, W, tuning)
    tensors = load_file(file)
    assert tensors["lycoris_model_layers_1_self_attn_q_proj.alpha"] == 12
    down = "lycoris_model_layers_1_self_attn_q_proj.lora_down.weight"
    assert tensors[down].tobytes() == W["layers.1.q.A"].tobytes()
    alphas = {k: np.asarray(v / 8) if k.endswith("alpha") else v for k, v in tensors.items()}
    for other in (
        transposed(tensors),
        permuted(tensors),
        swapped(tensors, "layers_1", "layers_2"),
        alphas,
    ):
        save_file(other, file)
        assert not same(kohya.read_adapter(file, c), (W, tuning))
    save_file(tensors, file)
    assert same(kohya.read_adapter(file, c), (W, tuning))


# MLX: what it names, and what it cannot say.


@pytest.mark.parametrize(
    ("kind", "num_layers", "keys", "hit"),
    [
        ("llama", 1, ["self_attn.q_proj"], ["layers.2.q"]),
        ("llama", 9, ["self_attn.q_proj", "no.such"], ["layers.0.q", "layers.1.q", "layers.2.q"]),
        ("llama", 0, ["mlp.up_proj"], ["layers.0.up", "layers.1.up", "layers.2.up"]),
        ("llama", -1, ["mlp.up_proj"], ["layers.0.up", "layers.1.up", "layers.2.up"]),
        ("llama", 1, None, [f"layers.2.{at}" for at in ("q", "k", "v", "o", "gate", "up", "down")]),
        ("llama", 1, ["model.layers.0.mlp.up_proj", "lm_head"], ["layers.0.up", "head"]),
        ("llama", 1, ["model.embed_tokens", "mlp.up_proj"], ["embed", "layers.2.up"]),
        ("gpt2", 1, ["attn.c_attn", "model.wpe"], ["positions", "layers.1.qkv"]),
    ],
)
def test_keys_name_modules_as_mlx_resolves_them(kind, num_layers, keys, hit, tmp_path):
    c = MODELS[kind]
    said = {
        "num_layers": num_layers,
        "lora_parameters": {"rank": 1, "scale": 2, "dropout": 0, "keys": keys},
    }
    (tmp_path / mlx.CONFIG).write_text(json.dumps(said))
    found = mlx.read_settings(tmp_path, c)
    assert sorted(found.adapted) == sorted(hit)
    assert (found.kind, found.scale) == ("lora", 2.0)


MLX_REFUSALS = [
    ({"fine_tune_type": "ia3"}, {}, "fine_tune_type: found ia3, expected lora, dora, full"),
    ({"use_dora": True}, {}, "use_dora: found true, expected false or null"),
    ({"lora_layers": 4}, {}, "lora_layers: found 4, expected no setting of this name"),
    ({"num_layers": None}, {}, "num_layers: found null, expected a whole number"),
    ({"num_layers": 2.0}, {}, r"num_layers: found 2\.0"),
    ({"lora_parameters": None}, {}, "lora_parameters: found None, expected an object"),
    ({}, {"alpha": 16}, "alpha: found 16, expected no setting of this name; it may change"),
    ({}, {"use_rslora": True}, "use_rslora: found true, expected no setting"),
    ({}, {"rank": 0}, "rank: found 0, expected a whole number from 1"),
    ({}, {"scale": None}, "scale: found null, expected a number; mlx-lm takes no default"),
    ({}, {"scale": "2"}, 'scale: found "2"'),
    ({}, {"dropout": 1}, "dropout: found 1, expected a number from 0 and below 1"),
    ({}, {"keys": "self_attn.q_proj"}, "keys: found .*expected a list of names"),
    ({}, {"keys": ["self_attn"]}, "keys: found self_attn, expected what can be adapted"),
    ({}, {"keys": ["input_layernorm"]}, r"keys: found model\.layers\.2\.input_layernorm, expected"),
    ({}, {"keys": ["nothing"]}, "keys: found .'nothing'."),
    (
        {},
        {"keys": ["self_attn.q_proj", "model.layers.2.self_attn.q_proj"]},
        "found model.layers.2.self_attn.q_proj and self_attn.q_proj, expected one of them",
    ),
    (
        {"fine_tune_type": "dora"},
        {"keys": ["model.embed_tokens"]},
        "DoRA: found it of embed, expected it of projections only; MLX rescales each token's",
    ),
]


@pytest.mark.parametrize(("change", "of_lora", "says"), MLX_REFUSALS)
def test_what_would_change_mlxs_function_is_refused(change, of_lora, says, tmp_path):
    c, W, tuning = made(ats=("layers.2.q",))
    mlx.write_adapter(tmp_path, c, W, tuning)
    said = read_json(tmp_path / mlx.CONFIG)
    said["lora_parameters"] |= of_lora
    (tmp_path / mlx.CONFIG).write_text(json.dumps(said | change))
    with pytest.raises(FormatError, match=says):
        mlx.read_adapter(tmp_path, c)


def test_settings_of_a_training_run_pass(tmp_path):
    c, W, tuning = made(ats=("layers.2.q",))
    mlx.write_adapter(tmp_path, c, W, tuning)
    said = read_json(tmp_path / mlx.CONFIG) | dict.fromkeys(mlx.INERT.split(), 1)
    (tmp_path / mlx.CONFIG).write_text(json.dumps(said))
    assert same(mlx.read_adapter(tmp_path, c), (W, tuning))
    assert not {*mlx.FIXED, "fine_tune_type", "num_layers"} & {*mlx.INERT.split()}


def refused(write, says):
    with pytest.raises(FormatError, match=says):
        write()


def test_what_mlx_cannot_say_is_refused_by_name(tmp_path):
    path, ats = tmp_path / "a", ("layers.0.q", "layers.1.q")
    c, W, tuning = made(ats=ats)

    def says(text, c=c, W=W, tuning=tuning, **more):
        refused(lambda: mlx.write_adapter(path, c, W, tuning, **more), text)
        assert not path.exists()

    ranks = adapters(c, {"layers.0.q": 2, "layers.1.q": 3}, dict.fromkeys(ats, 1.5))
    says("rank: found 2 of them: 2, 3, expected one for all adapters", c, *ranks)
    two = {"layers.0.q": 1.5, "layers.1.q": 3.0}
    says(r"scale: found 2 of them: 1\.5, 3\.0", tuning=replace(tuning, scale=two))
    third = replace(tuning, scale=dict.fromkeys(ats, np.longdouble(1) / 3))
    says("scale: found .*0.333.*expected a float64", tuning=third)
    D, dora = adapters(c, {"layers.0.q": 2}, {"layers.0.q": 1.5}, variant=DORA)
    mixed = TrainableSpec(tuning.scale, {}, frozenset(W | D), dora.variant)
    says("variant: found 2 of them, expected one", c, W | D, mixed)
    full = adapters(c, {"layers.0.q": 2}, {"layers.0.q": 1.5}, variant=DORA_FULL)
    says("variant of layers.0.q: found dora-full, expected lora or dora", c, *full)
    says("found vera, expected lora or dora", tuning=replace(tuning, variant={"layers.0.q": VERA}))
    beside = replace(tuning, trained=tuning.trained | {"norm.weight"})
    says("trained: found norm.weight", tuning=beside)
    frozen = replace(tuning, trained=tuning.trained - {"layers.0.q.A"})
    says("trained: found layers.0.q.A frozen", tuning=frozen)
    says(
        "dtype float64, expected float32, float16 or bfloat16; MLX reads",
        W={k: v.astype(float) for k, v in W.items()},
    )
    says(
        "adapters: found layers.1.q, expected a scale for each",
        tuning=replace(tuning, scale={"layers.0.q": 1.5}),
    )
    says(r"layers.0.q.A: found shape \(2, 3\)", W=W | {"layers.0.q.A": np.ones((2, 3), F32)})
    says("layers.0.q.B: found none", W={k: v for k, v in W.items() if k != "layers.0.q.B"})
    says("parameters: found layers.0.q.E", W=W | {"layers.0.q.E": np.ones((2, 1), F32)})
    odd = adapters(MODELS["llama"], {"layers.2.q": 2}, {"layers.2.q": 1.5})
    says("found no module layers.2.q", MODELS["tied"], *odd)
    says("trained: found nothing, expected adapters, or weights", W={}, tuning=TrainableSpec())
    says("norm.weight: found none", W={}, tuning=TrainableSpec(trained=frozenset({"norm.weight"})))
    bert = adapters(MODELS["bert"], {"layers.0.q": 2}, {"layers.0.q": 1.5})
    says(
        "architecture: found bert, expected one of gemma3_text, gpt2, llama", MODELS["bert"], *bert
    )


def test_in_mlx_a_tied_embedding_and_its_head_have_one_adapter(tmp_path):
    c = MODELS["tied"]
    both = {"embed": 2, "head": 2}
    W, tuning = adapters(c, both, dict.fromkeys(both, 1.5))
    for name, (V, told) in {
        "another change": (W, tuning),
        "no twin at the head": adapters(c, {"embed": 2}, {"embed": 1.5}),
        "expected embed's twin": adapters(c, {"head": 2}, {"head": 1.5}),
    }.items():
        refused(lambda V=V, told=told: mlx.write_adapter(tmp_path / "a", c, V, told), name)
    W, tuning = twinned(c, W, tuning)
    other = replace(tuning, scale=tuning.scale | {"head": 3.0})
    refused(lambda: mlx.write_adapter(tmp_path / "a", c, W, other), "another change")
    mlx.write_adapter(tmp_path / "a", c, W, tuning)
    assert set(load_file(tmp_path / "a" / mlx.WEIGHTS)) == {
        f"model.embed_tokens.lora_{x}" for x in "ab"
    }
    assert same(mlx.read_adapter(tmp_path / "a", c), (W, tuning))


def test_dora_of_an_embedding_is_another_function_in_mlx(tmp_path):
    c = MODELS["llama"]
    W, tuning = adapters(c, {"embed": 2}, {"embed": 1.5}, variant=DORA)
    refused(lambda: mlx.write_adapter(tmp_path / "a", c, W, tuning), "DoRA: found it of embed")
    assert not (tmp_path / "a").exists()


def test_full_fine_tuning_comes_back_bit_for_bit(tmp_path):
    for kind in ("llama", "gpt2"):
        c = MODELS[kind]
        rng = np.random.default_rng(0)
        base = {k: v.astype(F32) for k, v in draw_weights(c, rng).items()}
        names = frozenset({"layers.1.o.weight", "layers.1.norm1.weight", "norm.weight"})
        names |= {"layers.1.o.bias"} & base.keys()
        path = tmp_path / kind
        mlx.write_adapter(path, c, base, TrainableSpec(trained=names))
        W, tuning = mlx.read_adapter(path, c)
        assert same((W, tuning), ({k: base[k] for k in names}, TrainableSpec(trained=names)))
        there = "model.layers.1.self_attn.o_proj" if kind == "llama" else "model.h.1.attn.c_proj"
        tensors = load_file(path / mlx.WEIGHTS)
        assert tensors[f"{there}.weight"].tobytes() == W["layers.1.o.weight"].tobytes()
        save_file(tensors | {"model.extra": np.ones(2, F32)}, path / mlx.WEIGHTS)
        refused(lambda path=path, c=c: mlx.read_adapter(path, c), "found model.extra, expected")


def test_mlxs_tensors_are_all_there_and_of_their_shape(tmp_path):
    c, W, tuning = made(ats=("layers.2.q",), variant=DORA)
    mlx.write_adapter(tmp_path, c, W, tuning)
    tensors = load_file(tmp_path / mlx.WEIGHTS)
    at = "model.layers.2.self_attn.q_proj"
    assert tensors[f"{at}.m"].shape == (16,)
    for change, says in (
        ({f"{at}.m": np.ones((16, 1), F32)}, r"m: found shape \(16, 1\), expected shape \(16,\)"),
        ({f"{at}.m": None}, rf"tensors: found none named {at}\.m"),
        ({f"{at}.lora_a": None}, rf"tensors: found none named {at}\.lora_a"),
        (
            {f"{at}.lora_a": np.ones((2, 8), F32)},
            r"lora_a: found shape \(2, 8\), expected shape \(8, 2\)",
        ),
        ({f"{at}.alpha": np.ones(1, F32)}, r"found .*q_proj\.alpha, expected these 3 only"),
    ):
        left = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file(left, tmp_path / mlx.WEIGHTS)
        refused(lambda: mlx.read_adapter(tmp_path, c), says)


def test_an_adapter_of_pefts_is_not_made_unreadable(tmp_path):
    c, W, tuning = made(ats=("layers.2.q",))
    peft.write_adapter(tmp_path, c, W, tuning, config_from_factors(tmp_path, c, W, tuning))
    refused(lambda: mlx.write_adapter(tmp_path, c, W, tuning), "found adapter_model.safetensors")
    assert same(peft.read_adapter(tmp_path, c), (W, tuning))


# kohya: names, alphas, parts.


def test_names_with_underscores_are_resolved_by_the_models_modules(tmp_path, monkeypatch):
    c, W, tuning = made(ats=("layers.2.q",))
    assert kohya.underscored({"one": "a.b_c", "two": "a_b.c", "three": "a.c"}) == {
        "a_b_c": ["one", "two"],
        "a_c": ["three"],
    }
    for c_ in MODELS.values():
        assert all(len(found) == 1 for found in kohya.underscored(module_paths(c_)).values())
    file = tmp_path / "a.safetensors"
    kohya.write_adapter(file, c, W, tuning)
    paths = module_paths(c) | {"layers.1.q": "model.layers_2.self_attn.q_proj"}
    monkeypatch.setattr(kohya, "_names", lambda c: kohya.underscored(paths))
    says = "found a name of layers.1.q and layers.2.q, expected the name of one"
    refused(lambda: kohya.read_adapter(file, c), says)
    refused(lambda: kohya.write_adapter(file, c, W, tuning), says)


def test_an_alpha_absent_or_0_is_the_rank(tmp_path):
    c, W, tuning = made(r=4, ats=("layers.2.q",))
    file = tmp_path / "a.safetensors"
    kohya.write_adapter(file, c, W, tuning)
    tensors = load_file(file)
    key = next(k for k in tensors if k.endswith("alpha"))
    for alpha, s in (
        (np.zeros((), F32), 1),
        (np.asarray(2, np.int64), 0.5),
        (np.ones(1, ml_dtypes.bfloat16), 0.25),
        (np.asarray(0.1, np.float16), float(np.float16(0.1)) / 4),
        (None, 1),
    ):
        save_file({k: v for k, v in (tensors | {key: alpha}).items() if v is not None}, file)
        assert kohya.read_adapter(file, c)[1].scale == {"layers.2.q": s}
    save_file(tensors | {key: np.ones(2, F32)}, file)
    refused(lambda: kohya.read_adapter(file, c), r"alpha: found shape \(2,\), expected one number")


NAME = "lycoris_model_layers_2_self_attn_q_proj"


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        (f"{NAME}.lora_mid.weight", (4, 4), "found the part 'lora_mid.weight', .*Tucker's decomp"),
        (f"{NAME}.hada_w1_a", (16, 4), "found the part 'hada_w1_a', expected one of lora_down"),
        (f"{NAME}.diff_b", (16,), "found the part 'diff_b'"),
        (f"{NAME}.lora_A.weight", (4, 8), "found the part 'lora_A.weight'"),
        (
            f"{NAME}.dora_scale",
            (1, 8),
            r"found shape \(1, 8\), expected shape \(16, 1\); LyCORIS.*wd_on",
        ),
        (f"{NAME}.dora_scale", (16,), r"dora_scale: found shape \(16,\), expected shape \(16, 1\)"),
        (
            f"{NAME}.lora_down.weight",
            (3, 8),
            r"lora_up.weight: found shape \(16, 4\), expected shape \(16, 3\)",
        ),
        (
            f"{NAME}.lora_down.weight",
            (4, 8, 1, 1),
            r"found shape \(4, 8, 1, 1\), expected shape \(4, 8\)",
        ),
        (f"{NAME}.lora_down.weight", None, "tensors: found none named .*lora_down.weight"),
        ("lycoris_model_layers_7_self_attn_q_proj.alpha", (), "found no module's name, expected"),
        ("lora_te_model_layers_2_self_attn_q_proj.alpha", (), "found no prefix lycoris, expected"),
        ("lycoris_model_norm.alpha", (), "found an adapter of norm, expected a projection's"),
        ("lycoris_model_embed_tokens.lora_up.weight", (8, 4), "found an adapter of embed, exp"),
    ],
)
def test_what_kohyas_layout_says_otherwise_is_refused_by_name(key, shape, says, tmp_path):
    c, W, tuning = made(r=4, ats=("layers.2.q",))
    file = tmp_path / "a.safetensors"
    kohya.write_adapter(file, c, W, tuning)
    tensors = load_file(file)
    tensors.pop(key, None)
    save_file(tensors | ({} if shape is None else {key: np.ones(shape, F32)}), file)
    refused(lambda: kohya.read_adapter(file, c), says)


def test_what_kohyas_layout_cannot_say_is_refused_by_name(tmp_path):
    file = tmp_path / "a.safetensors"
    for s, r in ((math.sqrt(2), 2), (0.1, 3), (0.0, 2), (1e300, 2)):
        c, W, tuning = made(r=r, s=s, ats=("layers.2.q",))
        says = rf"scale of layers\.2\.q: found .*expected not 0, and alpha / {r} of a float32 alpha"
        refused(lambda c=c, W=W, tuning=tuning: kohya.write_adapter(file, c, W, tuning), says)
    c, W, tuning = made(ats=("embed",))
    refused(lambda: kohya.write_adapter(file, c, W, tuning), "found an adapter of embed, expected")
    c, W, tuning = made(ats=("layers.2.q",), variant=DORA)
    refused(
        lambda: kohya.write_adapter(file, c, W, tuning), "found dora, expected lora or dora-full"
    )
    assert not file.exists()
    save_file({}, file)
    refused(lambda: kohya.read_adapter(file, c), "tensors: found none, expected an adapter's")


def test_a_convolutions_factors_are_matrices_over_patches():
    rng = np.random.default_rng(0)
    down, up = rng.standard_normal((2, 3, 5, 4)), rng.standard_normal((7, 2, 1, 1))
    A, B = kohya.matrices(down, up)
    assert A.shape == (2, 60)
    assert B.shape == (7, 2)
    again = kohya.kernels(A, B, (3, 5, 4)[1:])
    assert again[0].tobytes() == down.tobytes()
    assert again[1].shape == up.shape
    with pytest.raises(ValueError, match=r"up \(7, 3, 1, 1\) beside down \(2, 3, 5, 4\)"):
        kohya.matrices(down, np.ones((7, 3, 1, 1)))


# The choice that a scale and a rank say.


@given(st.integers(1, 300), st.floats(-1e6, 1e6), st.booleans())
def test_every_scale_that_an_alpha_gives_has_an_alpha(r, alpha, rslora):
    s = scale(alpha, r, rslora)
    found = alpha_of(s, r, rslora)
    assert found is not None
    assert scale(found, r, rslora) == s


def test_a_scale_that_no_alpha_gives_has_none(tmp_path):
    s = 1.9
    while alpha_of(s, 3) is not None or alpha_of(s, 3, rslora=True) is not None:
        s = float(np.nextafter(s, 2))
    # By search over all floats that could be: α = s r (1 + δ), |δ| ≤ 4 u.
    alpha = s * 3 * (1 - 2**-51)
    while alpha < s * 3 * (1 + 2**-51):
        assert alpha / 3 != s
        alpha = float(np.nextafter(alpha, np.inf))
    ranks, scales = {"layers.0.q": 1, "layers.1.q": 3}, {"layers.0.q": 1.5, "layers.1.q": s}
    made_ = adapters(MODELS["llama"], ranks, scales)
    says = r"scale: found .* of layers\.1\.q at rank 3, expected alpha / r of a float64 alpha"
    refused(lambda: config_from_factors(tmp_path, MODELS["llama"], *made_), says)
    assert alpha_of(np.longdouble(1) / 3, 1) is None
    assert alpha_of(F32(0.1), 1) == float(F32(0.1)) != 0.1


def test_a_choice_has_one_variant(tmp_path):
    c = MODELS["llama"]
    for variant, name in ((LORA, "lora"), (DORA, "dora"), (DORA_FULL, "dora-full")):
        W, tuning = adapters(c, {"layers.0.q": 2}, {"layers.0.q": 1.5}, variant=variant)
        found = config_from_factors(tmp_path, c, W, tuning, dropout=0.25)
        assert (found.variant, found.r, found.lora_alpha, found.lora_dropout) == (name, 2, 3, 0.25)
    V, other = adapters(c, {"layers.1.q": 2}, {"layers.1.q": 1.5})
    both = TrainableSpec(tuning.scale | other.scale, {}, frozenset(W | V), tuning.variant)
    says = "variant: found dora-full, lora, expected one for all"
    refused(lambda: config_from_factors(tmp_path, c, W | V, both), says)
    with pytest.raises(FormatError, match="no adapter, expected a scale"):
        check_factors("a", c, {}, TrainableSpec(), (LORA,))


# loralib: state dicts.


def test_a_merged_linears_parts_lie_on_their_own_rows():
    """By the definition: the change of an enabled part is its own B A, that of another 0."""
    rng = np.random.default_rng(0)
    for enabled in ((True, False, True), (True, True, True), (False, True), (True,)):
        k, m = sum(enabled), 4 * len(enabled)
        A, B = rng.integers(-3, 4, (2 * k, 5)), rng.integers(-3, 4, (4 * k, 2))
        A1, B1 = loralib.merged_linear_factors(A, B, m, enabled)
        change = (B1 @ A1).reshape(len(enabled), 4, 5)
        parts = iter(range(k))
        for part, on in zip(change, enabled, strict=True):
            i = next(parts) if on else None
            wanted = B[4 * i : 4 * i + 4] @ A[2 * i : 2 * i + 2] if on else 0 * part
            assert (part == wanted).all()
        with pytest.raises(ValueError, match="parts"):
            loralib.merged_linear_factors(A, B, m, (*enabled, True))
    with pytest.raises(ValueError, match="0 of them enabled"):
        loralib.merged_linear_factors(A, B, m, (False,))


def test_a_convolutions_product_is_reshaped():
    rng = np.random.default_rng(0)
    for k, groups in ((3, 1), (2, 2), (4, 2), (3, 3)):
        c, m, r = 6, 12, 2
        A, B = rng.integers(-3, 4, (r * k, c * k)), rng.integers(-3, 4, (m // groups * k, r * k))
        A1, B1 = loralib.conv_factors(A, B, k, groups)
        assert A1.shape == (r * k * k // groups, c // groups * k * k)
        assert ((B1 @ A1).ravel() == (B @ A).ravel()).all()
    with pytest.raises(ValueError, match="kernel 3, groups 2: expected a multiple"):
        loralib.conv_factors(A, B, 3, 2)
    with pytest.raises(ValueError, match="expected a multiple of 5 rows"):
        loralib.conv_factors(A, B, 5, 1)


def state_dict(kind="gpt2"):
    """A state dict of each kind of layer that loralib has, of whole numbers."""
    rng = np.random.default_rng(3)

    def draw(*shape):
        return rng.integers(-3, 4, shape).astype(F32)

    return {
        "transformer.h.0.attn.c_attn.lora_A": draw(4, 8),
        "transformer.h.0.attn.c_attn.lora_B": draw(16, 2),
        "transformer.h.1.mlp.c_fc.lora_A": draw(3, 8),
        "transformer.h.1.mlp.c_fc.lora_B": draw(32, 3),
        "transformer.wte.lora_A": draw(2, 13),
        "transformer.wte.lora_B": draw(8, 2),
        "transformer.h.0.attn.c_attn.bias": draw(24),
    }


ENABLED = (True, False, True)


def test_a_state_dict_is_read_with_what_is_not_in_it(tmp_path):
    c, found = MODELS["gpt2"], state_dict()
    read = loralib.read_adapter(found, c, alpha=6, enabled=ENABLED)
    save_file(found, tmp_path / "a.safetensors")
    assert same(loralib.read_adapter(tmp_path / "a.safetensors", c, alpha=6, enabled=ENABLED), read)
    W, tuning = read
    assert tuning.scale == {"layers.0.qkv": 3.0, "layers.1.up": 2.0, "embed": 3.0}
    assert tuning.trained == W.keys()
    assert W["layers.0.qkv.bias"].shape == (24, 1)
    assert (W["layers.0.qkv.B"][8:16] == 0).all()
    assert W["layers.0.qkv.B"][:8].any()
    assert check_factors(
        "a",
        c,
        {k: v for k, v in W.items() if "bias" not in k},
        replace(tuning, trained=tuning.trained - {"layers.0.qkv.bias"}),
        (LORA,),
    )
    # Another alpha, or other parts, is another function: nothing in the file tells.
    assert loralib.read_adapter(found, c, alpha=3, enabled=ENABLED)[1] != tuning
    other = loralib.read_adapter(found, c, alpha=6, enabled=(True, True, False))
    assert not same(other, read)


def test_a_state_dict_that_says_too_little_or_too_much_is_refused(tmp_path):
    c, found = MODELS["gpt2"], state_dict()
    qkv = "transformer.h.0.attn.c_attn.lora_"
    told = {"alpha": 6, "enabled": ENABLED}

    def says(text, change=None, source=None, **more):
        given = {k: v for k, v in (found | (change or {})).items() if v is not None}
        refused(lambda: loralib.read_adapter(source or given, c, **(told | more)), text)

    says("alpha: found none, expected a number", alpha=None)
    says(
        r"c_attn.lora_A: found shapes .*expected all parts of the weight; give enabled",
        enabled=None,
    )
    says(r"c_attn.lora_A: found shapes .*2 parts, 1 of them enabled", enabled=(True, False))
    says("lora_A: found none, expected both factors", {f"{qkv}A": None})
    says(r"lora_B: found shape \(16,\), expected both", {f"{qkv}B": np.ones(16, F32)})
    says(r"9 columns", {f"{qkv}A": np.ones((4, 9), F32)})
    says("found transformer.h.9.x.lora_A, expected", {"transformer.h.9.x.lora_A": np.ones(2, F32)})
    says("found extra.bias, expected these", {"extra.bias": np.ones(2, F32)})
    says("tensors: found none, expected <path>.lora_A", dict.fromkeys(found))
    says("found 1 entries that are not finite", {f"{qkv}B": np.full((1, 1), np.nan)})
    says("found list, expected a NumPy array", {f"{qkv}A": [1.0]})
    for start in (b"PK\x03\x04", b"\x80\x02"):
        (tmp_path / "a.pt").write_bytes(start + b"more")
        says("found a pickle, expected a safetensors file, or arrays", source=tmp_path / "a.pt")
    says("a whole safetensors file", source=tmp_path / "none")
    weight = {"transformer.h.0.ln_1.weight": np.ones(8, F32)}
    says(
        "found transformer.h.0.ln_1.weight, expected factors and biases only; saved in eval", weight
    )
    says("base: found no layers.0.norm1.weight", weight, base={"layers.0.qkv.bias": np.ones(1)})


def test_a_state_dict_saved_in_eval_mode_is_known_by_the_base_only():
    c, found = MODELS["gpt2"], state_dict()
    rng = np.random.default_rng(0)
    base = {k: rng.integers(-3, 4, v.shape).astype(F32) for k, v in draw_weights(c, rng).items()}
    read = loralib.read_adapter(found, c, alpha=6, enabled=ENABLED)
    whole = {  # as PyTorch would save all of it, in train mode
        place: base[name].T if lies else base[name] if base[name].shape[1] > 1 else base[name][:, 0]
        for name, (place, lies) in loralib.tensor_names(c).items()
    }
    head = {"lm_head.weight": whole["transformer.wte.weight"]}
    buffer = {"transformer.h.0.attn.bias": np.ones((1, 1, 9, 9), np.uint8)}
    given = whole | head | buffer | found
    told = {"alpha": 6, "enabled": ENABLED, "base": base}
    assert same(loralib.read_adapter(given, c, **told), read)
    norm = {"transformer.h.0.ln_1.weight": np.full(8, 5, F32)}
    trained = loralib.read_adapter(given | norm, c, **told)
    assert trained[1].trained == read[1].trained | {"layers.0.norm1.weight"}
    refused(
        lambda: loralib.read_adapter(
            given | {"lm_head.weight": whole["transformer.wte.weight"] + 1}, c, **told
        ),
        "found other entries than the embedding's",
    )
    factors = {k: v for k, v in read[0].items() if "bias" not in k}
    merged = merge(base | factors, read[1])
    change = {"transformer.h.1.mlp.c_fc.weight": merged["layers.1.up.weight"].T}
    says = r"c_fc\.weight: found other weights than the base's, near the merged ones, expected W"
    refused(lambda: loralib.read_adapter(given | change, c, **told), says)
    other = {"transformer.h.1.mlp.c_fc.weight": whole["transformer.h.1.mlp.c_fc.weight"] + 1}
    refused(lambda: loralib.read_adapter(given | other, c, **told), "than the base's, expected W")


# Seen by the libraries. With small whole numbers nothing is rounded, and == decides.


def whole_numbers(c, seed=5):
    """A base's weights, small whole numbers in float32."""
    rng = np.random.default_rng(seed)
    return {k: rng.integers(-3, 4, shape).astype(F32) for k, shape in c.shapes().items()}


@pytest.fixture(scope="module")
def mlx_lm():
    """mlx-lm's models and its loader, on the CPU."""
    core = optional("mlx.core")
    optional("mlx_lm")
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_lm.models import gpt2, llama, qwen2
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

    core.set_default_device(core.cpu)

    def model(c, W):
        """mlx-lm's model with these weights."""
        if isinstance(c, GPT2):
            sizes = {"n_embd": c.d, "n_head": c.heads, "n_layer": c.layers, "vocab_size": c.vocab}
            sizes |= {"n_ctx": c.positions, "n_positions": c.positions, "layer_norm_epsilon": c.eps}
            made = gpt2.Model(gpt2.ModelArgs(model_type="gpt2", **sizes))
        else:
            library = qwen2 if c.qkv_bias else llama
            made = library.Model(
                library.ModelArgs(
                    model_type="qwen2" if c.qkv_bias else "llama",
                    hidden_size=c.d,
                    num_hidden_layers=c.layers,
                    intermediate_size=c.ffn,
                    num_attention_heads=c.heads,
                    num_key_value_heads=c.kv_heads,
                    rms_norm_eps=c.eps,
                    vocab_size=c.vocab,
                    tie_word_embeddings=c.tied,
                    rope_theta=c.theta,
                    **({} if c.qkv_bias else {"head_dim": c.head_dim}),
                )
            )
        there = mlx.paths("", c)
        arrays = {}
        for name, array in W.items():
            at, _, part = name.rpartition(".")
            flat = array[:, 0] if array.shape[1] == 1 else array
            arrays[f"{there[at]}.{part}"] = core.array(np.ascontiguousarray(flat))
        own = dict(tree_flatten(made.parameters()))
        assert own.keys() == arrays.keys()
        assert all(own[k].shape == arrays[k].shape for k in own)
        made.update(tree_unflatten(list(arrays.items())))
        return made

    def module(made, path):
        for part in path.split("."):
            made = made[int(part)] if part.isdigit() else getattr(made, part)
        return made

    return SimpleNamespace(
        core=core,
        model=model,
        module=module,
        load=load_adapters,
        adapt=linear_to_lora_layers,
        flat=lambda made: dict(tree_flatten(made)),
    )


MLX_MODELS = {
    "llama": MODELS["llama"],
    "qwen2": replace(MODELS["tied"], heads=4, kv_heads=2, head_dim=2, qkv_bias=True),
    "gpt2": MODELS["gpt2"],
}


def square_weight(c, W, at):
    """The weight of the module as a matrix, of a tied head the embedding's."""
    weight = W["embed.weight" if at == "head" and is_tied(c) else f"{at}.weight"]
    return weight.T if at in TABLES else weight


@pytest.mark.parametrize("kind", MLX_MODELS)
@pytest.mark.parametrize("layers", ["all", "last", "first"])
def test_mlx_computes_the_adapter_that_is_written(kind, layers, mlx_lm, tmp_path):
    c = MLX_MODELS[kind]
    number = {"all": "", "last": f"{c.layers - 1}.", "first": "0."}[layers]
    ats = [at for at in c.linears() if at.startswith(f"layers.{number}")]
    ats += [at for at in ("embed", "head", "positions") if layers != "last" and at in c.matrices()]
    W, tuning = adapters(c, dict.fromkeys(ats, 2), dict.fromkeys(ats, 2.5), whole=True)
    W, tuning = twinned(c, W, tuning)
    mlx.write_adapter(tmp_path, c, W, tuning)
    base = whole_numbers(c)
    model = mlx_lm.load(mlx_lm.model(c, base), tmp_path)
    adapted = {k.removesuffix(".lora_a") for k in mlx_lm.flat(model.parameters()) if "lora_a" in k}
    there = mlx.paths("", c)
    assert adapted == {there[at] for at in ats if at in there}
    merged = merge(base | W, tuning)
    for at in ats:
        module = mlx_lm.module(model, there["embed" if at not in there else at])
        matrix = square_weight(c, merged, at)
        fused = np.array(module.fuse().weight)
        assert (fused == (matrix.T if at in TABLES else matrix)).all()
        assert (fused != base.get(f"{at}.weight", base["embed.weight"])).any()
        if at in TABLES:
            ids = np.array([1, 4, 1])
            assert (matrix[:, ids] == np.array(module(mlx_lm.core.array(ids))).T).all()
            continue
        x = np.random.default_rng(1).integers(-3, 4, (matrix.shape[1], 5)).astype(F32)
        s, b = tuning.scale[at], base.get(f"{at}.bias")
        y, _ = lora_linear(x, square_weight(c, base, at), b, W[f"{at}.A"], W[f"{at}.B"], s)
        of_mlx = module if at in there else module.as_linear
        assert (y == np.array(of_mlx(mlx_lm.core.array(x.T.copy()))).T).all()


def test_mlx_computes_the_dora_that_is_written(mlx_lm, tmp_path):
    """With bounds for MLX's own rounding in float32.

    V has an error of (r + 3) u |V|, |V| = |W| + |s| |B| |A|, its norm's error is the norm of that
    and (n / 2 + 1) u more, and the quotient and the product add 2 u: of an entry, whose modulus is
    m at most, at most m (2 (r + 3) κ + n + 3) u, κ = ‖|V|‖ / ‖V‖.
    """
    c = MODELS["llama"]
    ats = ("layers.1.q", "layers.2.q", "layers.1.down", "layers.2.down")
    W, tuning = adapters(c, dict.fromkeys(ats, 2), dict.fromkeys(ats, 0.75), variant=DORA)
    mlx.write_adapter(tmp_path, c, W, tuning)
    base = {k: v.astype(F32) for k, v in draw_weights(c, np.random.default_rng(0), 0.5).items()}
    model = mlx_lm.load(mlx_lm.model(c, base), tmp_path)
    wide = {k: v.astype(float) for k, v in (base | W).items()}
    merged = merge(wide, tuning)
    for at in ats:
        w, A, B = (wide[f"{at}.{x}"] for x in ("weight", "A", "B"))
        around = abs(w) + 0.75 * abs(B) @ abs(A)
        kappa = np.linalg.norm(around, axis=1) / np.linalg.norm(w + 0.75 * B @ A, axis=1)
        m = abs(wide[f"{at}.magnitude"][:, 0])
        bound = m * (2 * (2 + 3) * kappa + w.shape[1] + 3) * np.finfo(F32).eps / 2
        fused = np.array(mlx_lm.module(model, mlx.paths("", c)[at]).fuse().weight)
        off = abs(fused - merged[f"{at}.weight"])
        record_worst("MLX's DoRA, parts of the bound", (off / bound[:, None]).max())
        assert (off <= bound[:, None]).all()
        plain = w + 0.75 * B @ A
        assert not (abs(fused - plain) <= bound[:, None]).all()


TWICE = ["model.layers.0.mlp.up_proj", "mlp.up_proj"]
"""Which names the first layer's projection twice, if the layers reach down to it."""

REFUSED_KEYS = [["self_attn"], ["input_layernorm"], ["model.norm"], [""]]


@pytest.mark.parametrize("num_layers", [0, -1, 1, 2, 7])
@pytest.mark.parametrize(
    "keys",
    [
        None,
        ["self_attn.q_proj", "nothing"],
        TWICE,
        ["model.layers.1.mlp.up_proj", "lm_head", "model.embed_tokens"],
        *REFUSED_KEYS,
    ],
    ids=str,
)
def test_mlx_resolves_keys_so(num_layers, keys, mlx_lm, tmp_path):
    c = MODELS["llama"]
    parameters = {"rank": 1, "scale": 2.0, "dropout": 0.0, "keys": keys}
    said = {"num_layers": num_layers, "lora_parameters": parameters}
    (tmp_path / mlx.CONFIG).write_text(json.dumps(said))
    model = mlx_lm.model(c, whole_numbers(c))
    if keys in REFUSED_KEYS or (keys == TWICE and num_layers not in (1, 2)):
        refused(lambda: mlx.read_settings(tmp_path, c), "keys: found")
        with pytest.raises(ValueError, match="Can't convert layer"):
            mlx_lm.adapt(model, num_layers, parameters)
        return
    mlx_lm.adapt(model, num_layers, parameters)
    adapted = {k.removesuffix(".lora_a") for k in mlx_lm.flat(model.parameters()) if "lora_a" in k}
    there = mlx.paths("", c)
    assert {there[at] for at in mlx.read_settings(tmp_path, c).adapted} == adapted


def test_what_mlx_saves_is_read(mlx_lm, tmp_path):
    c = MODELS["llama"]
    base = whole_numbers(c)
    for kind, s in (("lora", 20.0), ("dora", 0.1)):
        model, folder = mlx_lm.model(c, base), tmp_path / kind
        folder.mkdir()
        parameters = {"rank": 3, "scale": s, "dropout": 0.1}
        model.freeze()
        mlx_lm.adapt(model, 2, parameters, use_dora=kind == "dora")
        trained = mlx_lm.flat(model.trainable_parameters())
        mlx_lm.core.save_safetensors(str(folder / mlx.WEIGHTS), trained)
        said = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "seed": 0}
        (folder / mlx.CONFIG).write_text(json.dumps(said))
        W, tuning = mlx.read_adapter(folder, c)
        ats = [at for at in c.linears() if at.startswith(("layers.1", "layers.2"))]
        assert tuning.scale == dict.fromkeys(ats, s)
        assert set(tuning.variant.values()) == ({DORA} if kind == "dora" else set())
        a = np.array(trained["model.layers.1.mlp.up_proj.lora_a"])
        assert W["layers.1.up.A"].tobytes() == a.T.tobytes()
        if kind == "dora":
            m = np.linalg.norm(base["layers.1.up.weight"], axis=1)
            # The squares are whole numbers, so that each norm is rounded once, here and there.
            assert relative_error(W["layers.1.up.magnitude"][:, 0], m) <= np.finfo(F32).eps


def test_mlx_takes_what_full_fine_tuning_trained(mlx_lm, tmp_path):
    c = MODELS["gpt2"]
    base, other = whole_numbers(c), whole_numbers(c, seed=6)
    names = frozenset({"layers.1.qkv.weight", "layers.1.norm1.bias", "norm.weight"})
    mlx.write_adapter(
        tmp_path, c, base | {k: other[k] for k in names}, TrainableSpec(trained=names)
    )
    model = mlx_lm.flat(mlx_lm.load(mlx_lm.model(c, base), tmp_path).parameters())
    wanted = mlx_lm.flat(mlx_lm.model(c, base | {k: other[k] for k in names}).parameters())
    assert all((np.array(model[k]) == np.array(wanted[k])).all() for k in model)


def test_mlx_reads_no_float64(mlx_lm, tmp_path):
    save_file({"a": np.ones((2, 2))}, tmp_path / "a.safetensors")
    with pytest.raises(RuntimeError, match="unsupported dtype F64"):
        mlx_lm.core.load(str(tmp_path / "a.safetensors"))


@pytest.fixture(scope="module")
def lycoris():
    """LyCORIS, and transformers' models with whole numbers as weights."""
    torch = optional("torch")
    transformers = optional("transformers")
    library = optional("lycoris")
    from lycoris.wrapper import LycorisNetwork
    from safetensors.torch import save_file as save

    transformers.utils.logging.disable_progress_bar()
    classes = {
        Llama: transformers.LlamaForCausalLM,
        Bert: transformers.BertForSequenceClassification,
        GPT2: transformers.GPT2LMHeadModel,
    }

    def model(c, folder, W):
        write_model(folder, c, W)
        return classes[type(c)].from_pretrained(folder, dtype="auto").eval()

    return SimpleNamespace(
        torch=torch, library=library, network=LycorisNetwork, model=model, save=save
    )


@pytest.mark.parametrize("kind", ["llama", "tied", "bert"])
def test_lycoris_computes_the_adapter_that_is_written(kind, lycoris, tmp_path):
    c = MODELS[kind]
    ats = [*c.linears(), *(["head"] if is_tied(c) else [])]
    ranks = {at: 1 + i % 3 for i, at in enumerate(ats)}
    scales = {at: 6 / r if i % 2 else 1.5 for i, (at, r) in enumerate(ranks.items())}
    W, tuning = adapters(c, ranks, scales, whole=True)
    file = tmp_path / "a.safetensors"
    kohya.write_adapter(file, c, W, tuning)
    base = whole_numbers(c)
    model = lycoris.model(c, tmp_path / "model", base)
    network, _ = lycoris.library.create_lycoris_from_weights(1.0, str(file), model)
    modules_ = {module.lora_name: module for module in network.loras}
    names = {at: name for name, found in kohya._names(c).items() for at in found}
    assert modules_.keys() == {f"lycoris_{names[at]}" for at in ats}
    merged = merge(base | W, tuning)
    for at in ats:
        module = modules_[f"lycoris_{names[at]}"]
        assert module.scale == tuning.scale[at]
        found = module.get_merged_weight()[0].detach().numpy()
        assert (found == merged[f"{at}.weight"]).all()
        x = np.random.default_rng(1).integers(-3, 4, (found.shape[1], 5)).astype(F32)
        y, _ = lora_linear(
            x,
            square_weight(c, base, at),
            base.get(f"{at}.bias"),
            W[f"{at}.A"],
            W[f"{at}.B"],
            tuning.scale[at],
        )
        module.apply_to()
        with lycoris.torch.no_grad():
            z = module.org_module[0](lycoris.torch.tensor(x.T.copy())).numpy().T
        assert (z == y).all()
    assert (found != base.get(f"{at}.weight", base["embed.weight"])).any()


@pytest.mark.parametrize("how", ["lora", "dora", "input"])
def test_what_lycoris_saves_is_read(how, lycoris, tmp_path):
    """DoRA with bounds as for MLX's, and LyCORIS adds float32's ε to the norm."""
    c, file = MODELS["llama"], tmp_path / "a.safetensors"
    torch = lycoris.torch
    base = {k: v.astype(F32) for k, v in draw_weights(c, np.random.default_rng(0), 0.5).items()}
    model = lycoris.model(c, tmp_path / "model", base)
    more = {"dora_wd": how in ("dora", "input"), "wd_on_output": how == "dora"}
    network = lycoris.library.create_lycoris(model, 1.0, 3, 2.0, algo="lora", **more)
    network.apply_to()
    torch.manual_seed(0)
    for p in network.parameters():
        p.data.copy_(torch.randn_like(p))
    lycoris.save({k: v.contiguous() for k, v in network.state_dict().items()}, file)
    if how == "input":
        refused(lambda: kohya.read_adapter(file, c), "dora_scale: found shape .*wd_on_output off")
        return
    W, tuning = kohya.read_adapter(file, c)
    assert tuning.scale == dict.fromkeys(c.linears(), 2 / 3)
    wide = {k: v.astype(float) for k, v in (base | W).items()}
    merged = merge(wide, tuning)
    modules_ = {module.lora_name: module for module in network.loras}
    for at in c.linears():
        module = modules_[f"lycoris_{module_paths(c)[at].replace('.', '_')}"]
        assert module.lora_down.weight.detach().numpy().tobytes() == W[f"{at}.A"].tobytes()
        w, A, B = (wide[f"{at}.{x}"] for x in ("weight", "A", "B"))
        around = abs(w) + 2 / 3 * abs(B) @ abs(A)
        u = np.finfo(F32).eps / 2
        bound = (3 + 3) * u * around  # of V's entries
        if how == "dora":
            assert tuning.variant[at] == DORA_FULL
            v = np.linalg.norm(w + 2 / 3 * B @ A, axis=1, keepdims=True)
            kappa = np.linalg.norm(around, axis=1, keepdims=True) / v
            m = abs(wide[f"{at}.magnitude"])
            bound = m * ((2 * (3 + 3) * kappa + w.shape[1] + 3) * u + np.finfo(F32).eps / v)
        off = abs(module.get_merged_weight()[0].detach().numpy() - merged[f"{at}.weight"])
        record_worst(f"LyCORIS's {how}, parts of the bound", (off / bound).max())
        assert (off <= bound).all()
        assert not (abs(w - merged[f"{at}.weight"]) <= bound).all()


def test_lycoris_keeps_rsloras_alpha_times_the_root_of_the_rank(lycoris, tmp_path):
    c, torch, name = MODELS["llama"], lycoris.torch, "lycoris_model_layers_0_self_attn_q_proj"
    module = lycoris.library.modules.locon.LoConModule(
        name, torch.nn.Linear(8, 16), 1.0, 3, 2.0, rs_lora=True
    )
    state = {f"{name}.{key}": value.detach() for key, value in module.custom_state_dict().items()}
    lycoris.save(state, tmp_path / "a.safetensors")
    s = kohya.read_adapter(tmp_path / "a.safetensors", c)[1].scale["layers.0.q"]
    # rsLoRA's scale as it was trained, and as it comes back: α√r was rounded to float32.
    assert module.scale == scale(2.0, 3, rslora=True)
    assert s == float(F32(2.0 * (3 / math.sqrt(3)))) / 3 != module.scale


def test_lycoris_convolution_is_a_matrix_over_patches(lycoris):
    torch, rng = lycoris.torch, np.random.default_rng(0)
    conv = torch.nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=1)
    W, b = (rng.integers(-3, 4, p.shape).astype(F32) for p in (conv.weight, conv.bias))
    down, up = (rng.integers(-3, 4, s).astype(F32) for s in ((2, 3, 2, 3), (4, 2, 1, 1)))
    with torch.no_grad():
        conv.weight.copy_(torch.tensor(W))
        conv.bias.copy_(torch.tensor(b))
    made_ = lycoris.library.modules.locon.LoConModule.make_module_from_state_dict(
        "one", conv, torch.tensor(up), torch.tensor(down), None, torch.tensor(3.0), None
    )
    x = rng.integers(-3, 4, (3, 2, 5, 6)).astype(F32)
    geometry = Geometry((2, 3), (1, 2), ((1, 1), (1, 1)), (1, 1))
    A, B = kohya.matrices(down, up)
    y, _ = adapted_conv(lora_linear, x, W, b[:, None], (A, B), 1.5, None, geometry)
    made_.apply_to()
    with torch.no_grad():
        z = conv(torch.tensor(x.transpose(1, 0, 2, 3).copy())).numpy().transpose(1, 0, 2, 3)
    assert (y == z).all()


@pytest.fixture(scope="module")
def lora_library():
    torch = optional("torch")
    transformers = optional("transformers")
    return SimpleNamespace(
        torch=torch,
        transformers=transformers,
        loralib=optional("loralib"),
    )


def test_what_loralib_saves_is_read(lora_library, tmp_path):
    """A GPT-2 with each of loralib's layers in place of its own, in float64."""
    torch, layers = lora_library.torch, lora_library.loralib
    c, rng = MODELS["gpt2"], np.random.default_rng(0)
    W = {k: v + 0.3 * rng.standard_normal(v.shape) for k, v in draw_weights(c, rng, 0.4).items()}
    write_model(tmp_path, c, W)
    lora_library.transformers.utils.logging.disable_progress_bar()
    model = lora_library.transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
    how = {"fan_in_fan_out": True, "dtype": torch.float64, "lora_alpha": 5}

    def put(at, name, layer):
        old, outer = model.get_submodule(f"{at}.{name}"), model.get_submodule(at)
        with torch.no_grad():
            layer.weight.data = old.weight.data.clone()
            if getattr(old, "bias", None) is not None:
                layer.bias.copy_(old.bias)
        setattr(outer, name, layer)

    for i, enabled in enumerate(((True, False, True), (True, True, True))):
        at = f"transformer.h.{i}"
        put(f"{at}.attn", "c_attn", layers.MergedLinear(8, 24, 2, enable_lora=list(enabled), **how))
        put(f"{at}.mlp", "c_fc", layers.Linear(8, 32, 3, **how))
        put(f"{at}.attn", "c_proj", layers.Linear(8, 8, 1, **how))
    embedding = layers.Embedding(9, 8, 2, lora_alpha=5, dtype=torch.float64)
    put("transformer", "wpe", embedding)
    model.train()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_()

    def arrays(state):
        return {k: v.numpy() for k, v in state.items()}

    told = {"alpha": 5, "enabled": (True, False, True)}
    read, tuning = loralib.read_adapter(arrays(layers.lora_state_dict(model)), c, **told)
    assert tuning.scale["layers.0.qkv"] == tuning.scale["positions"] == 2.5
    again = loralib.read_adapter(arrays(model.state_dict()), c, base=W, **told)
    assert same(again, (read, tuning))
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])
    for module in model.modules():  # no dropout, and nothing merged
        module.training = False
    with torch.no_grad():
        z = model(torch.tensor(ids)).logits.numpy()

    def off(adapter, told):
        found, _ = logits(Batch(ids), W | adapter, c, told)
        return relative_error(found.T.reshape(z.shape), z)

    figure = off(read, tuning)
    record_worst("logits against loralib, read from a state dict", figure)
    assert figure <= GRADIENT
    halved = replace(tuning, scale={at: s / 2 for at, s in tuning.scale.items()})
    assert off(read, halved) > 1e9 * GRADIENT
    for name in ("layers.1.qkv.A", "layers.0.o.A"):
        assert off(read | {name: read[name][:, ::-1]}, tuning) > 1e9 * GRADIENT
    for module in model.modules():
        module.training = True
    model.eval()
    refused(
        lambda: loralib.read_adapter(arrays(model.state_dict()), c, base=W, **told),
        "other weights than the base's, near the merged ones",
    )


@pytest.mark.parametrize(("k", "groups"), [(3, 1), (2, 2), (4, 2)])
def test_loralibs_convolution_has_factors(k, groups, lora_library):
    torch, rng = lora_library.torch, np.random.default_rng(0)
    layer = lora_library.loralib.Conv2d(4, 6, k, r=2, lora_alpha=3, groups=groups)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.tensor(rng.integers(-3, 4, p.shape).astype(F32)))
    W = layer.conv.weight.detach().numpy().copy()
    A, B = (p.detach().numpy() for p in (layer.lora_A, layer.lora_B))
    A1, B1 = loralib.conv_factors(A, B, k, groups)
    layer.eval()
    merged = layer.conv.weight.detach().numpy().reshape(6, -1)
    assert (merge_weight(W.reshape(6, -1), A1, B1, 1.5) == merged).all()
    assert (merged != W.reshape(6, -1)).any()
