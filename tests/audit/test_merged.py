"""Merged models of the reference models, audited: in all formats, and what else may differ."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from extras import needs, optional
from merge_catalogue.worlds import F32, adapt, llama, write_adapter, write_model
from safetensors.numpy import load_file, save_file

from minilora.audit.changes import read_changes
from minilora.audit.merged import merged
from minilora.audit.tensors import open_tensors
from minilora.cli.main import main
from minilora.io.formats import kohya, loralib
from minilora.io.formats.peft.names import paths
from minilora.io.loading import open_adapted, open_base
from minilora.io.reference_models import folder
from minilora.spec.quantization import dequantize, quantize

REFERENCES = {name: f"reference:{name}" for name in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Merged models by minilora, as folders and as GGUF files; made once."""
    folders = {}

    def make(model, suffix=""):
        if (model, suffix) not in folders:
            out = tmp_path_factory.mktemp("merged") / f"m{suffix}"
            name = REFERENCES[model]
            names = ["--model", name, "--adapter", name, "--output", str(out)]
            assert main(["merge", *names]) == 0
            folders[model, suffix] = out
        return folders[model, suffix]

    return make


def problems(report):
    return [(e.subject, e.verdict) for e in report.entries if e.severity not in ("ok", "note")]


def tensors_of(path):
    return load_file(path / "model.safetensors")


def edited(tmp_path, path, edit):
    """A copy of a merged model with other tensors."""
    shutil.copytree(path, tmp_path / "edited")
    file = tmp_path / "edited" / "model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})
    return tmp_path / "edited"


@pytest.mark.parametrize("model", REFERENCES)
@pytest.mark.parametrize("suffix", ["", pytest.param(".gguf", marks=needs("gguf"))])
def test_what_minilora_merges_is_right(made, model, suffix):
    report = merged(REFERENCES[model], REFERENCES[model], made(model, suffix))
    assert problems(report) == []
    verdicts = {entry.verdict for entry in report.entries if entry.subject != "tokenizer"}
    assert verdicts == {"exact", "unchanged"}
    assert merged(REFERENCES[model], REFERENCES[model], made(model, suffix), [2]).exit_status == 1


def converted(tmp_path, model, form):
    """The reference model's adapter in another format; the weight of the audit."""
    base = open_base(REFERENCES[model])
    adapted = open_adapted(base, REFERENCES[model])
    if form in ("mlx", "gguf"):
        path = tmp_path / ("a.gguf" if form == "gguf" else "a")
        names = [REFERENCES[model], "--model", REFERENCES[model]]
        assert main(["convert", *names, "--to", form, "--output", str(path)]) == 0
        return path, 1.0
    path, [s] = tmp_path / "a.safetensors", {*adapted.tuning.scale.values()}
    if form == "kohya":
        tuning = replace(adapted.tuning, scale=dict.fromkeys(adapted.tuning.scale, 0.5))
        W = {n: a * (2 * s if n.endswith(".B") else 1) for n, a in adapted.changed.items()}
        W = {n: a.astype(np.float32) for n, a in W.items()}
        kohya.write_adapter(path, base.config, W, tuning, prefix="lora_unet")
        return path, 1.0
    places = paths(base.config)
    ends = {"A": loralib.ENDS[0], "B": loralib.ENDS[1]}
    save_file(
        {
            f"{places[name.rpartition('.')[0]]}.{ends[name[-1]]}": np.ascontiguousarray(array)
            for name, array in adapted.changed.items()
        },
        path,
    )
    return path, s


@pytest.mark.slow
@pytest.mark.parametrize("model", REFERENCES)
@pytest.mark.parametrize("form", ["mlx", pytest.param("gguf", marks=needs("gguf")), "kohya",
                                  "loralib"])  # fmt: skip
def test_the_adapter_may_be_in_any_format(made, tmp_path, model, form):
    adapter, weight = converted(tmp_path, model, form)
    report = merged(REFERENCES[model], adapter, made(model), [weight])
    assert problems(report) == []
    assert merged(REFERENCES[model], adapter, made(model), [1.1 * weight]).exit_status == 1


