"""Judges a `lora_linear` by vectors: python consumer.py DIR [ANSWERS], with NumPy."""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def lora_linear(x, W, A, B, alpha, r, bias=0.0, keep=None, p=0.0, use_rslora=False, **_):
    """What is judged: put yours here."""
    h = x if keep is None else x * keep / (1 - p)
    return x @ W.T + bias + alpha / (r**0.5 if use_rslora else r) * (h @ A.T @ B.T)


folder, answers, deviating = Path(sys.argv[1]), {}, []
tensors = load_file(folder / "linear.safetensors")
for v in json.loads((folder / "manifest.json").read_text("utf-8"))["vectors"]:
    if (v["level"], v["method"], v["result"]) == ("linear", "lora_linear", "valid"):
        given = {name: tensors[f"{v['id']}.in.{name}"] for name in v["inputs"]}
        answers[f"{v['id']}.out.y"] = y = lora_linear(**given, **v["settings"])
        off = abs(y - tensors[f"{v['id']}.out.y"])
        sigma = tensors.get(f"{v['id']}.sigma.float64.y", np.zeros(off.shape))
        z = np.divide(off, sigma, out=np.where(off == 0, 0.0, np.inf), where=sigma > 0)
        limit = v["outputs"]["y"]
        if not (z.max() <= limit["max_z"] and (z**2).mean() ** 0.5 <= limit["rms_z"]):
            deviating.append(v["id"])  # NaN, too
if len(sys.argv) > 2:
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    save_file(answers, Path(sys.argv[2]) / "float64.safetensors")
print(f"{len(answers) - len(deviating)} of {len(answers)} hold", *deviating)
sys.exit(bool(deviating))
