"""Right merges, each made by the program that people use: PEFT, mlx-lm, minilora.

A case of `CASES` is called with a folder, writes there, and returns `Made`: what `audit merged` is
to be asked. None of them is allowed a deviation.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merge_catalogue.worlds import (
    BF16,
    F16,
    F32,
    adapt,
    f32,
    gpt2,
    llama,
    write_model,
)


@dataclass(frozen=True)
class Made:
    """The folders of a base, of the adapters with their weights, and of their right merge."""

    base: Path
    adapters: Sequence[Path]
    merged: Path
    weights: Sequence[float] | None = None


CASES: dict[str, Callable[[Path], Made]] = {}
"""Right merges by name: the program, the model's dtype, what is particular."""


WRONG_AS_MADE: dict[str, tuple[Callable[[Path], Made], str]] = {}
"""Merges by the same programs that are not base + adapter, and how an audit says so."""


def case(name):
    def enter(function):
        assert name not in CASES, name
        CASES[name] = function
        return function

    return enter


# --- models ---


def config_of(kind, **changes):
    import transformers as t

    llama_like = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "llama": lambda: t.LlamaConfig(**llama_like | changes),
        "qwen2": lambda: t.Qwen2Config(**llama_like | {"tie_word_embeddings": True} | changes),
        "phi3": lambda: t.Phi3Config(**llama_like | changes),
        "mixtral": lambda: t.MixtralConfig(**llama_like | {"num_local_experts": 4} | changes),
        "gpt2": lambda: t.GPT2Config(
            n_embd=48,
            n_layer=2,
            n_head=4,
            n_positions=32,
            vocab_size=96,
            bos_token_id=1,
            eos_token_id=1,
            **changes,
        ),
        "bert": lambda: t.BertConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=96,
            **changes,
        ),
        "resnet": lambda: t.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
            **changes,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            vocab_size=96,
            **changes,
        ),
    }[kind]()


CLASSES = {
    "bert": "AutoModelForSequenceClassification",
    "resnet": "AutoModelForImageClassification",
}


def model_of(kind, dtype, folder, **changes):
    """A drawn model of transformers, saved to the folder and loaded from it."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(1)
    Auto = getattr(transformers, CLASSES.get(kind, "AutoModelForCausalLM"))
    model = Auto.from_config(config_of(kind, **changes)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return Auto.from_pretrained(folder, dtype=getattr(torch, dtype))


# --- PEFT ---


def trained(model, std=0.1):
    """As after training: every trained number moved."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += (std * torch.randn(parameter.shape)).to(parameter.dtype)


def by_peft(
    folder,
    kind="llama",
    dtype="float32",
    config=None,
    peft_type="LoraConfig",
    safe=False,
    autocast=True,
    anew=True,
    model=None,
    save=None,
    shard=None,
    **settings,
):
    """Draw an adapter as if trained, save it, load it anew, merge it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(kind, dtype, folder / "base", **(model or {}))
        settings = {"target_modules": "all-linear"} | settings
        config = config or getattr(peft, peft_type)(**settings)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast)
        trained(adapted)
        adapted.save_pretrained(folder / "adapter", **(save or {}))
        if anew:
            again = type(model).from_pretrained(folder / "base", dtype=model.dtype)
            adapted = peft.PeftModel.from_pretrained(
                again, folder / "adapter", autocast_adapter_dtype=autocast
            )
        merged = adapted.merge_and_unload(safe_merge=safe)
        if "layer_replication" in settings:  # whose copies transformers does not save
            written(merged, folder / "merged")
        else:
            merged.save_pretrained(
                folder / "merged", **({"max_shard_size": shard} if shard else {})
            )
    return Made(folder / "base", [folder / "adapter"], folder / "merged")


def written(model, folder):
    """Save a model some of whose layers are the same tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(folder)


