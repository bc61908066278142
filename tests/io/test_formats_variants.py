"""PEFT's files of every variant, kind of module and setting: round trips, refusals, the fields."""

import dataclasses
import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from extras import optional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from marks import examples
from safetensors.numpy import load_file, save_file
from test_formats import MODELS, contents, edit, edit_tensors, same, weights

from minilora import Batch, TrainableSpec, inject, logits
from minilora.io.atomic import write_files
from minilora.io.errors import FormatError
from minilora.io.files import pack_json, read_json
from minilora.io.formats import peft
from minilora.io.formats.huggingface import config_to_json, read_config, write_model
from minilora.io.formats.peft import (
    CONFIG,
    read_adapter,
    read_lora_config,
    vera_projections,
    write_adapter,
)
from minilora.spec.lora import is_base, twin
from minilora.spec.target_modules import (
    LoraConfig,
    replicate_layers,
    resolve_targets,
    with_invocation,
)

CASES = {
    "dora": ("llama", LoraConfig(r=3, lora_alpha=5, variant="dora", rank_pattern={"1.q": 2})),
    "dora, rslora, gpt2": (
        "gpt2",
        LoraConfig(r=2, lora_alpha=5, variant="dora", use_rslora=True, bias="all"),
    ),
    "dora, bert": (
        "bert",
        LoraConfig(
            r=2, lora_alpha=3, variant="dora", bias="lora_only", init_lora_weights="gaussian"
        ),
    ),
    "dora of tables": (
        "llama",
        LoraConfig(r=2, lora_alpha=3, variant="dora", target_modules=["embed", "up"]),
    ),
    "bias": ("gpt2", LoraConfig(r=2, lora_alpha=3, variant="lora-bias", alpha_pattern={"qkv": 7})),
    "bias, no base's": (
        "llama",
        LoraConfig(r=2, lora_alpha=3, variant="lora-bias", target_modules=["q", "head"]),
    ),
    "orthogonal": (
        "bert",
        LoraConfig(
            r=4, lora_alpha=3, init_lora_weights="orthogonal", target_modules=["q", "pooler"]
        ),
    ),
    "vera": ("llama", LoraConfig(r=3, variant="vera", target_modules=["q", "down", "v"])),
    "vera, gpt2": (
        "gpt2",
        LoraConfig(r=3, variant="vera", target_modules=["qkv", "down"], bias="lora_only"),
    ),
    "vera, bert": (
        "bert",
        LoraConfig(r=2, variant="vera", modules_to_save=["head.weight", "head.bias"]),
    ),
    "adalora": (
        "llama",
        LoraConfig(r=4, lora_alpha=6, variant="adalora", rank_pattern={"0.q": 2, "up": 3}),
    ),
    "adalora, gpt2": ("gpt2", LoraConfig(r=3, lora_alpha=2.5, variant="adalora", bias="all")),
    "adalora, bert": (
        "bert",
        LoraConfig(r=3, lora_alpha=0, variant="adalora", target_modules=["q", "pooler"]),
    ),
    "alora": (
        "llama",
        LoraConfig(r=3, lora_alpha=5, variant="alora", alora_invocation_tokens=[1, 4]),
    ),
    "alora, rslora, gpt2": (
        "gpt2",
        LoraConfig(
            r=3,
            lora_alpha=5,
            variant="alora",
            use_rslora=True,
            alora_invocation_tokens=[4],
            target_modules=["qkv", "down"],
        ),
    ),
    "tables": (
        "llama",
        LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "q"], rank_pattern={"embed": 3}),
    ),
    "tables, gpt2": (
        "gpt2",
        LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "positions"], bias="all"),
    ),
    "tables, bert": (
        "bert",
        LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "positions", "types", "v"]),
    ),
    "tied head": ("qwen2", LoraConfig(r=2, lora_alpha=3, target_modules=["head", "q"])),
    "tied head, gpt2": ("gpt2", LoraConfig(r=2, lora_alpha=3, target_modules=["head"])),
    "head and table": ("qwen2", LoraConfig(r=2, lora_alpha=3, target_modules=["head", "embed"])),
    "tie": (
        "qwen2",
        LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "q"], ensure_weight_tying=True),
    ),
    "tie, gpt2": (
        "gpt2",
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["head"], ensure_weight_tying=True, use_rslora=True
        ),
    ),
    "tokens": (
        "llama",
        LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=["q"],
            trainable_token_indices={"embed": [9, 3], "head": [4]},
        ),
    ),
    "tokens, tied": (
        "qwen2",
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["q"], trainable_token_indices={"embed": [9, 3]}
        ),
    ),
    "tokens, bert": (
        "bert",
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["q"], trainable_token_indices={"positions": [0, 2]}
        ),
    ),
    "tokens, adalora": (
        "llama",
        LoraConfig(
            r=2,
            lora_alpha=3,
            variant="adalora",
            target_modules=["q"],
            trainable_token_indices={"embed": [3]},
        ),
    ),
    "replication": (
        "llama",
        LoraConfig(
            r=2, lora_alpha=3, target_modules=["q", "up"], layer_replication=[(0, 2), (1, 2)]
        ),
    ),
    "replication, bert": (
        "bert",
        LoraConfig(
            r=2,
            lora_alpha=3,
            variant="dora",
            target_modules=["v"],
            layer_replication=[(0, 2), (1, 2)],
        ),
    ),
}


