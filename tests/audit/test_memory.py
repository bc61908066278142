"""How much memory an audit takes: bounded, however large the model is."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="the peak is read from /proc")

CHILD = """
import re, sys
from minilora.audit.merged import merged
report = merged(*sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(report.exit_status, report.bytes_read, 1024 * int(peak))
"""


def written(out, dtype, size):
    """A base of so many bytes, an adapter of half of its tensors, and the two merged."""
    rng, shape = np.random.default_rng(0), (4096, 8192)
    base, adapter = {}, {}
    for i in range(-(-size // (2 * dtype.itemsize * 4096 * 8192))):
        W = rng.random(shape, np.float32) - np.float32(0.5)
        for at in ("up", "down"):
            base[f"model.layers.{i}.{at}.weight"] = W.astype(dtype)
        path = f"base_model.model.model.layers.{i}.up"
        adapter[f"{path}.lora_A.weight"] = rng.random((8, shape[1]), np.float32)
        adapter[f"{path}.lora_B.weight"] = rng.random((shape[0], 8), np.float32) / 8
    for name in ("base", "adapter", "merged"):
        (out / name).mkdir()
    save_file(base, out / "base" / "model.safetensors")
    save_file(adapter, out / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["up"]}
    (out / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    for name in [name for name in base if name.endswith("up.weight")]:
        path = f"base_model.model.{name.removesuffix('.weight')}"
        A, B = (adapter[f"{path}.lora_{part}.weight"] for part in "AB")
        base[name] = (base[name].astype(np.float32) + np.float32(2) * (B @ A)).astype(dtype)
    save_file(base, out / "merged" / "model.safetensors")


@pytest.mark.parametrize("dtype", [
    pytest.param(np.dtype(np.float32), marks=pytest.mark.slow),
    pytest.param(np.dtype(ml_dtypes.bfloat16), marks=pytest.mark.very_slow),
], ids=str)  # fmt: skip
def test_a_model_of_a_gigabyte_takes_150_megabytes(tmp_path, dtype):
    """Python and NumPy take 50 of them; the largest pair in float32 would take 268 alone."""
    written(tmp_path, dtype, 10**9)
    names = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    run = subprocess.run([sys.executable, "-c", CHILD, *names], capture_output=True, check=True)
    status, size, peak = map(int, run.stdout.split())
    assert status == 0
    assert size > 2 * 10**9
    assert peak < 150e6
