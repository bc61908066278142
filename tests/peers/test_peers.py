"""The shipped peers against formulas written out here; only what they need is installed is run."""

import importlib
import json
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from extras import optional

from minilora.verify.peers import PEERS

torch = optional("torch")
transformers = optional("transformers")
optional("peft")
optional("loralib")
shared = importlib.import_module("minilora.verify.peers._torch")
models = importlib.import_module("minilora.verify.peers._transformers")
files_of = importlib.import_module("safetensors.torch")
load_file, save_file = files_of.load_file, files_of.save_file

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
DTYPE = {
    "float64": np.float64,
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}
CAUSAL = ("llama", "qwen2", "gpt2")
ARCHITECTURES = (*CAUSAL, "bert")


def peer(name: str) -> Any:
    return PEERS[name].load()


@pytest.fixture(params=["loralib", "peft"])
def library(request: pytest.FixtureRequest) -> Any:
    return peer(request.param)


def draw(rng: np.random.Generator, dtype: str, *shape: int) -> np.ndarray:
    """Signed numbers of size ½ to 1: a product of four of them is no subnormal of float16."""
    return (rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.0, shape)).astype(DTYPE[dtype])


def layer(dtype: str, lead: tuple[int, ...], m: int, n: int, r: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([m, n, r, *lead])
    shapes = {"x": (*lead, n), "W": (m, n), "A": (r, n), "B": (m, r), "dy": (*lead, m)}
    arrays = {name: draw(rng, dtype, *shape) for name, shape in shapes.items()}
    return arrays | {"bias": draw(rng, dtype, m), "keep": rng.random((*lead, n)) < 0.75}


def formula(
    a: dict[str, np.ndarray], s: float, p: float, size: bool = False
) -> dict[str, np.ndarray]:
    """The layer's value and gradients in float64, or with `size` the same sums of |terms|."""
    f = {
        name: np.abs(v.astype(np.float64)) if size else v.astype(np.float64)
        for name, v in a.items()
    }
    (m, n), k = f["W"].shape, f["keep"] / (1 - p)
    x, k, dy = f["x"].reshape(-1, n), k.reshape(-1, n), f["dy"].reshape(-1, m)
    h, du = (x * k) @ f["A"].T, s * dy @ f["B"]
    return {
        "y": (x @ f["W"].T + f["bias"] + s * h @ f["B"].T).reshape(a["dy"].shape),
        "dx": (dy @ f["W"] + du @ f["A"] * k).reshape(a["x"].shape),
        "dA": du.T @ (x * k),
        "dB": s * dy.T @ h,
        "dbias": dy.sum(0),
    }


def within(got: np.ndarray, want: np.ndarray, size: np.ndarray, gamma: float) -> bool:
    return bool(np.all(np.abs(got.astype(np.float64) - want) <= gamma * size))


def gamma(library: Any, dtype: str, terms: int) -> float:
    """A bound of |error| / Σ|terms| by the standard model of rounding.

    On its way to an answer a term is stored at most nine times (1/(1 − p), its product with x, H,
    H Bᵀ, the scale, the base, the sum, and two more in a gradient's branch) and passes at most
    `terms` additions and products of the accumulation. A float16 that falls below the normal range
    is rounded by at most u·2⁻¹⁴, less than u·Σ|terms| with the sizes that `draw` gives. float64 is
    compared with a formula that is itself rounded: twice the bound.
    """
    how = library.precision[dtype]
    bound = 9 * ROUNDOFF[how["storage"]] + terms * ROUNDOFF[how["accumulation"]]
    return (2 if dtype == "float64" else 1) * bound / (1 - bound)


SHAPES = [((), 5, 7, 3), ((6,), 5, 7, 3), ((2, 3), 5, 7, 3), ((6,), 4, 4, 2)]


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(("lead", "m", "n", "r"), SHAPES)
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_a_layer_and_its_gradients_are_the_formula(
    library: Any, dtype: str, lead: tuple[int, ...], m: int, n: int, r: int, fan_in_fan_out: bool
) -> None:
    a = layer(dtype, lead, m, n, r)
    before = {name: v.copy() for name, v in a.items()}
    alpha, p = 3.5, 0.25
    branch = {"bias": a["bias"], "keep": a["keep"], "p": p}
    case: dict[str, Any] = {"alpha": alpha, "r": r, "fan_in_fan_out": fan_in_fan_out, **branch}
    got = library.lora_linear_vjp(a["x"], a["W"], a["A"], a["B"], a["dy"], **case)
    y = library.lora_linear(a["x"], a["W"], a["A"], a["B"], **case)

    assert all(np.array_equal(a[name], before[name]) for name in a)
    assert np.array_equal(y, got["y"])
    assert set(got) == {"y", "dx", "dA", "dB", "dbias"}
    bound = gamma(library, dtype, n + m + r + int(np.prod(lead)) + 4)
    want, size = formula(a, alpha / r, p), formula(a, alpha / r, p, size=True)
    for name, value in got.items():
        assert value.dtype == DTYPE[dtype]
        assert within(value, want[name], size[name], bound), name

    # Negative controls: mutants of scale, mask and base that the same bound refuses.
    scaled = formula(a, 1.25 * alpha / r, p)
    assert not any(within(got[k], scaled[k], size[k], bound) for k in ("y", "dx", "dA", "dB"))
    unmasked = formula(a | {"keep": np.ones_like(a["keep"])}, alpha / r, 0.0)
    assert not any(within(got[k], unmasked[k], size[k], bound) for k in ("y", "dx", "dA", "dB"))
    baseless = formula(a | {"W": np.zeros_like(a["W"])}, alpha / r, p)
    assert not any(within(got[k], baseless[k], size[k], bound) for k in ("y", "dx"))


def test_without_a_mask_nothing_is_dropped(library: Any) -> None:
    a = layer("float64", (6,), 5, 7, 3)
    x, W, A, B = (a[name] for name in ("x", "W", "A", "B"))
    plain = library.lora_linear(x, W, A, B, alpha=7, r=3)
    assert np.array_equal(plain, library.lora_linear(x, W, A, B, alpha=7, r=3, p=0.25))
    kept = np.ones_like(a["keep"])
    scaled = library.lora_linear(x, W, A, B, alpha=7, r=3, keep=kept, p=0.25)
    assert not np.array_equal(plain, scaled)


def test_rank_stabilised_scale_is_alpha_over_root_r() -> None:
    a = layer("float64", (6,), 5, 7, 3) | {"bias": np.zeros(5), "keep": np.ones((6, 7), dtype=bool)}
    peft = peer("peft")
    y = peft.lora_linear(a["x"], a["W"], a["A"], a["B"], alpha=7, r=3, use_rslora=True)
    size = formula(a, 7 / 3**0.5, 0.0, size=True)["y"]
    bound = gamma(peft, "float64", 7 + 3 + 4)
    assert within(y, formula(a, 7 / 3**0.5, 0.0)["y"], size, bound)
    assert not within(y, formula(a, 7 / 3, 0.0)["y"], size, bound)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_merge_adds_the_delta_once_and_unmerge_subtracts_it_once(
    library: Any, dtype: str, fan_in_fan_out: bool
) -> None:
    a = layer(dtype, (6,), 5, 7, 3)
    case: dict[str, Any] = {"alpha": 7, "r": 3, "fan_in_fan_out": fan_in_fan_out}
    merged = library.merge(a["W"], a["A"], a["B"], **case)
    unmerged = library.unmerge(merged, a["A"], a["B"], **case)
    assert merged.dtype == unmerged.dtype == DTYPE[dtype]
    W, A, B, M = (v.astype(np.float64) for v in (a["W"], a["A"], a["B"], merged))
    delta, size = 7 / 3 * B @ A, 7 / 3 * np.abs(B) @ np.abs(A)
    bound = gamma(library, dtype, 3 + 4)
    assert within(merged, W + delta, np.abs(W) + size, bound)
    assert within(unmerged, M - delta, np.abs(M) + size, bound)
    assert not within(merged, W + 2 * delta, np.abs(W) + size, bound)
    assert not within(unmerged, M, np.abs(M) + size, bound)


def test_no_state_is_left_between_calls(library: Any) -> None:
    a = layer("float32", (6,), 5, 7, 3)
    x, W, A, B = (a[name] for name in ("x", "W", "A", "B"))
    y = library.lora_linear(x, W, A, B, alpha=7, r=3)
    merged = library.merge(W, A, B, alpha=7, r=3)
    assert np.array_equal(y, library.lora_linear(x, W, A, B, alpha=7, r=3))
    assert np.array_equal(merged, library.merge(W, A, B, alpha=7, r=3))
    assert not np.array_equal(y, library.lora_linear(x, W, A, 2 * B, alpha=7, r=3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_products_accumulate_in_the_declared_dtype(library: Any, dtype: str) -> None:
    n, u = 512, ROUNDOFF[dtype]
    x = np.ones((3, n), DTYPE[dtype])
    W = np.full((5, n), u / 4, DTYPE[dtype])
    W[:, 0] = 1
    none = {"A": np.zeros((2, n), DTYPE[dtype]), "B": np.zeros((5, 2), DTYPE[dtype])}
    y = library.lora_linear(x, W, **none, alpha=1, r=2)
    # Sums of dyadic numbers: exact in float32, and stuck at 1 where the sum is kept in the dtype.
    assert library.precision[dtype] == {"storage": dtype, "accumulation": "float32"}
    assert np.all(y == np.array(1 + (n - 1) * u / 4).astype(DTYPE[dtype]))
    assert DTYPE[dtype](1) + DTYPE[dtype](u / 4) == DTYPE[dtype](1) != y[0, 0]


@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_a_given_mask_rounds_as_the_librarys_dropout_does(dtype: str) -> None:
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(0.3)
    x = 1 + torch.rand(64, 65, dtype=getattr(torch, dtype))
    dropped = dropout(x)
    given = shared.GivenMask((dropped != 0).numpy(), 0.3, dropout)
    assert torch.equal(given(x), dropped)
    assert not torch.equal(given(x), x * (dropped != 0))
    assert torch.equal(given.eval()(x), x)


def test_a_mask_for_another_rate_than_configured_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p = 0\.5, expected 0\.25"):
        shared.GivenMask(np.ones(3), 0.25, torch.nn.Dropout(0.5))


def test_arrays_that_torch_would_broadcast_or_cast_are_refused(library: Any) -> None:
    a = layer("float64", (6,), 5, 7, 3)
    x, W, A, B = (a[name] for name in ("x", "W", "A", "B"))
    with pytest.raises(ValueError, match=r"shape \(5, 1\), expected .* shape \(5, 3\)"):
        library.lora_linear(x, W, A, B[:, :1], alpha=7, r=3)
    with pytest.raises(ValueError, match=r"found torch\.float32 .* expected torch\.float64"):
        library.lora_linear(x, W, A.astype(np.float32), B, alpha=7, r=3)


def test_settings_that_a_library_lacks_are_not_supported(library: Any) -> None:
    a = layer("float64", (6,), 5, 7, 3)
    x, W, A, B = (a[name] for name in ("x", "W", "A", "B"))
    with pytest.raises(NotImplementedError, match="use_unicorns"):
        library.lora_linear(x, W, A, B, alpha=7, r=3, use_unicorns=True)
    with pytest.raises(NotImplementedError, match="use_rslora"):
        peer("loralib").merge(W, A, B, alpha=7, r=3, use_rslora=True)


def tiny_model(architecture: str) -> Any:
    """A random model with all sizes different, its weights away from any symmetry."""
    torch.manual_seed(0)
    common = {"vocab_size": 29, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    blocks = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    llama = {**common, **blocks, "hidden_size": 12, "num_key_value_heads": 1}
    if architecture == "llama":
        config = transformers.LlamaConfig(**llama, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    elif architecture == "qwen2":
        config = transformers.Qwen2Config(**llama, tie_word_embeddings=True)
        model = transformers.Qwen2ForCausalLM(config)
    elif architecture == "gpt2":
        config = transformers.GPT2Config(
            **common, n_layer=2, n_head=3, n_embd=12, n_inner=20, n_positions=16
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            **common, **blocks, hidden_size=12, max_position_embeddings=16, num_labels=4
        )
        model = transformers.BertForSequenceClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def write(folder: Path, architecture: str, dtype: str) -> tuple[Path, Path]:
    """A model and an adapter on all its linears, written by hand in the two formats."""
    model = tiny_model(architecture).to(getattr(torch, dtype))
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    adapter.mkdir()
    conv1d = transformers.pytorch_utils.Conv1D
    tensors, targets, saved = {}, set(), []
    for path, module in model.named_modules():
        end = path.rpartition(".")[2]
        if end == "classifier":
            saved = [end]
            for name, parameter in module.named_parameters():
                tensors[f"{path}.{name}"] = torch.randn_like(parameter)
        elif isinstance(module, torch.nn.Linear | conv1d) and end != "lm_head":
            m, n = module.weight.shape[::-1] if isinstance(module, conv1d) else module.weight.shape
            r = 2 if end in ("k_proj", "c_fc", "key") else 3
            tensors[f"{path}.lora_A.weight"] = torch.randn(r, n, dtype=model.dtype)
            tensors[f"{path}.lora_B.weight"] = torch.randn(m, r, dtype=model.dtype)
            targets.add(end)
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    configure(
        adapter,
        peft_type="LORA",
        task_type="CAUSAL_LM" if architecture in CAUSAL else "SEQ_CLS",
        r=3,
        lora_alpha=7,
        lora_dropout=0.25,
        rank_pattern=dict.fromkeys(sorted(targets & {"k_proj", "c_fc", "key"}), 2),
        target_modules=sorted(targets),
        modules_to_save=saved,
        fan_in_fan_out=architecture == "gpt2",
    )
    return base, adapter


def configure(adapter: Path, **fields: Any) -> None:
    """Write an adapter's configuration."""
    (adapter / "adapter_config.json").write_text(json.dumps(fields))


def altered(adapter: Path, into: Path, change: Callable[[str, Any], Any], **fields: Any) -> Path:
    """A copy of an adapter with every tensor through `change(name, tensor)`, None dropping it."""
    into.mkdir(exist_ok=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    changed = {name: change(name, tensor) for name, tensor in tensors.items()}
    save_file(
        {name: tensor for name, tensor in changed.items() if tensor is not None},
        into / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    configure(into, **json.loads((adapter / "adapter_config.json").read_text()) | fields)
    return into


def tiny_batch(architecture: str) -> dict[str, np.ndarray]:
    """Three sequences of 7, 5 and 3 tokens, padded at the right; a prompt without labels."""
    rng = np.random.default_rng(0)
    mask = (np.arange(7) < np.array([[7], [5], [3]])).astype(np.int64)
    ids = rng.integers(3, 29, (3, 7)) * mask
    labels = np.where(mask == 1, ids, -100)
    labels[0, :3] = -100
    if architecture == "bert":
        labels = np.array([3, 0, 1])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The files of an architecture in a dtype, each written once."""
    written: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(architecture: str, dtype: str) -> tuple[Path, Path]:
        key = architecture, dtype
        if key not in written:
            written[key] = write(tmp_path_factory.mktemp("-".join(key)), *key)
        return written[key]

    return get


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_models_gradients_bear_the_names_and_shapes_of_the_file(
    library: Any, files: Any, architecture: str, dtype: str
) -> None:
    base, adapter = files(architecture, dtype)
    batch = tiny_batch(architecture)
    before = {name: v.copy() for name, v in batch.items()}
    got = library.model_loss(base, adapter, batch)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert all(np.array_equal(batch[name], before[name]) for name in batch)
    assert {k: g.shape for k, g in got["grads"].items()} == {
        k: tuple(t.shape) for k, t in stored.items()
    }
    assert all(np.any(g != 0) for g in got["grads"].values())
    dtypes = {got["loss"].dtype, got["logits"].dtype} | {g.dtype for g in got["grads"].values()}
    assert dtypes == {np.dtype(DTYPE[dtype])}
    assert got["loss"].shape == ()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_moving_a_power_of_two_from_b_to_alpha_changes_no_bit_but_doubles_db(
    library: Any, files: Any, tmp_path: Path, architecture: str
) -> None:
    base, adapter = files(architecture, "float64")
    batch = tiny_batch(architecture)
    want = library.model_loss(base, adapter, batch)

    def halve(name: str, tensor: Any) -> Any:
        return tensor / 2 if ".lora_B." in name else tensor

    got = library.model_loss(base, altered(adapter, tmp_path, halve, lora_alpha=14), batch)
    assert got["loss"] == want["loss"]
    assert np.array_equal(got["logits"], want["logits"])
    for name, gradient in got["grads"].items():
        factor = 2 if ".lora_B." in name else 1
        assert np.array_equal(gradient, factor * want["grads"][name]), name
    # Negative control: without the factor in alpha the logits move.
    other = library.model_loss(base, altered(adapter, tmp_path, halve), batch)
    assert not np.array_equal(other["logits"], want["logits"])


@pytest.mark.parametrize("architecture", CAUSAL)
def test_with_b_zero_the_logits_are_the_bases(
    library: Any, files: Any, tmp_path: Path, architecture: str
) -> None:
    base, adapter = files(architecture, "float32")
    batch = tiny_batch(architecture)
    zeroed = altered(adapter, tmp_path, lambda name, t: t * 0 if ".lora_B." in name else t)
    with torch.no_grad():
        plain = models.load_base(base).eval()(**{k: torch.from_numpy(v) for k, v in batch.items()})
    assert np.array_equal(library.model_loss(base, zeroed, batch)["logits"], plain.logits)
    assert not np.array_equal(library.model_loss(base, adapter, batch)["logits"], plain.logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_the_mean_over_the_labels_that_count(
    library: Any, files: Any, architecture: str
) -> None:
    batch = tiny_batch(architecture)
    got = library.model_loss(*files(architecture, "float64"), batch)
    z, labels = got["logits"], batch["labels"]
    if architecture in CAUSAL:
        z, labels = z[:, :-1].reshape(-1, z.shape[-1]), labels[:, 1:].ravel()
    counts = labels != -100
    z, labels = z[counts], labels[counts]
    each = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), labels]
    # A causal model's loss is float32 (`known`). The cast moves a loss by at most 2u max|z|, the
    # sum of V exponentials its logarithm by (V + 2)u; two differences, the logarithm and the mean
    # of N follow. This here is rounded too: twice the bound.
    u = ROUNDOFF["float32" if architecture in CAUSAL else "float64"]
    largest = np.abs(z).max() + each.max()
    bound = 2 * u * (z.shape[-1] + 2 + (5 + len(z)) * largest)
    assert abs(got["loss"] - each.mean()) <= bound
    assert abs(got["loss"] - each.sum()) > bound
    if architecture in CAUSAL:  # negative control: the mean over all positions
        assert abs(got["loss"] - each.sum() / counts.size) > bound


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loss_in_float32_is_declared_known(library: Any, files: Any, architecture: str) -> None:
    loss = library.model_loss(*files(architecture, "float64"), tiny_batch(architecture))["loss"]
    check = f"model.{architecture.replace('qwen2', 'llama')}:float64"
    known = any(fnmatchcase(check, pattern) for pattern in library.known)
    assert (np.float32(loss) == loss) == known


@pytest.mark.parametrize(
    ("field", "value"), [("use_rslora", True), ("bias", "all"), ("init_lora_weights", "pissa")]
)
def test_loralib_refuses_an_adapter_that_it_would_compute_otherwise(
    files: Any, tmp_path: Path, field: str, value: Any
) -> None:
    base, adapter = files("llama", "float64")
    changed = altered(adapter, tmp_path, lambda _, tensor: tensor, **{field: value})
    with pytest.raises(NotImplementedError, match=field):
        peer("loralib").model_loss(base, changed, tiny_batch("llama"))


def test_files_of_two_dtypes_are_refused(files: Any, tmp_path: Path) -> None:
    base, _ = files("llama", "float64")
    _, adapter = files("llama", "float32")
    with pytest.raises(ValueError, match=r"torch\.float32, expected torch\.float64"):
        peer("peft").model_loss(base, adapter, tiny_batch("llama"))
    save_file({"a": torch.zeros(1), "b": torch.zeros(1).double()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="found F32, F64"):
        models.stored_dtype(tmp_path)


PARAMS = {
    "layers.0.q.A": np.array([[2.0, -1.0, 4.0]]),
    "layers.0.q.B": np.array([[1.0], [-2.0]]),
}
SETTINGS: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.125,
    "betas": (0.5, 0.75),
    "eps": 0.0,
    "weight_decay": 0.25,
    "momentum": 0.5,
    "max_grad_norm": 1e9,
    "schedule": "linear",
    "warmup_steps": 0,
    "total_steps": 4,
    "loraplus_lr_ratio": 4.0,
}


def integer_gradients(steps: int) -> list[Any]:
    rng = np.random.default_rng(0)

    def drawn() -> dict[str, np.ndarray]:
        return {k: rng.choice([-2.0, -1.0, 1.0, 3.0], v.shape) for k, v in PARAMS.items()}

    return [[(1, drawn()), (3, drawn())] for _ in range(steps)]


def test_sgd_steps_on_dyadic_numbers_are_exact() -> None:
    """LoRA+ decays nothing, whatever PEFT's factory is given (peft.loraplus-decay)."""
    gradients = integer_gradients(4)
    got = peer("peft").optimizer_steps(PARAMS, gradients, SETTINGS)
    for name, start in PARAMS.items():
        value, velocity = start.copy(), np.zeros_like(start)
        halves = start.copy()  # negative control: micro-batches averaged without their tokens
        for k, ((_, g1), (_, g3)) in enumerate(gradients):
            lr = 0.125 * (1 - k / 4) * (4 if name.endswith(".B") else 1)
            velocity = 0.5 * velocity + (g1[name] + 3 * g3[name]) / 4
            value = value - lr * velocity
            assert np.array_equal(got[k][name], value)
            if k == 0:
                halves -= lr * (g1[name] + g3[name]) / 2
                assert not np.array_equal(got[k][name], halves)


def test_the_first_adamw_step_decays_and_moves_by_the_learning_rate() -> None:
    gradients = [batches[0][1] for batches in integer_gradients(1)]
    settings = SETTINGS | {"optimizer": "adamw"}
    (got,) = peer("peft").optimizer_steps(PARAMS, gradients, settings)
    (other,) = peer("peft").optimizer_steps(
        PARAMS, gradients, settings | {"loraplus_lr_ratio": None}
    )
    for name, start in PARAMS.items():
        # From m = v = 0 the step is lr·g/√(g²); with these betas every factor is a power of two.
        lr = 0.5 if name.endswith(".B") else 0.125
        sign = np.sign(gradients[0][name])
        assert np.array_equal(got[name], start - lr * sign)  # peft.loraplus-decay
        assert np.array_equal(other[name], start * (1 - 0.125 * 0.25) - 0.125 * sign)
    assert not np.array_equal(got["layers.0.q.B"], other["layers.0.q.B"])


def test_clipping_and_warm_up_are_the_librarys() -> None:
    gradients = [{k: 4 * np.sign(v) for k, v in PARAMS.items()}] * 3
    plain = SETTINGS | {"weight_decay": 0.0, "momentum": 0.0, "loraplus_lr_ratio": None}
    warm = plain | {"schedule": "linear", "warmup_steps": 2, "total_steps": 6}
    got = peer("peft").optimizer_steps(PARAMS, gradients, warm)
    clipped = peer("peft").optimizer_steps(PARAMS, gradients, warm | {"max_grad_norm": 1.0})
    for name, start in PARAMS.items():
        sign = np.sign(start)
        moves = [start - lr * 4 * sign for lr in (0.0, 0.0625, 0.1875)]
        assert all(np.array_equal(step[name], want) for step, want in zip(got, moves, strict=True))
        # Five entries of 4: the norm is 4√5, of which torch leaves 1/(4√5 + 1e-6). A handful of
        # roundings make the factor, one more each the product and the difference.
        want = start - 0.0625 * 4 * sign / (4 * 5**0.5 + 1e-6)
        assert within(clipped[1][name], want, np.abs(start) + 0.25, 12 * ROUNDOFF["float64"])
        assert not within(clipped[1][name], moves[1], np.abs(start) + 0.25, 12 * 2.0**-53)


def test_optimizer_settings_that_the_peer_lacks_are_not_supported() -> None:
    with pytest.raises(NotImplementedError, match="lion"):
        peer("peft").optimizer_steps(PARAMS, [], SETTINGS | {"optimizer": "lion"})
    with pytest.raises(NotImplementedError, match="nesterov"):
        peer("peft").optimizer_steps(PARAMS, [], SETTINGS | {"nesterov": True})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # a GPT-2 has dropout of its own
@pytest.mark.parametrize("name", ["peft", "loralib"])
def test_a_step_of_training_takes_the_gradient_away(
    name: str, files: Any, tmp_path: Path, architecture: str, checkpointing: bool
) -> None:
    base, dropping = files(architecture, "float32")
    adapter = altered(dropping, tmp_path, lambda _, tensor: tensor, lora_dropout=0.0)
    batch = tiny_batch(architecture)
    settings = {"optimizer": "sgd", "lr": 0.125, "momentum": 0.0, "weight_decay": 0.0}
    settings |= {"gradient_checkpointing": True} if checkpointing else {}
    (after,) = peer(name).train(base, adapter, [[batch]], settings)
    gradients = peer(name).model_loss(base, adapter, batch)["grads"]
    start = {k: t.numpy() for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    assert after.keys() == start.keys() == gradients.keys()
    for k, array in after.items():  # an eighth of a number is exact, and the difference rounds once
        assert np.array_equal(array, start[k] - gradients[k] / 8)
        assert not np.array_equal(array, start[k] - gradients[k] / 4)
    (dropped,) = peer(name).train(base, dropping, [[batch]], settings)
    assert not any(np.array_equal(dropped[k], after[k]) for k in after)


def test_the_libraries_own_starts_leave_the_weight(library: Any) -> None:
    if not hasattr(library, "init"):
        pytest.skip("it has no start of its own")
    W = draw(np.random.default_rng(0), "float32", 6, 10)
    start, again = (library.init(W, r=3, alpha=7.0, seed=5) for _ in range(2))
    other = library.init(W, r=3, alpha=7.0, seed=6)
    assert np.array_equal(start["A"], again["A"])
    assert not np.array_equal(start["A"], other["A"])
    assert start["A"].shape == (3, 10)
    assert not start["B"].any()
    assert np.array_equal(start.get("W", W), W)
    if library.name == "peft":
        split = library.init(W, r=3, alpha=7.0, seed=5, init_lora_weights="olora")
        assert split["B"].any()
        assert not np.array_equal(split["W"], W)


def test_peft_saves_and_loads_what_lies_in_the_file(files: Any, tmp_path: Path) -> None:
    base, adapter = files("llama", "bfloat16")
    loaded = peer("peft").load(base, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    halved = {name: array / 2 for name, array in loaded.items()}
    peer("peft").save(base, halved, settings, tmp_path)
    stored = load_file(adapter / "adapter_model.safetensors")
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert np.array_equal(loaded[name], shared.to_numpy(tensor))
        assert torch.equal(saved[name], tensor / 2)
        assert not torch.equal(saved[name], tensor)


def test_every_peer_says_what_it_is(library: Any) -> None:
    assert library.version == PEERS[library.name].version
    assert library.version[0].isdigit()
    assert set(library.dtypes) == set(library.precision) == set(ROUNDOFF)
    assert hasattr(library, "optimizer_steps") == (library.name == "peft")
