"""Adapters that PEFT itself has saved, of all kinds: none is accused. And settings of any kind."""

import itertools
from contextlib import suppress

import numpy as np
import pytest
from adapter_folders import settings, write_base, write_mlx, write_peft
from extras import needs, optional

from minilora.audit.adapter import adapter
from minilora.audit.converted import converted
from minilora.io.errors import FormatError

Q = {"target_modules": ["q_proj", "v_proj"]}
LLAMA = {
    "plain": {**Q},
    "rslora": {**Q, "use_rslora": True},
    "dora": {**Q, "use_dora": True},
    "patterns": {**Q, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "layers": {**Q, "layers_to_transform": [1]},
    "excluded": {**Q, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "saved": {**Q, "modules_to_save": ["lm_head", "norm"]},
    "tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "tokens": {**Q, "trainable_token_indices": [1, 3]},
    "gaussian": {**Q, "init_lora_weights": "gaussian"},
    "pissa": {**Q, "init_lora_weights": "pissa"},
    "alora": {**Q, "alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
    "replicated": {**Q, "layer_replication": [[0, 2], [1, 2]]},
    "dora of a table": {"target_modules": ["embed_tokens"], "use_dora": True},
}
TIED = {
    "tied": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "tied and saved": {**Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tied tokens": {**Q, "trainable_token_indices": {"embed_tokens": [1, 3]}},
}
BERT = {
    "bias of B": {"target_modules": ["query"], "lora_bias": True},
    "all biases": {"target_modules": ["query"], "bias": "all"},
    "its biases": {"target_modules": ["query"], "bias": "lora_only"},
    "a classifier": {"target_modules": ["query"], "task_type": "SEQ_CLS"},
}
GPT2 = {"conv1d": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}}
CASES = {
    (base, name): said
    for base, cases in (("llama", LLAMA), ("tied", TIED), ("bert", BERT), ("gpt2", GPT2))
    for name, said in cases.items()
}


def model_of(name):
    transformers = optional("transformers")
    size = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "bert":
        config = transformers.BertConfig(**size, intermediate_size=12)
        return transformers.BertForSequenceClassification(config)
    if name == "gpt2":
        special = {"bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2, **special)
        return transformers.GPT2LMHeadModel(config)
    tied = {"tie_word_embeddings": name == "tied"}
    config = transformers.LlamaConfig(**size, intermediate_size=12, **tied)
    return transformers.LlamaForCausalLM(config)


def saved(folder, model, config):
    """The model's folder and that of an adapter of it, all of whose parameters are drawn."""
    torch, peft = optional("torch"), optional("peft")
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def right(base, folder):
    report = adapter(folder, base)
    assert [e for e in report.entries if e.severity in ("deviation", "undecided")] == []
    assert converted(folder, folder).exit_status == 0
    return report


@pytest.mark.slow
@needs("torch", "transformers", "peft")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("base", "name"), CASES)
def test_what_peft_saves_is_right(tmp_path, base, name):
    config = optional("peft").LoraConfig(r=2, **CASES[base, name])
    right(*saved(tmp_path, model_of(base), config))


@pytest.mark.slow
@needs("torch", "transformers", "peft")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_and_adalora_are_right(tmp_path, save_projection):
    peft = optional("peft")
    vera = peft.VeraConfig(r=4, target_modules=["q_proj"], save_projection=save_projection)
    right(*saved(tmp_path / "vera", model_of("llama"), vera))
    adalora = peft.AdaLoraConfig(total_step=10, init_r=6, target_r=3, **Q)
    report = right(*saved(tmp_path / "adalora", model_of("llama"), adalora))
    assert all(e.figures.get("rank", 6) == 6 for e in report.entries)


# fmt: off
VALUES = (
    None, True, 0, -1, 3.5, 1e308, "x", "", "((", [], ["a"], [1], [None], {}, {"a": 1}, {"((": 1},
    [[0, 1]], {"q_proj": [1]}, {"q_proj": "x"}, {"q_proj": None}, [["a"]],
)
# fmt: on
KEYS = """
peft_type r lora_alpha target_modules modules_to_save rank_pattern alpha_pattern use_rslora use_dora
lora_bias bias init_lora_weights layers_to_transform layers_pattern exclude_modules task_type init_r
layer_replication trainable_token_indices target_parameters ensure_weight_tying save_projection
alora_invocation_tokens loftq_config use_qalora
"""


def reports_or_refuses(folder, base):
    with suppress(FormatError):
        adapter(folder, base)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS.split())
def test_settings_of_any_kind_are_reported_or_refused(tmp_path, key):
    base = write_base(tmp_path / "base")
    for value in VALUES:
        folder = write_peft(tmp_path / "adapter", said=settings(**{key: value}))
        reports_or_refuses(folder, base)


@pytest.mark.slow
def test_settings_of_mlx_lm_of_any_kind_are_reported_or_refused(tmp_path):
    base = write_base(tmp_path / "base")
    for key, value in itertools.product(("rank", "scale", "keys", "alpha", "dropout"), VALUES):
        reports_or_refuses(write_mlx(tmp_path / "adapter", **{key: value}), base)


@needs("lycoris")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_lycoris_saves_is_right(tmp_path):
    torch, lycoris = optional("torch"), optional("lycoris")
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6), "v": torch.nn.Linear(4, 4)})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=3, algo="lora")
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {})
    report = adapter(tmp_path / "a.safetensors", None, ["lycoris"])
    assert report.exit_status == 0
    ranks = {e.figures["rank"] for e in report.entries if "rank" in e.figures}
    scales = {e.figures["scale"] for e in report.entries if "rank" in e.figures}
    assert (ranks, scales) == ({2}, {1.5})
    assert np.isfinite([e.figures["norm"] for e in report.entries if "norm" in e.figures]).all()