def peft_case(name, says="", **settings):
    """Enter a merge by PEFT, a wrong one if the audit has something to say of it."""

    def make(folder):
        return by_peft(folder, **settings)

    if says:
        WRONG_AS_MADE[f"peft {name}"] = make, says
    else:
        CASES[f"peft {name}"] = make


for dtype in ("float32", "bfloat16", "float16"):
    for safe in (False, True):
        for autocast in (True, False):
            peft_case(
                f"{dtype}{' safe' * safe}{'' if autocast else ' adapter as base'}",
                dtype=dtype,
                safe=safe,
                autocast=autocast,
                r=8,
                lora_alpha=12,
            )
    for rank in (1, 64):
        peft_case(f"{dtype} rank {rank}", dtype=dtype, r=rank, lora_alpha=rank, autocast=False)
    peft_case(f"{dtype} rslora", dtype=dtype, r=8, lora_alpha=12, use_rslora=True)
    peft_case(f"{dtype} dora", dtype=dtype, r=4, lora_alpha=6, use_dora=True)
    peft_case(f"{dtype} dora safe", dtype=dtype, r=4, lora_alpha=6, use_dora=True, safe=True)
    peft_case(f"{dtype} dora adapter as base", dtype=dtype, r=4, use_dora=True, autocast=False)
    peft_case(f"{dtype} conv1d", kind="gpt2", dtype=dtype, r=4, lora_alpha=6, fan_in_fan_out=True)
    # The head is tied to the table. PEFT adapts the table's rows alone, but merges both.
    peft_case(
        f"{dtype} tied tables",
        says="tied",
        kind="gpt2",
        dtype=dtype,
        r=4,
        fan_in_fan_out=True,
        target_modules=["wte", "wpe", "c_attn"],
    )
    peft_case(
        f"{dtype} positions",
        kind="gpt2",
        dtype=dtype,
        r=4,
        fan_in_fan_out=True,
        target_modules=["wpe", "c_attn"],
    )
    peft_case(
        f"{dtype} table of its own",
        dtype=dtype,
        r=4,
        autocast=False,
        target_modules=["embed_tokens", "q_proj"],
    )
    peft_case(f"{dtype} head", dtype=dtype, r=4, target_modules=["lm_head", "q_proj"])
    peft_case(
        f"{dtype} lora_bias",
        kind="qwen2",
        dtype=dtype,
        r=4,
        lora_alpha=6,
        lora_bias=True,
        target_modules=["q_proj", "k_proj", "v_proj"],
    )
    peft_case(
        f"{dtype} adalora",
        dtype=dtype,
        peft_type="AdaLoraConfig",
        init_r=6,
        target_r=4,
        total_step=10,
        lora_alpha=9,
        target_modules=["q_proj", "down_proj"],
    )
    peft_case(
        f"{dtype} vera",
        dtype=dtype,
        peft_type="VeraConfig",
        r=8,
        target_modules=["q_proj", "k_proj", "o_proj"],
    )
    peft_case(f"{dtype} conv2d", kind="resnet", dtype=dtype, r=4, target_modules=["convolution"])
    peft_case(
        f"{dtype} modules_to_save",
        dtype=dtype,
        r=4,
        modules_to_save=["lm_head"],
        target_modules=["q_proj"],
    )
    peft_case(
        f"{dtype} tokens",
        dtype=dtype,
        r=4,
        trainable_token_indices=[3, 9],
        target_modules=["q_proj"],
    )