def base_of(case):
    kind, lora = CASES[case]
    c = MODELS[kind]
    return (
        replicate_layers(weights(c), c, lora.layer_replication)[0]
        if lora.layer_replication
        else weights(c)
    )


def made(case, seed=1):
    """A model with a trained adapter: its configuration, weights, tuning and choice."""
    kind, lora = CASES[case]
    c, W = MODELS[kind], weights(MODELS[kind])
    if lora.layer_replication:
        W, c = replicate_layers(W, c, lora.layer_replication)
    rng = np.random.default_rng(seed)
    W, tuning = inject(W, lora, c.matrices(), rng)
    W |= {k: W[k] + 0.3 * rng.standard_normal(W[k].shape) for k in sorted(tuning.trained)}
    if lora.ensure_weight_tying:
        W["head.A"], W["head.B"] = twin(W["embed.A"], W["embed.B"])
    for at, ids in lora.trainable_token_indices.items():
        W[f"{at}.weight"] = W[f"{at}.weight"].copy()
        W[f"{at}.weight"][ids] += 0.3 * rng.standard_normal((len(ids), c.d))
    return c, W, tuning, lora


def parts_of(W):
    return [name for name in W if not is_base(name)]


every_case = pytest.mark.parametrize("case", CASES)


def batch_for(c, tuning, lora):
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 1, 4]])
    return Batch(ids), with_invocation(
        tuning, ids, lora.alora_invocation_tokens
    ) if lora.alora_invocation_tokens else tuning


@pytest.fixture
def folder(tmp_path):
    """A folder to which a case is written at once."""

    def write(case):
        write_adapter(tmp_path / case, *made(case))
        return tmp_path / case

    return write


@every_case
def test_a_variant_read_back_is_the_variant_written(case, folder):
    c, W, tuning, lora = made(case)
    base = base_of(case)
    read, tuning_read = read_adapter(folder(case), c, base=base)
    assert same({k: W[k] for k in read}, read)
    assert {*read} >= {*parts_of(W)} | tuning.trained
    assert tuning_read == tuning
    batch, now = batch_for(c, tuning, lora)
    z, _ = logits(batch, W, c, now)
    z_read, _ = logits(batch, base | read, c, batch_for(c, tuning_read, lora)[1])
    assert z.tobytes() == z_read.tobytes()
    z_base, _ = logits(batch, base, c, TrainableSpec())
    assert abs(z - z_base).max() > 1e-3


@every_case
def test_the_choice_of_a_variant_read_back_is_the_choice_written(case, folder):
    c, _, _, lora = made(case)
    for known in (c, MODELS[CASES[case][0]]):  # the deeper model's configuration or the base's
        read = read_lora_config(folder(case), known)
        assert resolve_targets(read, c.matrices()) == replace(
            resolve_targets(lora, c.matrices()), alpha=resolve_targets(read, c.matrices()).alpha
        )
        for name in ("variant", "use_rslora", "bias", "init_lora_weights", "ensure_weight_tying"):
            assert getattr(read, name) == getattr(lora, name)
        for name in ("alora_invocation_tokens", "layer_replication"):
            assert list(getattr(read, name)) == list(getattr(lora, name))
        assert read.trainable_token_indices == lora.trainable_token_indices
        if lora.variant != "vera":
            assert resolve_targets(read, c.matrices()) == resolve_targets(lora, c.matrices())


