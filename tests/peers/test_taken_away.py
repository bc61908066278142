"""What is trained here is the same in PEFT, mlx-lm and llama.cpp, and what these train is here.

By the commands that a person gives, in float32, and by the libraries as they are. How far logits
may differ is what rounding does: its standard deviation is sampled, as in test_gguf.
"""

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from calculus import record_worst, same_bits
from extras import optional

from minilora.cli.main import main
from minilora.io import reference_models
from minilora.io.formats import peft
from minilora.io.loading import open_adapted, open_base, open_base_of
from minilora.spec.lora import TrainableSpec, merge
from minilora.spec.models import Batch, logits, loss
from minilora.spec.target_modules import LoraConfig
from minilora.training import data
from minilora.verify.core.dtypes import Precision
from minilora.verify.core.tolerance import noisy, spread
from minilora.verify.core.types import MONTE_CARLO, Comparison

ROOT = Path(__file__).parent.parent.parent
SAMPLES = 12
FLOAT32 = Precision("float32", "float32")
BASE = reference_models.folder() / "llama" / "base"
TRICKY = [
    "",
    "  two  spaces\n\n\tand a tab ",
    "don't I'LL we'Ve 3.14e-5, 1234567 ½ x²",
    "naïve café — 東京 🙂 e\u0301 \u200d ﷽ \x00",
    " a\r\n b\n",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|> <s>",
    "def f(x):\n    return x ** 2\n",
]
CHATS = [
    [{"role": "user", "content": "Who writes? <é>&amp;\n"}],
    [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": " 12 + 34? "},
        {"role": "assistant", "content": "46"},
    ],
]


def batch_of(c):
    return Batch(np.random.default_rng(5).integers(0, c.vocab, (2, 9)))


def judged(found, f, W):
    """How found compares with f(W) in float64, where rounding to float32 is allowed.

    σ is sampled: f's own code, with a random rounding after each operation.
    """
    exact = {name: np.asarray(array, np.float64) for name, array in W.items()}
    wanted = {"it": f(exact)}

    def run(rng):
        return {"it": f({name: noisy(W[name], FLOAT32, rng) for name in exact})}

    sigma = spread(run, wanted, SAMPLES, [0])["it"]
    return Comparison("it", found, wanted["it"], sigma, MONTE_CARLO).judge()


def logits_of(c, tuning, merged=False):
    """The specification's logits, a function of the weights; by weights merged first."""

    def f(W):
        own, told = (merge(W, tuning), TrainableSpec()) if merged else (W, tuning)
        return logits(batch_of(c), own, c, told)[0]

    return f


def holds(what, found, model, merged=False):
    """The logits found are the adapted model's, and neither the base's nor at half the scale."""
    c, W, tuning = model.base.config, dict(model.weights), model.tuning
    result = judged(found, logits_of(c, tuning, merged), W)
    record_worst(f"{what}, in standard deviations", result.z)
    half = replace(tuning, scale={at: s / 2 for at, s in tuning.scale.items()})
    for wrong in (half, without(tuning)):
        assert judged(found, logits_of(c, wrong, merged), W).verdict == "fail"
    return result.verdict == "pass"


def without(tuning):
    """The base alone, with the adapters' arrays beside it."""
    return replace(tuning, scale=dict.fromkeys(tuning.scale, 0.0))