def one(report, severity="deviation"):
    [entry] = [entry for entry in report.entries if entry.severity == severity]
    return entry


def test_a_changed_tensor_of_the_base_is_named_with_what_could_explain_it(made, tmp_path):
    name = "model.norm.weight"
    path = edited(tmp_path, made("llama"), lambda t: {**t, name: t[name] + np.float32(0.1)})
    report = merged(REFERENCES["llama"], REFERENCES["llama"], path)
    assert (one(report).subject, one(report).verdict) == (name, "changed")
    assert "another revision" in one(report).text
    assert "revision" in report.remedy


def test_a_detour_over_half_precision_is_named(made, tmp_path):
    name = "model.embed_tokens.weight"

    def half(tensors):
        return {**tensors, name: tensors[name].astype(np.float16).astype(np.float32)}

    report = merged(REFERENCES["llama"], REFERENCES["llama"], edited(tmp_path, made("llama"), half))
    assert "rounded to float16 and back" in one(report).text


@pytest.mark.parametrize(("rows", "told"), [(20, "padded or resized"), (10, "fewer rows")])
def test_a_resized_table_is_named(made, tmp_path, rows, told):
    name = "model.embed_tokens.weight"

    def resized(tensors):
        return {**tensors, name: np.resize(tensors[name], (rows, tensors[name].shape[1]))}

    report = merged(
        REFERENCES["llama"], REFERENCES["llama"], edited(tmp_path, made("llama"), resized)
    )
    wrong = {entry.subject: entry for entry in report.entries if entry.severity == "deviation"}
    assert told in wrong[name].text
    assert "the first" in wrong[name].text
    assert "vocab_size" in wrong


EDITS = {
    "NaN": (lambda t, n: {**t, n: np.full_like(t[n], np.nan)}, "corrupt"),
    "infinite": (lambda t, n: {**t, n: np.full_like(t[n], np.inf)}, "corrupt"),
    "missing": (lambda t, n: {m: a for m, a in t.items() if m != n}, "missing"),
    "extra": (lambda t, n: {**t, "model.extra.weight": t[n]}, "extra"),
}


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize(("edit", "verdict"), EDITS.values(), ids=EDITS)
def test_no_tensor_is_passed_over(made, tmp_path, name, edit, verdict):
    path = edited(tmp_path, made("llama"), lambda tensors: edit(tensors, name))
    report = merged(REFERENCES["llama"], REFERENCES["llama"], path)
    assert one(report).verdict == verdict
    assert report.exit_status == 1


def test_the_base_in_place_of_the_merged_model_is_said_in_one_line():
    report = merged(REFERENCES["llama"], REFERENCES["llama"], REFERENCES["llama"])
    assert "the merged model is the base" in report.cause
    assert "merge_and_unload" in report.remedy


def test_an_adapter_saved_beside_its_base_is_not_merged(tmp_path):
    base = tensors_of(folder() / "llama" / "base")
    adapter = load_file(folder() / "llama" / "adapter" / "adapter_model.safetensors")
    shutil.copytree(folder() / "llama" / "base", tmp_path / "m")
    save_file({**base, **adapter}, tmp_path / "m" / "model.safetensors")
    report = merged(REFERENCES["llama"], REFERENCES["llama"], tmp_path / "m")
    assert {e.mistake for e in report.entries if e.verdict == "extra"} == {"not-merged"}


@pytest.mark.parametrize(("head", "verdicts"), [(1.0, []), (None, ["missing"]), (2.0, ["changed"])])
def test_a_head_that_came_with_the_adapter_is_the_adapters(made, tmp_path, head, verdicts):
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    own = {"base_model.model.score.weight": np.full((2, 36), 1, np.float32)}
    save_file({**load_file(file), **own}, file)

    def with_head(tensors):
        more = {} if head is None else {"score.weight": np.full((2, 36), head, np.float32)}
        return {**tensors, **more}

    report = merged(REFERENCES["llama"], tmp_path / "a", edited(tmp_path, made("llama"), with_head))
    assert [verdict for _, verdict in problems(report)] == verdicts