@every_case
def test_writing_a_variant_that_was_read_gives_the_same_bytes(case, folder, tmp_path):
    path, (c, *_) = folder(case), made(case)
    base = base_of(case)
    read, tuning = read_adapter(path, c, base=base)
    shuffled = {k: np.asfortranarray(read[k]) for k in reversed(read)}
    write_adapter(tmp_path / "again", c, base | shuffled, tuning, read_lora_config(path, c))
    assert contents(tmp_path / "again") == contents(path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("case", ["dora of tables", "vera", "adalora", "bias", "tokens"])
def test_a_variant_is_converted_to_the_dtype_asked_for(case, dtype, folder):
    c, W, *_ = made(case)
    base = {name: w.astype(dtype) for name, w in base_of(case).items()}
    read, _ = read_adapter(folder(case), c, dtype, base=base)
    assert same({k: v for k, v in read.items() if not is_base(k)}, {
        k: W[k].astype(dtype) for k in parts_of(W)
    })  # fmt: skip
    assert {w.dtype for w in read.values()} == {np.dtype(dtype)}


def test_names_of_every_part_in_a_file(folder):
    q, embed = (
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.model.embed_tokens",
    )
    wanted = {
        "dora": {f"{q}.lora_A.weight": (3, 8), f"{q}.lora_magnitude_vector": (16,)},
        "bias, no base's": {f"{q}.lora_B.weight": (16, 2), f"{q}.lora_B.bias": (16,)},
        "vera": {
            "base_model.vera_A": (3, 8), "base_model.vera_B": (16, 3),
            f"{q}.vera_lambda_b": (16,), f"{q}.vera_lambda_d": (3,),
        },
        "adalora": {f"{q}.lora_A": (2, 8), f"{q}.lora_B": (16, 2), f"{q}.lora_E": (2, 1)},
        "tables": {f"{embed}.lora_embedding_A": (3, 13), f"{embed}.lora_embedding_B": (8, 3)},
        "dora of tables": {f"{embed}.lora_magnitude_vector": (8,)},
        "tokens": {f"{embed}.token_adapter.trainable_tokens_delta": (2, 8)},
    }  # fmt: skip
    for case, shapes in wanted.items():
        tensors = load_file(folder(case) / peft.WEIGHTS)
        assert {name: tensors[name].shape for name in shapes} == shapes
    with pytest.raises(ValueError, match=r"'embed\.c': found no such part"):
        peft.adapter_names(MODELS["llama"], ["embed.A", "embed.c"])


def test_veras_projections_are_the_last_24_bits_of_the_mersenne_twister():
    """The first output of its reference seed is known from its authors."""
    (A,), _ = vera_projections(5489, 1, 1, 1)
    bound = np.float32(6**0.5)
    drawn = np.float64(bound - -bound) * (3499211612 % 2**24 / 2**24) - np.float64(bound)
    assert np.float32(drawn) == A
    assert np.float32(np.float64(2 * bound) * (3499211612 / 2**32) - np.float64(bound)) != A


@pytest.mark.parametrize("kind", peft.KINDS)
def test_every_setting_of_pefts_configurations_is_known(kind):
    """A new field of a new release is none of the three, and then refused by name."""
    library = optional("peft")
    config = {"LORA": "LoraConfig", "ADALORA": "AdaLoraConfig", "VERA": "VeraConfig"}[kind]
    fields = {f.name for f in dataclasses.fields(getattr(library, config))}
    lists = [{*peft.KINDS[kind].read}, {*peft.KINDS[kind].fixed}, {*peft.KINDS[kind].inert.split()}]
    assert fields == set.union(*lists)
    assert sum(map(len, lists)) == len(fields)
    assert fields | {"of_the_future"} != set.union(*lists)


def test_what_another_kind_reads_is_refused_by_name(folder):
    for case, said in {
        "vera": {"exclude_modules": ["q"], "lora_alpha": 3, "use_rslora": True, "use_dora": True},
        "dora": {"vera_dropout": 0.1, "total_step": 3, "save_projection": True},
        "adalora": {"d_initial": 0.1, "projection_prng_key": 3, "of_the_future": 0},
    }.items():
        path = folder(case)
        for key, value in said.items():
            edit(path / peft.CONFIG, **{key: value})
            with pytest.raises(FormatError, match=f"{key}: found .*, expected no setting of this"):
                read_lora_config(path, MODELS["llama"])
            edit(path / peft.CONFIG, **{key: ...})
        read_lora_config(path, MODELS["llama"])


@pytest.mark.parametrize(("case", "kind"), [("adalora", "ADALORA"), ("vera", "VERA")])
def test_the_settings_of_a_kind_are_fixed_or_inert_or_read(case, kind, folder):
    path, c = folder(case), MODELS["llama"]
    before = read_lora_config(path, c)
    text = (path / peft.CONFIG).read_text()
    for key, values in peft.KINDS[kind].fixed.items():
        for value in (v for v in ("other", 1, True) if v not in values and key != "peft_type"):
            edit(path / peft.CONFIG, **{key: value})
            with pytest.raises(FormatError, match=f"{key}: found {json.dumps(value)}, exp"):
                read_lora_config(path, c)
            (path / peft.CONFIG).write_text(text)
    edit(path / peft.CONFIG, **dict.fromkeys(peft.KINDS[kind].inert.split(), 0.5))
    assert read_lora_config(path, c) == before


E = "model.layers.0.self_attn.q_proj.lora_E"
SETTINGS = [
    ("dora", {"lora_bias": True}, r"use_dora: found it beside lora_bias"),
    ("dora", {"alora_invocation_tokens": [1]}, "alora_invocation_tokens: found it beside use_dora"),
    ("dora", {"use_dora": 1}, "use_dora: found 1, expected true or false"),
    ("dora", {"init_lora_weights": "pissa_niter_4"}, 'init_lora_weights: found "pissa_niter_4"'),
    ("dora", {"init_lora_weights": "loftq"}, 'init_lora_weights: found "loftq"'),
    ("dora", {"init_lora_weights": "corda"}, 'init_lora_weights: found "corda"'),
    ("dora", {"init_lora_weights": "lora_ga"}, 'init_lora_weights: found "lora_ga"'),
    ("dora", {"init_lora_weights": "mica"}, 'init_lora_weights: found "mica"'),
    ("dora", {"init_lora_weights": "new"}, 'init_lora_weights: found "new", expected true, fal'),
    ("alora", {"task_type": None}, r'task_type: found "", expected "CAUSAL_LM" for aLoRA'),
    ("alora", {"alora_invocation_tokens": [-1]}, r"found \[-1\], expected whole numbers from 0"),
    ("bias", {"target_modules": ["wte"]}, "found transformer.wte, expected projections only"),
    ("alora", {"target_modules": ["embed_tokens"]}, "target_modules: found model.embed_tokens"),
    (
        "adalora",
        {"target_modules": ["embed_tokens"], "rank_pattern": None},
        "target_modules: found model.embed_tokens",
    ),
    ("vera", {"target_modules": ["embed_tokens"]}, "target_modules: found model.embed_tokens"),
    (
        "tables",
        {"target_modules": ["input_layernorm"]},
        r"target_modules: found model\.layers\.0\.input_layernorm",
    ),
    ("tied head", {"init_lora_weights": "pissa"}, "found pissa of a tied head, expected true"),
    (
        "tables, gpt2",
        {"init_lora_weights": "olora", "target_modules": ["c_fc"]},
        "olora of a gpt2",
    ),
    ("tie", {"use_dora": True}, "use_dora: found it beside ensure_weight_tying, expected neither"),
    ("tie", {"rank_pattern": {"lm_head": 5}}, "ensure_weight_tying: ranks 2 and 5"),
    ("adalora", {"rank_pattern": {E[:-1] + "A": [True] * 4}}, "rank_pattern: found model.*lora_A"),
    (
        "adalora",
        {"rank_pattern": {E: [True]}},
        "rank_pattern: found another length of .*expected 4",
    ),
    ("adalora", {"rank_pattern": {E: [1, 1, 0, 0]}}, "rank_pattern: found .*lists of true and fal"),
    ("adalora", {"rank_pattern": {"q_proj": 3}}, "rank_pattern: found .*lists of true and false"),
    ("adalora", {"lora_alpha": 0}, "lora_alpha: found 0, expected more than 0"),
    ("adalora", {"use_rslora": True}, "use_rslora: found true"),
    ("adalora", {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern: found"),
    (
        "adalora",
        {"target_modules": ["0.self_attn.q_proj"], "rank_pattern": {E: [False] * 4}},
        "rank_pattern: found all pruned",
    ),
    ("vera", {"bias": "lora_only"}, 'bias: found "lora_only", expected none, all or vera_only'),
    ("vera", {"projection_prng_key": -1}, "projection_prng_key: found -1"),
    ("tokens", {"trainable_token_indices": [13]}, r"found \[13\], expected tokens from 0 to 12"),
    (
        "tokens",
        {"trainable_token_indices": [1, 1]},
        r"found \[1, 1\], expected tokens .* each once",
    ),
    ("tokens", {"trainable_token_indices": {"q_proj": [1]}}, "which ends .*, expected one table"),
    ("tokens", {"trainable_token_indices": {"wte": [1]}}, "'wte', which ends no name"),
    ("tokens", {"trainable_token_indices": {"norm": [1]}}, "which ends .*expected one table"),
    (
        "tokens",
        {"trainable_token_indices": {"embed_tokens": "a"}},
        "trainable_token_indices: found",
    ),
    ("tokens", {"target_modules": ["lm_head"]}, "found lm_head, which is adapted, tied"),
    ("tokens", {"modules_to_save": ["lm_head"]}, "found lm_head, which is adapted, tied"),
    (
        "tokens, tied",
        {"target_modules": ["lm_head"]},
        "trainable_token_indices: found model.embed_tokens",
    ),
    (
        "tokens, tied",
        {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
        "trainable_token_indices: found a tied head",
    ),
    ("tokens, bert", {"trainable_token_indices": {"classifier": [1]}}, "expected one table"),
    ("tokens, bert", {"trainable_token_indices": {"embeddings": [1]}}, "ends .*expected one table"),
    (
        "tie",
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
        "modules_to_save: found model.embed_tokens of a tied model",
    ),
    ("replication", {"layer_replication": [[0, 3]]}, r"layer_replication: found ranges: found"),
    ("replication", {"layer_replication": [[1, 1]]}, r"expected ranges of layers"),
    ("replication", {"layer_replication": [[1]]}, r"expected pairs of whole numbers"),
    ("replication", {"bias": "all"}, "layer_replication: found it beside bias all"),
    ("replication", {"init_lora_weights": "pissa"}, "it beside init_lora_weights pissa"),
    ("tables, gpt2", {"layer_replication": [[0, 2]]}, "found it for a gpt2, expected none"),
]


@pytest.mark.parametrize(("case", "changes", "says"), SETTINGS)
def test_a_setting_of_a_variant_is_refused_by_name(case, changes, says, folder):
    path, c = folder(case), MODELS[CASES[case][0]]
    read_lora_config(path, c)
    edit(path / peft.CONFIG, **changes)
    with pytest.raises(FormatError, match=says) as raised:
        read_lora_config(path, c)
    assert str(path / peft.CONFIG) in str(raised.value)


def test_a_tie_needs_one_of_the_two_names_that_peft_knows(folder):
    path, c = folder("tie"), MODELS["qwen2"]
    before = read_adapter(path, c)
    for names in (["model.embed_tokens"], ["lm_head"], ["other.lm_head", "embed_tokens"]):
        edit(path / peft.CONFIG, target_modules=[*names, "q_proj"])
        assert same(read_adapter(path, c)[0], before[0])
        assert read_adapter(path, c)[1] == before[1]
    edit(path / peft.CONFIG, target_modules=["embed_tokens", "q_proj"], alpha_pattern={"head": 7})
    assert read_adapter(path, c)[1].scale["head"] == 1.5
    edit(path / peft.CONFIG, alpha_pattern={"lm_head": 7})
    assert read_adapter(path, c)[1].scale["head"] == 3.5
    edit(path / peft.CONFIG, target_modules=["q_proj"], alpha_pattern=None)
    with pytest.raises(FormatError, match=r"target_modules: found no head, whose factors"):
        read_adapter(path, c)


def test_veras_layers_are_asked_for_beside_an_expression_too(folder):
    path, c = folder("vera"), MODELS["llama"]
    edit(path / peft.CONFIG, target_modules=".*(q|v)_proj", layers_to_transform=[1])
    assert list(read_lora_config(path, c).target_modules) == ["layers.1.q", "layers.1.v"]
    path = folder("dora")
    edit(path / peft.CONFIG, target_modules=".*q_proj", layers_to_transform=[1])
    with pytest.raises(FormatError, match="layers_to_transform: found it beside an expression"):
        read_lora_config(path, c)


def test_a_pattern_of_layers_without_layers_is_refused(folder):
    path, c = folder("dora"), MODELS["llama"]
    edit(path / peft.CONFIG, layers_to_transform=[1], layers_pattern="layers")
    assert list(read_lora_config(path, c).target_modules)
    edit(path / peft.CONFIG, layers_to_transform=None)
    with pytest.raises(FormatError, match="layers_pattern: found it beside no layers_to_transform"):
        read_lora_config(path, c)


def test_a_table_that_was_trained_for_its_rows_is_written_by_rows(folder, tmp_path):
    c, W, tuning, lora = made("tokens")
    whole = replace(tuning, trained=tuning.trained | {"embed.weight", "head.weight"})
    write_adapter(tmp_path / "whole", c, W, whole, lora)
    assert contents(tmp_path / "whole") == contents(folder("tokens"))
    more = replace(whole, trained=whole.trained | {"layers.0.q.weight"})
    with pytest.raises(FormatError, match="trained: found"):  # not for the rows alone
        write_adapter(tmp_path / "more", c, W, more, lora)


def test_a_residual_of_another_base_is_not_converted(tmp_path):
    c, base = MODELS["llama"], weights(MODELS["llama"])
    lora = LoraConfig(r=2, lora_alpha=3, variant="pissa", target_modules=["q"])
    W, tuning = inject(base, lora, c.linears(), np.random.default_rng(0))
    write_adapter(tmp_path / "yes", c, W, tuning, lora, base=base)
    other = base | {"layers.1.q.weight": base["layers.1.q.weight"] + 1e-9}
    with pytest.raises(FormatError, match=r"found another layers\.1\.q\.weight, expected W's, or"):
        write_adapter(tmp_path / "no", c, W, tuning, lora, base=other)


def test_a_deeper_adapter_is_not_read_for_the_base(folder):
    path = folder("replication")
    with pytest.raises(
        FormatError, match=r"found a model of 2 layers, expected 3; .*replicate the"
    ):
        read_adapter(path, MODELS["llama"])
    read_adapter(path, made("replication")[0])


def test_what_changes_the_base_asks_for_it(folder):
    path, c = folder("tokens"), MODELS["llama"]
    with pytest.raises(
        FormatError, match=r"trainable_token_indices: found \{.*, expected a base bes"
    ):
        read_adapter(path, c)
    with pytest.raises(FormatError, match=r"base: found none, expected one"):
        fresh("llama", path, init_lora_weights="pissa")


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = [
    (
        "dora",
        f"{Q0}.lora_magnitude_vector",
        lambda t: t[None],
        r"shape \(1, 16\), expected .*\(16,\)",
    ),
    ("dora", f"{Q0}.lora_magnitude_vector", lambda t: t[:, None], r"shape \(16, 1\), expected"),
    ("dora", f"{Q0}.lora_magnitude_vector", None, "none named .*lora_magnitude_vector"),
    ("dora", f"{Q0}.lora_B.weight", lambda t: t.T, r"shape \(3, 16\), expected shape \(16, 3\)"),
    ("bias, no base's", f"{Q0}.lora_B.bias", lambda t: t[:8], r"shape \(8,\), expected .*\(16,\)"),
    ("vera", "base_model.vera_A", lambda t: t[:, :6], r"shape \(3, 6\), expected shape \(3, 8\)"),
    ("vera", "base_model.vera_B", lambda t: t.T, r"shape \(3, 16\), expected shape \(16, 3\)"),
    ("vera", "base_model.vera_B", None, "none named base_model.vera_B"),
    ("vera", f"{Q0}.vera_lambda_d", lambda t: t[:2], r"shape \(2,\), expected shape \(3,\)"),
    ("adalora", f"{Q0}.lora_E", lambda t: t[:, 0], r"shape \(2,\), expected shape \(2, 1\)"),
    ("adalora", f"{Q0}.lora_A", lambda t: t.T, r"shape \(8, 2\), expected shape \(2, 8\)"),
    (
        "tables",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        lambda t: t.T,
        r"shape \(13, 3\), expected shape \(3, 13\)",
    ),
    (
        "tokens",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        lambda t: t[:1],
        r"shape \(1, 8\), expected shape \(2, 8\)",
    ),
]


@pytest.mark.parametrize(("case", "name", "change", "says"), TENSORS)
def test_a_tensor_of_another_shape_is_named(case, name, change, says, folder):
    path, c = folder(case), MODELS["llama"]

    def edited(tensors):
        tensor = tensors.pop(name)
        if change:
            tensors[name] = np.ascontiguousarray(change(tensor))

    read_adapter(path, c, base=weights(c))
    edit_tensors(path / peft.WEIGHTS, edited)
    with pytest.raises(FormatError, match=says) as raised:
        read_adapter(path, c, base=weights(c))
    assert str(path / peft.WEIGHTS) in str(raised.value)


def test_a_part_too_many_is_named(folder):
    for case, name in (
        ("dora", f"{Q0}.lora_B.bias"),
        ("bias, no base's", f"{Q0}.lora_magnitude_vector"),
        ("adalora", f"{Q0}.ranknum"),
        ("tables", "base_model.vera_A"),
    ):
        path = folder(case)
        edit_tensors(
            path / peft.WEIGHTS, lambda tensors, name=name: tensors.update({name: np.ones(2)})
        )
        with pytest.raises(FormatError, match=f"tensors: found {name}, expected these"):
            read_adapter(path, MODELS["llama"])
    path = folder("vera")
    edit(path / peft.CONFIG, save_projection=False)
    with pytest.raises(
        FormatError, match=r"tensors: found base_model\.vera_A, base_model\.vera_B, exp"
    ):
        read_adapter(path, MODELS["llama"])


def test_an_embeddings_weight_beside_its_adapter_is_read_once(folder):
    """As PEFT writes it where a target is called embed_tokens or lm_head."""
    c, W, tuning, _ = made("head and table")
    path = folder("head and table")
    at = {p: f"base_model.model.{p}.base_layer.weight" for p in ("model.embed_tokens", "lm_head")}

    def both(tensors):
        tensors |= {name: W["embed.weight"].copy() for name in at.values()}

    tensors = edit_tensors(path / peft.WEIGHTS, both)
    read, found = read_adapter(path, c)
    assert same(read, {k: W[k] for k in (*parts_of(W), "embed.weight")})
    assert found == tuning
    tensors[at["lm_head"]][0, 0] += 1
    save_file(tensors, path / peft.WEIGHTS)
    with pytest.raises(
        FormatError, match=r"base_layer\.weight: found other entries, expected those"
    ):
        read_adapter(path, c)


def fresh(kind, folder, base=None, **chosen):
    """A fresh adapter, written at once."""
    c, lora = MODELS[kind], LoraConfig(**{"r": 2, **chosen})
    W = weights(c)
    if lora.layer_replication:
        W, c = replicate_layers(W, c, lora.layer_replication)
    W, tuning = inject(W, lora, c.matrices(), np.random.default_rng(0))
    write_adapter(folder, c, W, tuning, lora, base=base)


def test_a_pruned_module_has_no_tensors_but_empty_ones(folder):
    """As PEFT writes them, or none at all; its scale stays that of the rank at the start."""
    c, W, tuning, _ = made("adalora")
    path, gone = folder("adalora"), "layers.1.down"
    at = "model.layers.1.mlp.down_proj.lora_"
    pattern = json.loads((path / peft.CONFIG).read_text())["rank_pattern"]
    edit(path / peft.CONFIG, rank_pattern=pattern | {f"{at}E": [False] * 4})
    with pytest.raises(FormatError, match=rf"{at}.: found shape .*, expected no entry; rank_pat"):
        read_adapter(path, c)

    def emptied(tensors):
        for part, shape in (("A", (0, 6)), ("B", (8, 0)), ("E", (0, 1))):
            tensors[f"base_model.model.{at}{part}"] = np.ones(shape)

    def without(tensors):
        for part in "ABE":
            del tensors[f"base_model.model.{at}{part}"]

    for change in (emptied, without):
        edit_tensors(path / peft.WEIGHTS, change)
        read, found = read_adapter(path, c)
        assert same(read, {k: W[k] for k in parts_of(W) if not k.startswith(gone)})
        assert found.scale == {k: s for k, s in tuning.scale.items() if k != gone}
    edit(path / peft.CONFIG, rank_pattern=pattern)
    with pytest.raises(FormatError, match=f"none named base_model.model.{at}A"):
        read_adapter(path, c)


def test_a_quantized_start_is_written_for_the_quantized_base(tmp_path):
    c, base = MODELS["llama"], weights(MODELS["llama"])
    lora = LoraConfig(r=2, lora_alpha=3, variant="loftq", target_modules=["q"])
    W, tuning = inject(base, lora, c.linears(), np.random.default_rng(0))
    write_adapter(tmp_path, c, W, tuning, lora, base=W)
    assert json.loads((tmp_path / peft.CONFIG).read_text())["init_lora_weights"] is True
    read, found = read_adapter(tmp_path, c)
    assert same(read, {k: W[k] for k in parts_of(W)})
    assert found == tuning
    z, _ = logits(Batch(np.array([[3, 1, 4]])), W, c, tuning)
    assert (logits(Batch(np.array([[3, 1, 4]])), base | read, c, found)[0] != z).any()


UNLIKE = [  # what differs, and the choices of a fresh adapter
    ("variant: found dora-full, expected dora", "llama", {"variant": "dora-full"}),
    (
        "variant: found alora",
        "bert",
        {"variant": "alora", "alora_invocation_tokens": [1]},
    ),
    (
        "rank_pattern: found more than r 2 of layers.0.q",
        "llama",
        {"variant": "adalora", "rank_pattern": {"0.q": 3}},
    ),
    (
        "rank_pattern: found alpha 0",
        "llama",
        {"variant": "adalora", "rank_pattern": {"0.q": 1}, "lora_alpha": 0},
    ),
    (
        "layer_replication: found .* of a bert",
        "bert",
        {"layer_replication": [(0, 2), (0, 1)], "bias": "all"},
    ),
    ("layer_replication: found .* of a gpt2", "gpt2", {"layer_replication": [(0, 2), (0, 1)]}),
    (
        "trained: found the tied embedding",
        "qwen2",
        {"target_modules": ["head"], "modules_to_save": ["embed.weight"]},
    ),
    ("found another layers.0.q.weight", "llama", {"variant": "loftq", "base": True}),
    (
        "found another layers.0.q.weight",
        "llama",
        {
            "variant": "alora",
            "init_lora_weights": "olora",
            "alora_invocation_tokens": [1],
            "base": True,
        },
    ),
]


@pytest.mark.parametrize(("says", "kind", "chosen"), UNLIKE)
def test_what_peft_computes_otherwise_is_not_written(says, kind, chosen, tmp_path):
    chosen = dict(chosen)
    base = weights(MODELS[kind]) if chosen.pop("base", None) else None
    with pytest.raises(FormatError, match=says):
        fresh(kind, tmp_path / "no", base, **chosen)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("case", "name", "change", "says"),
    [
        (
            "dora",
            "layers.0.q.magnitude",
            lambda t: t.T,
            r"found shape \(1, 16\), expected .*\(16, 1",
        ),
        (
            "vera",
            "layers.1.v.A",
            lambda t: 2 * t,
            r"A and B of layers\.1\.v: found others, expected",
        ),
        ("vera", "layers.1.v.B", lambda t: t[::-1], r"A and B of layers\.1\.v: found others"),
        ("tie", "head.A", lambda t: 2 * t, "found other factors, expected the embedding's, tied"),
        ("adalora", "layers.0.q.E", lambda t: t[:1], r"layers\.0\.q\.E: found shape \(1, 1\)"),
    ],
)
def test_a_part_that_does_not_fit_is_not_written(case, name, change, says, tmp_path):
    c, W, tuning, lora = made(case)
    with pytest.raises(FormatError, match=says):
        write_adapter(tmp_path / "no", c, W | {name: change(W[name])}, tuning, lora)
    assert not (tmp_path / "no").exists()


def test_the_choice_and_the_tuning_agree_when_a_variant_is_written(tmp_path):
    c, W, tuning, lora = made("dora")
    for says, wrong in (
        (
            r"variant of .*: found another equation, expected dora",
            (replace(tuning, variant={}), lora),
        ),
        ("factors: found .*magnitude", (tuning, replace(lora, variant="lora"))),
        ("scale of .*: found", (tuning, replace(lora, use_rslora=True))),
    ):
        with pytest.raises(FormatError, match=says):
            write_adapter(tmp_path / "no", c, W, *wrong)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dora", "adalora", "vera", "tokens", "replication", "tie"])
@settings(examples(4), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_a_setting_says_no_other_exception_comes_out(case, tmp_path, data):
    file, c = tmp_path / peft.CONFIG, MODELS[CASES[case][0]]
    if not (tmp_path / "whole").exists():
        write_adapter(tmp_path / "whole", *made(case))
    whole = json.loads((tmp_path / "whole" / peft.CONFIG).read_text())
    kind = peft.KINDS[whole["peft_type"]]
    names = st.sampled_from([*kind.read, *kind.fixed])
    file.write_text(json.dumps(whole | data.draw(st.dictionaries(names, JSON, max_size=2))))
    try:
        read_lora_config(tmp_path, c)
        said = str(file)
    except FormatError as error:
        said = str(error)
    assert str(file) in said


@pytest.mark.parametrize(
    ("kind", "settings", "found"),
    [
        (
            "llama",
            {"variant": "vera", "trainable_token_indices": {"embed": [1]}},
            "trainable_token_indices: found it with vera",
        ),
        (
            "llama",
            {"variant": "vera", "layer_replication": [(0, 2), (1, 2)]},
            "layer_replication: found it",
        ),
        (
            "llama",
            {"target_modules": ["q", "embed"], "trainable_token_indices": {"embed": [1]}},
            "rows of embed, which is",
        ),
        (
            "qwen2",
            {"layer_replication": [(0, 2), (1, 2)]},
            "layer_replication: found .* of a qwen2",
        ),
    ],
)
def test_what_peft_would_load_as_another_function_is_not_written(kind, settings, found, tmp_path):
    lora = LoraConfig(**{"r": 2, "lora_alpha": 2, "target_modules": ["q"]} | settings)
    c = MODELS[kind]
    W = weights(c)
    if lora.layer_replication:
        W, c = replicate_layers(W, c, lora.layer_replication)
    W, tuning = inject(W, lora, c.matrices(), np.random.default_rng(0))
    with pytest.raises(FormatError, match=found):
        write_adapter(tmp_path / "a", c, W, tuning, lora)
    assert not (tmp_path / "a").exists()


def test_a_range_beyond_the_deeper_models_layers_is_read(tmp_path):
    """Ranges are of the base's layers, of which the model that they make may have fewer."""
    lora, base = (
        LoraConfig(r=2, lora_alpha=2, target_modules=["q"], layer_replication=[(1, 2)]),
        MODELS["llama"],
    )
    W, c = replicate_layers(weights(base), base, lora.layer_replication)
    W, tuning = inject(W, lora, c.linears(), np.random.default_rng(0))
    write_adapter(tmp_path, c, W, tuning, lora)
    read, tuning_read = read_adapter(tmp_path, c)
    assert same(read, {name: W[name] for name in read})
    assert tuning_read == tuning
    assert read_lora_config(tmp_path, base).layer_replication == [(1, 2)]


def test_rows_of_a_table_that_is_trained_in_full_contradict_it():
    with pytest.raises(ValueError, match="trainable_token_indices of embed"):
        LoraConfig(modules_to_save=[r"embed\..*"], trainable_token_indices={"embed": [1]})


@pytest.mark.parametrize("saved", [["mlp", "up_proj"], ["layers.1", "norm"], ["up_proj", "mlp"]])
def test_modules_to_save_inside_one_another_are_refused(saved, tmp_path):
    c, lora = MODELS["llama"], LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    W, tuning = inject(weights(c), lora, c.linears(), np.random.default_rng(0))
    write_adapter(tmp_path, c, W, tuning, lora)
    said = read_json(tmp_path / CONFIG) | {"modules_to_save": saved}
    write_files(tmp_path, {CONFIG: lambda: pack_json(said)})
    with pytest.raises(FormatError, match=r"modules_to_save: found .* in another of them"):
        read_lora_config(tmp_path, c)


def test_older_libraries_find_ropes_base_and_no_setting_that_they_do_not_know(tmp_path):
    c, lora = MODELS["llama"], LoraConfig(r=2, lora_alpha=2, target_modules=["q"])
    assert config_to_json(c)["rope_theta"] == c.theta
    W, tuning = inject(weights(c), lora, c.linears(), np.random.default_rng(0))
    write_adapter(tmp_path, c, W, tuning, lora)
    assert read_json(tmp_path / CONFIG).keys().isdisjoint(peft.settings.NEWER)


def test_ropes_kind_is_named_before_what_belongs_to_it(tmp_path):
    c = MODELS["llama"]
    write_model(tmp_path, c, weights(c))
    said = read_json(tmp_path / "config.json")
    said["rope_parameters"] = {"factor": 8.0, "rope_type": "yarn", "rope_theta": c.theta}
    write_files(tmp_path, {"config.json": lambda: pack_json(said)})
    with pytest.raises(FormatError, match='rope_type: found "yarn", expected "default"'):
        read_config(tmp_path)