peft_case(
    "patterns",
    r=8,
    lora_alpha=12,
    rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16},
    alpha_pattern={"v_proj": 3, "q_proj": 7},
)
peft_case(
    "tokens tied", kind="qwen2", r=4, trainable_token_indices=[3, 9], target_modules=["q_proj"]
)
peft_case(
    "tokens by module",
    r=4,
    trainable_token_indices={"embed_tokens": [3, 9]},
    target_modules=["q_proj"],
)
peft_case("bias all", kind="qwen2", r=4, bias="all", target_modules=["q_proj", "o_proj"])
peft_case("bias lora_only", kind="qwen2", r=4, bias="lora_only", target_modules=["q_proj"])
peft_case("classifier", kind="bert", r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
peft_case(
    "classifier bfloat16",
    kind="bert",
    dtype="bfloat16",
    r=4,
    use_rslora=True,
    target_modules=["query", "value", "dense"],
    modules_to_save=["classifier"],
)
peft_case("fused", kind="phi3", dtype="bfloat16", r=4)
peft_case("gpt_neox", kind="gpt_neox", dtype="float16", r=4)
peft_case(
    "experts' attention", kind="mixtral", dtype="bfloat16", r=4, target_modules=["q_proj", "v_proj"]
)
peft_case(
    "experts",
    kind="mixtral",
    r=4,
    target_modules=["q_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
)
# The copies of a layer share one weight, into which PEFT adds the changes of all of them.
peft_case(
    "replicated layers",
    says="model.layers.1.self_attn.q_proj",
    r=4,
    layer_replication=[[0, 2], [1, 2]],
    target_modules=["q_proj"],
)
peft_case("pissa as trained", r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"])
peft_case("olora as trained", r=4, init_lora_weights="olora", target_modules=["q_proj", "v_proj"])
peft_case("tied table", says="tied", kind="qwen2", r=4, target_modules=["embed_tokens", "q_proj"])
# Here both have an adapter, and the one weight that they share gets both changes.
peft_case(
    "tied table and head",
    says="the change is applied by 2",
    kind="qwen2",
    r=4,
    target_modules=["embed_tokens", "q_proj"],
    ensure_weight_tying=True,
)
peft_case(
    "tied saved table",
    kind="qwen2",
    r=4,
    target_modules=["q_proj"],
    modules_to_save=["embed_tokens"],
    ensure_weight_tying=True,
)
peft_case(
    "tied tokens",
    kind="qwen2",
    r=4,
    target_modules=["q_proj"],
    trainable_token_indices=[3, 9],
    ensure_weight_tying=True,
)
peft_case("excluded", r=4, exclude_modules=["down_proj"], dtype="bfloat16")
peft_case("layers_to_transform", r=4, layers_to_transform=[1], target_modules=["q_proj"])
peft_case("in shards", r=4, dtype="bfloat16", shard="60KB")
peft_case(
    "dora conv1d",
    kind="gpt2",
    r=4,
    use_dora=True,
    fan_in_fan_out=True,
    target_modules=["c_attn", "c_fc"],
)
peft_case("dora table", r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])
peft_case("dora rslora bfloat16", dtype="bfloat16", r=9, use_dora=True, use_rslora=True)
peft_case("orthogonal", r=4, init_lora_weights="orthogonal")
peft_case("gaussian", r=4, init_lora_weights="gaussian", dtype="float16")


def converted(kind):
    """PiSSA or OLoRA as PEFT converts them to LoRA of the whole base (rank 2 r)."""

    def make(folder):
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_of("llama", "float32", folder / "base")
            config = peft.LoraConfig(
                r=4,
                lora_alpha=6,
                init_lora_weights=kind,
                target_modules=["q_proj", "v_proj", "down_proj"],
            )
            adapted = peft.get_peft_model(model, config)
            adapted.peft_config["default"].init_lora_weights = True
            adapted.save_pretrained(folder / "start")
            adapted.peft_config["default"].init_lora_weights = kind
            trained(adapted)
            adapted.save_pretrained(
                folder / "adapter", path_initial_model_for_weight_conversion=folder / "start"
            )
            again = type(model).from_pretrained(folder / "base")
            loaded = peft.PeftModel.from_pretrained(again, folder / "adapter")
            loaded.merge_and_unload().save_pretrained(folder / "merged")
        return Made(folder / "base", [folder / "adapter"], folder / "merged")

    return make


case("peft pissa converted")(converted("pissa"))
case("peft olora converted")(converted("olora"))


def several(how, dtype="float32", **options):
    """Two adapters: merged one after the other, or combined by add_weighted_adapter."""

    def make(folder):
        import peft

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_of("llama", dtype, folder / "base")
            configs = {"a": {"r": 4, "lora_alpha": 6}, "b": {"r": 8, "lora_alpha": 10}}
            adapted = None
            for name, values in configs.items():
                config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], **values)
                if adapted is None:
                    adapted = peft.get_peft_model(model, config, adapter_name=name)
                else:
                    adapted.add_adapter(name, config)
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    import torch

                    parameter.data += (0.1 * torch.randn(parameter.shape)).to(parameter.dtype)
            adapted.save_pretrained(folder / "adapters")
            paths, weights = [folder / "adapters" / name for name in configs], None
            if how == "sequence":
                merged = adapted.merge_and_unload(adapter_names=list(configs))
            else:
                weights = [0.7, 0.4]
                adapted.add_weighted_adapter(["a", "b"], weights, "c", combination_type="cat")
                adapted.set_adapter("c")
                merged = adapted.merge_and_unload(adapter_names=["c"])
            merged.save_pretrained(folder / "merged")
        return Made(folder / "base", paths, folder / "merged", weights)

    return make