STEPS = ["--max-steps=12", "--learning-rate=0.02", "--rank=4", "--target-modules=q,v,down"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder: a run of the reference model, and what the commands make of it."""
    folder = tmp_path_factory.mktemp("taken")
    out = str(folder / "run")
    assert main(["train", "--output", out, *STEPS]) == 0
    assert main(["convert", out, "--to", "mlx", "--output", str(folder / "mlx")]) == 0
    assert main(["merge", "--adapter", out, "--output", str(folder / "merged")]) == 0
    return folder


@pytest.fixture
def adapted(trained):
    return open_adapted(open_base("reference:llama"), str(trained / "run"))


def torch_libraries():
    names = ("torch", "transformers", "peft")
    found = SimpleNamespace(**{name: optional(name) for name in names})
    found.transformers.utils.logging.disable_progress_bar()
    return found


def by_transformers(libraries, folder, adapter=None):
    torch = libraries.torch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT takes the ranks that AdaLoRA has left for LoRA's, warns, and then goes by them.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        model = libraries.transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        )
        if adapter is not None:
            model = libraries.peft.PeftModel.from_pretrained(model, adapter)
    return torch_logits(libraries, model.eval())


def torch_logits(libraries, model):
    ids = libraries.torch.from_numpy(batch_of(open_base("reference:llama").config).ids)
    with libraries.torch.no_grad():
        z = model(input_ids=ids).logits.numpy()
    return z.reshape(-1, z.shape[-1]).T


def test_peft_finds_the_model_on_which_an_adapter_was_trained(trained, tmp_path, monkeypatch):
    libraries, out = torch_libraries(), tmp_path / "run"
    steps = ["--max-steps=2", "--rank=4", "--data=task:running-sum", "--target-modules=q"]
    assert main(["train", "--model", str(BASE), "--output", str(out), *steps]) == 0
    auto = libraries.peft.AutoPeftModelForCausalLM
    monkeypatch.setattr(warnings, "warn", lambda *given, **options: None)  # of transformers' own
    z = torch_logits(libraries, auto.from_pretrained(out, dtype=libraries.torch.float32).eval())
    assert np.array_equal(z, by_transformers(libraries, BASE, out))
    named = [
        json.loads((run / "adapter_config.json").read_text()) for run in (out, trained / "run")
    ]
    # A model that comes with this package lies where nobody else has it.
    assert [each["base_model_name_or_path"] for each in named] == [str(BASE), None]


@pytest.mark.parametrize("variant", ["adalora", "loftq", "dora-full"])
def test_peft_gives_the_logits_of_a_variant_trained_here(variant, tmp_path):
    libraries, out = torch_libraries(), str(tmp_path / "run")
    assert main(["train", "--output", out, "--variant", variant, *STEPS]) == 0
    base = open_base_of(None, out)
    # LoftQ's base is the quantized one, which lies beside the adapter.
    assert (base.path == BASE) == (variant != "loftq")
    z = by_transformers(libraries, base.path, out)
    # Noise is sampled of a merged DoRA: beside its weight it would need that as an array.
    merged, read = variant == "dora-full", open_adapted(base, out)
    assert holds(f"PEFT's logits of {variant}, trained here", z, read, merged)
    if variant == "loftq":
        elsewhere = by_transformers(libraries, BASE, out)
        f = logits_of(base.config, read.tuning)
        assert judged(elsewhere, f, dict(read.weights)).verdict == "fail"


def test_transformers_gives_the_logits_of_a_merged_model(trained, adapted):
    z = by_transformers(torch_libraries(), trained / "merged")
    assert holds("transformers' logits, merged here", z, adapted, merged=True)


@pytest.mark.very_slow
def test_a_real_model_merged_from_gguf_is_a_whole_model_in_transformers(tmp_path):
    """SmolLM2's file: weights, tokenizer and chat template, by a folder that names no GGUF."""
    import test_gguf

    libraries = torch_libraries()
    base = open_base(str(test_gguf.smollm2()))
    c, ats = base.config, [f"layers.{i}.{at}" for i in (0, 29) for at in ("q", "v", "down")]
    V, tuning = test_gguf.factors(c, dict.fromkeys(ats, 8), dict.fromkeys(ats, 0.25))
    chosen = LoraConfig(r=8, lora_alpha=2, target_modules=ats)
    peft.write_adapter(tmp_path / "a", c, V, tuning, chosen)
    out = tmp_path / "merged"
    options = ["--model", str(base.path), "--adapter", str(tmp_path / "a"), "--output", str(out)]
    assert main(["merge", *options]) == 0
    theirs, ours = libraries.transformers.AutoTokenizer.from_pretrained(out), base.tokenizer
    for text in TRICKY:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids
    for chat in CHATS:
        for generate in (True, False):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
            assert ours.chat(chat, generate) == text
    names = ("bos", "eos", "unk", "pad")
    assert {
        n: getattr(theirs, f"{n}_token") for n in names if n in ours.special_tokens
    } == ours.special_tokens
    torch = libraries.torch
    model = libraries.transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert model.generation_config.eos_token_id == [*ours.stop_ids]
    ids = np.array(theirs("The capital of France is Paris; of Italy, Rome.").input_ids)
    with torch.no_grad():
        z = model.eval()(torch.from_numpy(ids)[None]).logits[0].numpy().T
    merged = merge({**base.weights, **V}, tuning)
    wanted, sigma = test_gguf.real_and_pooled(c, dict(merged), TrainableSpec(), ids)
    result = Comparison("it", z, wanted, sigma, MONTE_CARLO).judge()
    record_worst("transformers' logits of SmolLM2 merged here, in standard deviations", result.z)
    assert result.verdict == "pass"
    plain = logits(Batch(ids[None]), base.weights, c, TrainableSpec())[0]
    assert Comparison("it", plain, wanted, sigma, MONTE_CARLO).judge().verdict == "fail"


def test_what_peft_has_trained_is_read_here(tmp_path):
    libraries = torch_libraries()
    torch = libraries.torch
    torch.manual_seed(0)
    model = libraries.transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    names = ["q_proj", "o_proj", "gate_proj"]
    chosen = libraries.peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=names, task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = libraries.peft.get_peft_model(model, chosen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for rows in np.split(examples(64), 8):
        ids = torch.from_numpy(rows)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "a")
    z = torch_logits(libraries, model.eval())
    read = open_adapted(open_base("reference:llama"), str(tmp_path / "a"))
    assert read.format.name == "peft"
    assert holds("PEFT's logits, trained by PEFT", z, read)


def examples(n):
    """Sequences of the task that the reference model has not learned; all are as long."""
    base = open_base("reference:llama")
    read = data.read("task:running-difference", "lm", base.tokenizer, 32)
    rows = [e.ids for e in read.train]
    return np.array([row for row in rows if len(row) == len(rows[0])][:n])


def mlx_model(adapter=None):
    """The base, whose rotation mlx-lm has to be told, as test_findings has it."""
    optional("mlx_lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    theta = open_base("reference:llama").config.theta
    model, _ = load_model(BASE, model_config={"rope_theta": theta})
    return model if adapter is None else load_adapters(model, str(adapter))


def mlx_logits(model):
    from mlx import core as mx

    model.eval()
    z = np.array(model(mx.array(batch_of(open_base("reference:llama").config).ids)))
    return z.reshape(-1, z.shape[-1]).T


def test_mlx_lm_gives_the_logits_of_what_was_trained_here(trained, adapted):
    z = mlx_logits(mlx_model(trained / "mlx"))
    assert holds("mlx-lm's logits, trained here", z, adapted)


def test_what_mlx_lm_has_trained_is_read_here(tmp_path):
    model = mlx_model()
    from mlx import optimizers
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    chosen = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, 2, chosen)
    rows = [(row.tolist(), 0) for row in examples(16)]
    given = TrainingArgs(batch_size=4, iters=8, adapter_file=str(tmp_path / "adapters.safetensors"))
    train(model, optimizers.Adam(learning_rate=0.02), rows, None, given)
    said = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": chosen}
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    read = open_adapted(open_base("reference:llama"), str(tmp_path))
    assert read.format.name == "mlx"
    assert holds("mlx-lm's logits, trained by mlx-lm", mlx_logits(model), read)


def test_llama_cpp_gives_the_logits_of_what_was_trained_here(trained, adapted, tmp_path):
    import test_gguf

    base = open_base("reference:llama")
    c, ids = base.config, batch_of(base.config).ids
    out = tmp_path / "a.gguf"
    assert main(["convert", str(trained / "run"), "--to", "gguf", "--output", str(out)]) == 0
    test_gguf.gguf_files.write_model(tmp_path / "m.gguf", c, dict(base.weights))
    parts = [test_gguf.by_llama_cpp(tmp_path / "m.gguf", row, out) for row in ids]
    assert holds("llama.cpp's logits, trained here", np.concatenate(parts, 1), adapted)


def test_peft_trains_on_from_where_it_was(trained, adapted, tmp_path):
    torch_libraries()
    rows = examples(32)
    lines = "".join(json.dumps({"ids": row.tolist()}) + "\n" for row in rows)
    (tmp_path / "some.jsonl").write_text(lines)
    script = [sys.executable, ROOT / "docs/continue_with_peft.py", BASE, trained / "run"]
    ended = subprocess.run(
        [*script, tmp_path / "some.jsonl", tmp_path / "out", "20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    first, last = map(float, re.findall(r"loss (\S+)", ended.stdout))
    c, W = adapted.base.config, dict(adapted.weights)

    def mean(tuning):
        return lambda W: np.atleast_1d(loss(Batch(rows, labels=rows), W, c, tuning)[0])

    assert judged(np.array([first]), mean(adapted.tuning), W).verdict == "pass"
    assert judged(np.array([first]), mean(without(adapted.tuning)), W).verdict == "fail"
    assert last < first
    # What it has saved is another adapter, with that loss.
    again = open_adapted(adapted.base, str(tmp_path / "out"))
    assert judged(np.array([last]), mean(again.tuning), dict(again.weights)).verdict == "pass"
    assert not any(
        same_bits(again.changed[name], adapted.changed[name]) for name in adapted.changed
    )