def test_a_table_that_was_resized_and_trained_comes_with_the_adapter(made, tmp_path):
    """PEFT saves a resized table whole: it stands in the base's place."""
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    file, name = tmp_path / "a" / "adapter_model.safetensors", "model.embed_tokens.weight"
    table = np.random.default_rng(0).standard_normal((16, 36)).astype(np.float32)
    for place in (name, "model.embed_tokens.base_layer.weight"):
        save_file({**load_file(file), f"base_model.model.{place}": table}, tmp_path / "own")
        shutil.copy(tmp_path / "own", tmp_path / "a" / "adapter_model.safetensors")
        path = edited(tmp_path, made("llama"), lambda t: {**t, name: table})
        config = json.loads((path / "config.json").read_text()) | {"vocab_size": 16}
        (path / "config.json").write_text(json.dumps(config))
        report = merged(REFERENCES["llama"], tmp_path / "a", path)
        assert problems(report) == []
        told = [entry.text for entry in report.entries if entry.verdict == "told"]
        assert any("stands in the base's place" in text for text in told)
        shutil.rmtree(path)
        shutil.copy(folder() / "llama" / "adapter" / file.name, file)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_that_is_left_out_is_the_table(tmp_path, same):
    """A base may hold the head that it ties; a merged model of a newer release does not."""
    tensors = base_tensors()
    table = tensors["model.embed_tokens.weight"]
    base = tensors | {"lm_head.weight": table if same else table + np.float32(1)}
    for name in ("base", "m"):
        shutil.copytree(folder() / "llama" / "base", tmp_path / name)
    save_file(base, tmp_path / "base" / "model.safetensors")
    adapter = tmp_path / "a"
    shutil.copytree(folder() / "llama" / "adapter", adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({n: 0 * t for n, t in load_file(file).items() if "up_proj" in n}, file)
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    report = merged(tmp_path / "base", adapter, tmp_path / "m")
    assert problems(report) == ([] if same else [("lm_head.weight", "changed")])


def test_a_base_in_four_bits_is_told_from_the_one_before_it_was_quantized(tmp_path):
    W = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    norm = {"model.norm.weight": np.ones(4, np.float32)}
    q = quantize(W, "nf4")
    text = json.dumps({"shape": [64, 64], "blocksize": 64, "quant_type": "nf4"}).encode()
    name = "model.layers.0.mlp.up_proj.weight"
    for folder_name, parts in {
        "base": {name: q.codes[:, None], f"{name}.absmax": q.constants["absmax"],
                 f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(text, np.uint8)},
        "original": {name: W},
        "kept": {name: dequantize(q)},
    }.items():  # fmt: skip
        (tmp_path / folder_name).mkdir()
        parts = {at: np.array(part) for at, part in (parts | norm).items()}
        save_file(parts, tmp_path / folder_name / "model.safetensors")
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    saved = {"base_model.model.model.norm.weight": norm["model.norm.weight"]}
    save_file(saved, tmp_path / "a" / "adapter_model.safetensors")
    report = merged(tmp_path / "base", tmp_path / "a", tmp_path / "original")
    assert "before it was quantized" in one(report).text
    assert problems(merged(tmp_path / "base", tmp_path / "a", tmp_path / "kept")) == []


@needs("gguf")
def test_what_an_unknown_converter_may_have_changed_cannot_be_decided(made, tmp_path):
    """A model of an architecture whose conversion is not known, with other norms."""
    gguf = optional("gguf")
    tensors, base = tensors_of(made("llama")), tmp_path / "base"
    for architecture, status in (("llama", 1), ("gemma", 4)):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", architecture)
        writer.add_block_count(2)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
        kept = {n: t for n, t in tensors.items() if "self_attn" not in n and "lm_head" not in n}
        for name, array in kept.items():
            place = names.get_name(name.removesuffix(".weight"))
            writer.add_tensor(f"{place}.weight", array + ("norm" in name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        base.mkdir(exist_ok=True)
        save_file({n: tensors[n] for n in kept}, base / "model.safetensors")
        shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a", dirs_exist_ok=True)
        file = tmp_path / "a" / "adapter_model.safetensors"
        found = {n: 0 * t for n, t in load_file(file).items() if "self_attn" not in n}
        save_file(found, file)
        assert merged(base, tmp_path / "a", tmp_path / "m.gguf").exit_status == status


def test_names_that_fit_no_tensor_are_said(tmp_path):
    adapter = folder() / "llama" / "adapter"
    shutil.copytree(adapter, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {name.replace("layers.0", "layers.7"): t for name, t in load_file(file).items()}
    save_file(tensors, file)
    report = merged(REFERENCES["llama"], tmp_path / "a", REFERENCES["llama"])
    unfit = [entry for entry in report.entries if entry.verdict == "wrong"]
    assert len(unfit) == 7
    assert all("applied nowhere" in entry.text for entry in unfit)


def test_buffers_of_older_files_are_no_deviation(made, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    path = edited(tmp_path, made("llama"), lambda t: {**t, name: np.ones(3, np.float32)})
    report = merged(REFERENCES["llama"], REFERENCES["llama"], path)
    assert report.exit_status == 0
    assert one(report, "note").subject == name


def test_layers_may_be_replicated(tmp_path):
    """Layers 0, 1, 0, 1 of one base, each with an adapter of its own."""
    base = tensors_of(folder() / "llama" / "base")
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    settings |= {"layer_replication": [[0, 2], [0, 2]], "r": 2, "lora_alpha": 3}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    rng, adapter, deeper = np.random.default_rng(0), {}, {}
    for name, W in base.items():
        old = re.search(r"layers\.(\d+)\.", name)
        for new in (0, 1, 2, 3) if old else ():
            if new % 2 != int(old[1]):
                continue
            copy = name.replace(old[0], f"layers.{new}.")
            deeper[copy] = W
            if name.endswith("q_proj.weight"):
                A = rng.standard_normal((2, W.shape[1])).astype(np.float32)
                B = rng.standard_normal((W.shape[0], 2)).astype(np.float32)
                path = f"base_model.model.{copy.removesuffix('.weight')}"
                adapter |= {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}
                deeper[copy] = W + np.float32(1.5) * (B @ A)
        if not old:
            deeper[name] = W
    save_file(adapter, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "m").mkdir()
    config = json.loads((folder() / "llama" / "base" / "config.json").read_text())
    deeper_config = json.dumps(config | {"num_hidden_layers": 4})
    (tmp_path / "m" / "config.json").write_text(deeper_config)
    save_file(deeper, tmp_path / "m" / "model.safetensors")
    report = merged(REFERENCES["llama"], tmp_path / "a", tmp_path / "m")
    assert problems(report) == []
    # A copy's change on another copy, as where the copies share one weight.
    swapped = {**deeper, "model.layers.2.self_attn.q_proj.weight":
               deeper["model.layers.0.self_attn.q_proj.weight"]}  # fmt: skip
    save_file(swapped, tmp_path / "m" / "model.safetensors")
    assert (
        one(merged(REFERENCES["llama"], tmp_path / "a", tmp_path / "m")).verdict == "other-module"
    )


def test_a_start_that_nobody_makes_again_cannot_be_decided(made, tmp_path):
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    settings["init_lora_weights"] = "loftq"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    assert merged(REFERENCES["llama"], tmp_path / "a", made("llama")).exit_status == 0
    name = "model.layers.0.mlp.up_proj.weight"
    path = edited(tmp_path, made("llama"), lambda t: {**t, name: t[name] + np.float32(0.1)})
    report = merged(REFERENCES["llama"], tmp_path / "a", path)
    assert report.exit_status == 4
    assert "loftq" in one(report, "undecided").text


def spoiled(made, tmp_path, change):
    """What is wrong with a copy of a merged model, whose folder was changed."""
    folder = tmp_path / "spoiled"
    shutil.copytree(made("llama"), folder)
    change(folder)
    return problems(merged("reference:llama", "reference:llama", folder))


def shard(path):
    """The weights as one shard with an index."""
    names = [*tensors_of(path)]
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_an_adapter_beside_the_merged_weights_would_be_added_again(made, tmp_path):
    def change(path):
        for file in (folder() / "llama" / "adapter").iterdir():
            shutil.copy(file, path)

    assert spoiled(made, tmp_path, change) == [("adapter_config.json", "wrong")]


def test_weights_beside_the_shards_are_told(made, tmp_path):
    whole = made("llama") / "model.safetensors"
    base = folder() / "llama" / "base" / "model.safetensors"
    for i, (name, source, told) in enumerate(
        (
            ("model.safetensors", base, [("model.safetensors", "wrong")]),
            ("model.safetensors", whole, [("files", "doubtful")]),
            ("model-00001-of-00009.safetensors", base, [("files", "doubtful")]),
            ("other.safetensors", base, []),
        )
    ):

        def change(path, source=source, name=name):
            shard(path)
            shutil.copy(source, path / name)

        assert spoiled(made, tmp_path / str(i), change) == told


def test_a_shard_of_the_base_is_named(tmp_path):
    world = adapt(llama())
    write_model(tmp_path / "base", world.base, world.config, 3)
    write_model(tmp_path / "merged", world.merge(), world.config, 3)
    adapter = write_adapter(tmp_path / "adapter", world.adapter, world.settings)
    name = "model-00002-of-00003.safetensors"
    shutil.copy(tmp_path / "base" / name, tmp_path / "merged" / name)
    report = merged(tmp_path / "base", adapter, tmp_path / "merged")
    assert report.cause.startswith(f"not-applied: the adapter is not applied in {name}, and in all")


def test_a_change_applied_to_other_modules_too_is_named(tmp_path):
    world = adapt(llama())
    name = world.sites[0].weight
    there = f"vision.{name.removeprefix('model.')}"
    base, right = dict(world.base), world.merge()
    base[there] = right[there] = np.roll(base[name], 1, 0)
    changed = right | {there: (base[there] + world.sites[0].delta).astype(F32)}
    write_model(tmp_path / "base", base, world.config)
    adapter = write_adapter(tmp_path / "adapter", world.adapter, world.settings)
    for tensors, mistakes in ((right, set()), (changed, {"applied-elsewhere"})):
        write_model(tmp_path / "merged", tensors, world.config)
        report = merged(tmp_path / "base", adapter, tmp_path / "merged")
        wrong = {e.mistake for e in report.entries if e.severity == "deviation"}
        assert wrong == mistakes


def test_each_adapter_needs_one_weight():
    with pytest.raises(ValueError, match="2 weights for 1"):
        merged(REFERENCES["llama"], REFERENCES["llama"], REFERENCES["llama"], [1, 2])


def test_the_progress_goes_to_the_end():
    seen = []
    name = REFERENCES["llama"]
    merged(name, name, name, progress=lambda done, total, text: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == 2 * sum(t.nbytes for t in base_tensors().values())


def base_tensors():
    return tensors_of(folder() / "llama" / "base")


BAD_ADAPTERS = {
    "no type": {"peft_type": None},
    "another type": {"peft_type": "LOHA"},
    "a rank that is text": {"r": "8"},
    "a rank below 1": {"r": 0},
    "no alpha": {"lora_alpha": None},
    "an alpha that is a list": {"lora_alpha": [1]},
    "a pattern that is no expression": {"rank_pattern": {"(": 3}},
    "a pattern of texts": {"alpha_pattern": {"q": "x"}},
    "ranges that are none": {"layer_replication": [[0]]},
    "ranges beyond the layers": {"layer_replication": [[0, 99]]},
    "a million layers": {"layer_replication": [[0, 2]] * 500_000},
    "ranges without end": {"layer_replication": [[0, 2**60]]},
    "tokens that are texts": {"trainable_token_indices": ["a"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_settings_that_lie_are_unreadable(tmp_path, settings, capsys):
    shutil.copytree(folder() / "llama" / "adapter", tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    name, adapter = REFERENCES["llama"], str(tmp_path / "a")
    names = ["--base", name, "--adapter", adapter, "--merged", name]
    assert main(["audit", "merged", *names]) == 3
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "status"), [(0.5, 0), (4.0, 4), (100.0, 1)])
def test_what_only_the_worst_roundings_of_pissas_start_explain_is_left_open(
    tmp_path, share, status
):
    world = adapt(llama(), r=4, targets=r"layers\.0.*q_proj$", init_lora_weights="pissa")
    base, adapter = world.write(tmp_path)
    (start, _), name = read_changes(adapter, open_tensors(base)).changes, world.sites[0].weight
    off = share * start.slack * np.sign(np.random.default_rng(0).normal(size=(64, 64)))
    change = start.s * start.parts["B"] @ start.parts["A"] + world.sites[0].delta
    W = world.base[name].astype(float) + change + off
    model = write_model(tmp_path / "merged", {**world.base, name: W.astype(F32)}, world.config)
    assert merged(base, adapter, model).exit_status == status


def test_a_part_of_a_fused_projection_may_have_an_adapter_of_its_own(tmp_path):
    """As of a model that was trained with its projections apart."""
    world = adapt(llama(fused=True), r=4, targets="none")
    rng, adapter, merged_ = np.random.default_rng(1), {}, dict(world.base)
    whole = merged_["model.layers.0.self_attn.qkv_proj.weight"]
    for name, first, rows in (("q", 0, 64), ("k", 64, 32), ("v", 96, 32)):
        A, B = rng.normal(size=(4, 64)).astype(F32), rng.normal(size=(rows, 4)).astype(F32)
        at = f"base_model.model.model.layers.0.self_attn.{name}_proj"
        adapter |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
        whole = whole.copy()
        whole[first : first + rows] += F32.type(1.5) * (B @ A)
    settings = {**world.settings, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    base = write_model(tmp_path / "base", world.base, world.config)
    path = write_adapter(tmp_path / "adapter", adapter, settings)
    merged_["model.layers.0.self_attn.qkv_proj.weight"] = whole
    model = write_model(tmp_path / "merged", merged_, world.config)
    assert problems(merged(base, path, model)) == []
    whole[70:80] += F32.type(0.01)
    model = write_model(tmp_path / "merged", merged_, world.config)
    assert one(merged(base, path, model)).subject.endswith("qkv_proj.weight")


def test_a_bias_of_b_of_a_module_without_bias_is_not_passed_over(tmp_path):
    world = adapt(llama(), r=4, targets=r"layers\.0.*q_proj$", bias=True)
    base, path = world.write(tmp_path)
    (site,) = world.sites
    name = site.weight
    W = world.base[name] + site.delta
    model = write_model(tmp_path / "merged", {**world.base, name: W}, world.config)
    report = merged(base, path, model)
    assert (one(report).verdict, one(report).mistake) == ("missing", "lora-bias-lost")
    bias = name.replace("weight", "bias")
    lora_bias = next(array for key, array in world.adapter.items() if key.endswith("B.bias"))
    for factor, status in ((1, 0), (2, 1)):
        tensors = {**world.base, name: W, bias: F32.type(factor * site.s) * lora_bias}
        model = write_model(tmp_path / "merged", tensors, world.config)
        assert merged(base, path, model).exit_status == status


def test_a_convolution_with_groups_is_told_to_hold_no_such_change(tmp_path):
    rng = np.random.default_rng(2)
    W = {"conv.weight": rng.normal(size=(8, 2, 3, 3)).astype(F32)}
    adapter = {
        "base_model.model.conv.lora_A.weight": rng.normal(size=(4, 4, 3, 3)).astype(F32),
        "base_model.model.conv.lora_B.weight": rng.normal(size=(8, 2, 1, 1)).astype(F32),
    }
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["conv"]}
    base = write_model(tmp_path / "base", W, {}, tokenizer=False)
    path = write_adapter(tmp_path / "adapter", adapter, settings)
    entry = one(merged(base, path, base))
    assert (entry.verdict, "has groups" in entry.text) == ("wrong", True)