for dtype in ("float32", "bfloat16", "float16"):
    case(f"peft two in sequence {dtype}")(several("sequence", dtype))
    case(f"peft two combined {dtype}")(several("cat", dtype))


# --- other programs, on the drawn worlds ---


def of_world(make, change, dtype=None):
    """Write the world, and what ``change(world)`` merges of it."""

    def made(folder):
        world = make()
        base, adapter = world.write(folder)
        write_model(folder / "merged", change(world), world.config)
        return Made(base, [adapter], folder / "merged")

    return made


def other_order(world):
    """W.to(float32) + s (Aᵀ Bᵀ)ᵀ by torch's addmm into the weight, as unsloth merges."""
    import torch

    M = dict(world.base)
    for t in world.sites:
        W = f32(M[t.weight])
        W = torch.from_numpy(np.ascontiguousarray(W.T))  # (in, out)
        A, B = torch.from_numpy(t.A.T.copy()), torch.from_numpy(t.B.T.copy())
        W = torch.addmm(W, A, B, alpha=float(t.s)).numpy().T
        M[t.weight] = np.ascontiguousarray(W.astype(M[t.weight].dtype))
    return M


def scaled_first(world):
    """W + (s B) A, summed from the last rank to the first."""

    def change(t, W):
        B = np.float32(t.s) * t.B
        total = W.copy()
        for i in reversed(range(t.r)):
            total += np.outer(B[:, i], t.A[i])
        return total

    return world.merge(change)


def in_float64(world):
    """In float64, then cast once."""
    M = dict(world.base)
    for t in world.sites:
        delta = t.s * (t.B.astype(float) @ t.A.astype(float))
        W = np.asarray(M[t.weight]).astype(float) + (delta.T if t.transposed else delta)
        M[t.weight] = W.astype(M[t.weight].dtype)
    return M


def rounded_delta(world):
    """The change rounded to the base's dtype, then added in it."""
    M = dict(world.base)
    for t in world.sites:
        W = M[t.weight]
        delta = (t.delta.T if t.transposed else t.delta).astype(W.dtype)
        M[t.weight] = W + delta
    return M


ORDERS = {
    "unsloth's order": other_order,
    "another order": scaled_first,
    "float64": in_float64,
    "rounded change": rounded_delta,
}
for label, dtype in (("float32", F32), ("bfloat16", BF16), ("float16", F16)):
    for order, change in ORDERS.items():
        for size, effect in (("huge", 4.0), ("usual", 0.05), ("below half a unit", 2.0**-11)):
            case(f"{order} {label} {size}")(
                of_world(
                    lambda dtype=dtype, effect=effect: adapt(llama(dtype), r=16, effect=effect),
                    change,
                )
            )
    case(f"unsloth's order {label} adapter as base")(
        of_world(lambda dtype=dtype: adapt(llama(dtype), r=16, dtype=dtype), other_order)
    )


