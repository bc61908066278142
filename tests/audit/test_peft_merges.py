"""Models that PEFT has merged, audited: each is right, and wrong when something is left out."""

import json
import shutil

import numpy as np
import pytest
from extras import needs, optional
from peft_merges import causal_model, drawn_model, layers, merge_by_peft
from safetensors.numpy import load_file, save_file

from minilora.audit.merged import merged
from minilora.io.reference_models import folder

pytestmark = [
    needs("peft", "transformers"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of PEFT and transformers, of one another
]

T = ["q_proj", "v_proj", "up_proj"]


def model(name):
    return causal_model(folder() / name / "base")


def qwen2():
    return drawn_model("qwen2")


def mixtral():
    return drawn_model("mixtral", num_local_experts=3, num_experts_per_tok=2)


CASES = {
    "LoRA": (model, "llama", {"target_modules": "all-linear"}),
    "rsLoRA": (model, "llama", {"use_rslora": True, "target_modules": T}),
    "patterns": (model, "llama", {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 3},
        "alpha_pattern": {"up_proj": 5, "^model.layers.0.self_attn.v_proj": 9},
        "target_modules": T,
    }),
    "DoRA": (model, "llama", {"use_dora": True, "target_modules": "all-linear"}),
    "DoRA of Conv1D": (model, "gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "DoRA of a table": (model, "llama", {"use_dora": True, "target_modules": ["embed_tokens"]}),
    "PiSSA": (model, "llama", {"init_lora_weights": "pissa", "target_modules": T}),
    "OLoRA": (model, "llama", {"init_lora_weights": "olora", "target_modules": T}),
    "Conv1D": (model, "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "lora_bias": (qwen2, None, {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}),
    "bias all": (model, "gpt2", {"bias": "all", "target_modules": ["c_attn"]}),
    "bias lora_only": (qwen2, None, {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}),
    "tables": (model, "llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tokens": (model, "llama", {"trainable_token_indices": [1, 5], "target_modules": T}),
    "tokens of a tie": (model, "gpt2", {
        "trainable_token_indices": [1, 5], "target_modules": ["c_attn"],
    }),
    "tokens of two tables": (model, "llama", {
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}, "target_modules": T,
    }),
    "saved": (model, "llama", {"modules_to_save": ["lm_head", "norm"], "target_modules": T}),
    "saved of a tie": (model, "gpt2", {"modules_to_save": ["wte"], "target_modules": ["c_attn"]}),
    "a parameter": (model, "llama", {
        "target_modules": [], "target_parameters": ["self_attn.q_proj.weight"],
    }),
    "experts": (mixtral, None, {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }),
    "convolutions": (layers, None, {
        "target_modules": ["line", "plane", "space", "table", "linear"],
    }),
    "DoRA of convolutions": (layers, None, {
        "use_dora": True, "target_modules": ["line", "plane", "space"],
    }),
    "AdaLoRA": (model, "llama", {
        "peft_type": "AdaLoraConfig", "init_r": 5, "target_r": 3, "lora_alpha": 6,
        "total_step": 10, "target_modules": T,
    }),
    "VeRA": (model, "llama", {"peft_type": "VeraConfig", "r": 5, "target_modules": T}),
    "VeRA, drawn": (model, "llama", {
        "peft_type": "VeraConfig", "r": 5, "save_projection": False, "target_modules": T,
    }),
    "VeRA of Conv1D": (model, "gpt2", {
        "peft_type": "VeraConfig", "r": 5, "target_modules": ["c_attn", "c_proj", "c_fc"],
    }),
}  # fmt: skip


def config_of(settings):
    peft, settings = optional("peft"), dict(settings)
    kind = settings.pop("peft_type", "LoraConfig")
    if kind == "LoraConfig":
        settings = {"r": 4, "lora_alpha": 6, **settings}
    return getattr(peft, kind)(**settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What PEFT merges of a case; made once."""
    folders = {}

    def make(name):
        if name not in folders:
            build, argument, settings = CASES[name]
            base = build() if argument is None else build(argument)
            out = tmp_path_factory.mktemp("case")
            folders[name] = merge_by_peft(out, base, config_of(settings))
        return folders[name]

    return make


def wrong_in(report):
    return [(e.subject, e.verdict, e.text) for e in report.entries if e.severity not in RIGHT]


RIGHT = ("ok", "note")


@pytest.mark.parametrize("name", CASES)
def test_what_peft_merges_is_right(made, name):
    out = made(name)
    report = merged(out / "base", out / "adapter", out / "merged")
    assert wrong_in(report) == []
    assert report.exit_status == 0
    changed = [e for e in report.entries if e.verdict in ("exact", "within", "rounded-away")]
    assert changed
    names = {entry.subject for entry in report.entries}
    assert load_file(out / "merged" / "model.safetensors").keys() <= names  # none is passed over


@pytest.mark.parametrize("name", CASES)
def test_another_factor_deviates(made, name):
    out = made(name)
    report = merged(out / "base", out / "adapter", out / "merged", weights=[1.5])
    assert report.exit_status == 1


@pytest.mark.parametrize("name", CASES)
def test_the_base_itself_deviates(made, name):
    out = made(name)
    report = merged(out / "base", out / "adapter", out / "base")
    assert report.exit_status == 1
    verdicts = {entry.verdict for entry in report.entries if entry.severity == "deviation"}
    assert "not-applied" in verdicts


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("safe", [False, True])
def test_in_every_dtype_and_with_safe_merge(tmp_path, dtype, safe):
    base = causal_model(folder() / "llama" / "base", dtype)
    out = merge_by_peft(tmp_path, base, config_of({"target_modules": T}), safe=safe)
    report = merged(out / "base", out / "adapter", out / "merged")
    assert {entry.verdict for entry in report.entries} == {"exact", "unchanged"}


def test_a_tensor_left_out_is_named(made, tmp_path):
    out = made("LoRA")
    shutil.copytree(out / "merged", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    tensors, base = load_file(file), load_file(out / "base" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: base[name]}, file, {"format": "pt"})
    report = merged(out / "base", out / "adapter", tmp_path / "merged")
    assert report.exit_status == 1
    assert [found[:2] for found in wrong_in(report)] == [(name, "not-applied")]
    assert name in report.cause


@pytest.mark.parametrize(("target", "subject"), [
    ("wte", "lm_head.weight"), ("lm_head", "transformer.wte.weight"),
])  # fmt: skip
def test_a_tied_head_has_to_be_untied(tmp_path, target, subject):
    config = config_of({"target_modules": [target, "c_attn"]})
    out = merge_by_peft(tmp_path, model("gpt2"), config)
    report = merged(out / "base", out / "adapter", out / "merged")
    [wrong] = [entry for entry in report.entries if entry.severity == "deviation"]
    assert (wrong.subject, wrong.verdict, wrong.mistake) == (subject, "changed", "tied-head")


def test_a_change_that_peft_ties_is_merged_twice(tmp_path):
    """Both uses add it to the one weight: the audit measures a factor of 2."""
    config = config_of({"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True})
    out = merge_by_peft(tmp_path, drawn_model("llama", tie_word_embeddings=True), config)
    file = out / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)  # what was drawn for the two uses apart is loaded as the head's
    head = {p: tensors[f"base_model.model.lm_head.lora_{p}.weight"] for p in "AB"}
    table = "base_model.model.model.embed_tokens.lora_embedding_"
    twins = {f"{table}A": head["B"].T.copy(), f"{table}B": head["A"].T.copy()}
    save_file({**tensors, **twins}, file)
    report = merged(out / "base", out / "adapter", out / "merged")
    wrong = {e.subject: e for e in report.entries if e.severity == "deviation"}
    assert {*wrong} == {"lm_head.weight", "model.embed_tokens.weight"}
    for entry in wrong.values():
        assert entry.verdict == "factor"
        assert abs(entry.figures["factor"] - 2) <= entry.figures["factor_error"] < 1e-3


def test_what_adalora_has_pruned_is_no_change(made, tmp_path):
    """PEFT cuts the ranks that rank_pattern leaves out, of one module all of them."""
    peft, out = optional("peft"), made("AdaLoRA")
    shutil.copytree(out / "adapter", tmp_path / "a")
    file, config = (tmp_path / "a" / name for name in ("adapter_model.safetensors",
                                                       "adapter_config.json"))  # fmt: skip
    tensors, kept, pattern = load_file(file), [True, False, True, True, False], {}
    for name in [name for name in tensors if name.endswith(".lora_E")]:
        rows = np.array(kept)
        for part, axis in (("A", 0), ("B", 1), ("E", 0)):
            place = name[:-1] + part
            tensors[place] = np.ascontiguousarray(np.compress(rows, tensors[place], axis))
        pattern[name.removeprefix("base_model.model.")] = kept
    save_file(tensors, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": pattern}))
    loaded = peft.PeftModel.from_pretrained(causal_model(out / "base"), tmp_path / "a")
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert wrong_in(merged(out / "base", tmp_path / "a", tmp_path / "merged")) == []
    assert merged(out / "base", out / "adapter", tmp_path / "merged").exit_status == 1


def test_a_converted_start_is_an_adapter_of_the_doubled_rank(made, tmp_path):
    """PiSSA's folder beside its conversion: W - s B0 A0 + s B A as one change of W."""
    peft, out = optional("peft"), made("PiSSA")
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    shutil.copytree(out / "adapter", tmp_path / "adapter")
    from minilora.audit.changes import read_changes
    from minilora.audit.tensors import open_tensors

    changes = read_changes(out / "adapter", open_tensors(out / "base")).by_tensor()
    tensors = {}
    for at, (start, change) in changes.items():
        path = f"base_model.model.{at.removesuffix('.weight')}"
        A = np.concatenate([change.parts["A"], start.parts["A"]]).astype(np.float32)
        B = np.concatenate([change.parts["B"], -start.parts["B"]], 1).astype(np.float32)
        tensors |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings |= {"init_lora_weights": True, "r": 8, "lora_alpha": 12}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    base = causal_model(out / "base")
    peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(
        tmp_path / "merged"
    )
    report = merged(out / "base", tmp_path / "adapter", tmp_path / "merged")
    assert wrong_in(report) == []


def test_several_adapters_in_a_row_or_added_up(tmp_path):
    peft = optional("peft")
    base = causal_model(folder() / "llama" / "base", "bfloat16")
    one = merge_by_peft(tmp_path / "one", base, config_of({"target_modules": T}))
    base = causal_model(folder() / "llama" / "base", "bfloat16")
    two = merge_by_peft(tmp_path / "two", base, config_of({"r": 2, "target_modules": ["q_proj"]}))
    loaded = peft.PeftModel.from_pretrained(causal_model(one / "base", "bfloat16"), one / "adapter")
    loaded.load_adapter(two / "adapter", "two")
    loaded.base_model.set_adapter(["default", "two"])
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    adapters = [one / "adapter", two / "adapter"]
    assert wrong_in(merged(one / "base", adapters, tmp_path / "merged")) == []
    assert merged(one / "base", adapters[:1], tmp_path / "merged").exit_status == 1
    report = merged(one / "base", adapters, tmp_path / "merged", weights=[1, 0.5])
    assert report.exit_status == 1


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "int8"])
@needs("bitsandbytes")
def test_a_base_that_bitsandbytes_has_quantized(tmp_path, kind):
    """PEFT merges into the dequantized weight and quantizes it anew."""
    torch, transformers = optional("torch"), optional("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 192, "tie_word_embeddings": False}
    drawn_model("llama", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    if kind == "int8":
        how = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=kind == "nf4-double", bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16
    )
    out = merge_by_peft(tmp_path, base, config_of({"target_modules": T}), anew=False)
    report = merged(out / "base", out / "adapter", out / "merged")
    assert wrong_in(report) == []
    assert merged(out / "base", out / "adapter", out / "merged", weights=[3]).exit_status == 1
    assert merged(out / "base", out / "adapter", out / "base").exit_status == 1