def by_minilora(dtype, make=llama):
    """minilora's own merge command."""

    def made(folder):
        from minilora.cli.main import main

        world = adapt(make(dtype), r=4, targets=r"(q_proj|v_proj|down_proj|c_attn)$")
        base, adapter = world.write(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (base / name).unlink()
        status = main(
            [
                "merge",
                "--model",
                str(base),
                "--adapter",
                str(adapter),
                "--output",
                str(folder / "merged"),
            ]
        )
        assert not status, status
        return Made(base, [adapter], folder / "merged")

    return made


for label, dtype in (("float32", F32), ("bfloat16", BF16), ("float16", F16)):
    case(f"minilora merge {label}")(by_minilora(dtype))
case("minilora merge conv1d")(by_minilora(F32, gpt2))


def by_mlx(dtype, **lora):
    """mlx-lm's fuse of an adapter that mlx-lm would have trained, in its own folder."""

    def made(folder):
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm import fuse as command
        from mlx_lm.tuner.utils import linear_to_lora_layers
        from mlx_lm.utils import load

        world = llama({"float32": F32, "bfloat16": BF16, "float16": F16}[dtype])
        write_model(folder / "base", world.base, world.config, tokenizer=False)
        tokenizer(folder / "base")
        model, _ = load(str(folder / "base"))
        mx.random.seed(3)
        parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0} | lora.get("parameters", {})
        config = {
            "fine_tune_type": lora.get("kind", "lora"),
            "num_layers": 3,
            "lora_parameters": parameters,
        }
        model.freeze()
        linear_to_lora_layers(model, 3, parameters, use_dora=config["fine_tune_type"] == "dora")
        tensors = dict(tree_flatten(model.trainable_parameters()))
        tensors = {
            n: v + 0.05 * mx.random.normal(v.shape).astype(v.dtype) for n, v in tensors.items()
        }
        (folder / "adapter").mkdir()
        mx.save_safetensors(str(folder / "adapter" / "adapters.safetensors"), tensors)
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        import sys
        from unittest.mock import patch

        arguments = [
            "fuse",
            "--model",
            str(folder / "base"),
            "--adapter-path",
            str(folder / "adapter"),
            "--save-path",
            str(folder / "merged"),
        ]
        with patch.object(sys, "argv", arguments):
            command.main()
        return Made(folder / "base", [folder / "adapter"], folder / "merged")

    return made


def tokenizer(folder):
    """A tokenizer of words, which mlx-lm wants to load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["[UNK]", "<s>", "</s>", *(chr(97 + i) for i in range(26))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


for dtype in ("float32", "bfloat16", "float16"):
    case(f"mlx-lm fuse {dtype}")(by_mlx(dtype))
case("mlx-lm fuse dora")(by_mlx("float32", kind="dora"))


if __name__ == "__main__":
    import sys
    import tempfile
    import time
    import traceback

    from minilora.audit.merged import merged as audit_merged

    alarms = 0
    for name in CASES:
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            try:
                made = CASES[name](Path(place))
            except Exception as error:
                print(f"NOT MADE {name}: {error!r}"[:400])
                traceback.print_exc(limit=-2)
                continue
            spent = time.monotonic() - began
            try:
                report = audit_merged(made.base, made.adapters, made.merged, made.weights)
            except Exception as error:
                print(f"ERROR {name}: {error!r}"[:600])
                continue
            from collections import Counter

            verdicts = dict(Counter(e.verdict for e in report.entries))
            bad = [e for e in report.entries if e.severity not in ("ok", "note")]
            alarms += report.exit_status != 0
            print(
                f"{'ok' if not report.exit_status else 'ALARM'} {name} ({spent:.1f} s) {verdicts}",
                flush=True,
            )
            for e in bad[:2]:
                print("    ", e.verdict, e.mistake, e.subject, e.text[:250])
    print("alarms", alarms)
