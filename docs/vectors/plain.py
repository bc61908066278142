"""Judges a `lora_linear` by vectors: python plain.py DIR, with Python's standard library alone."""

import json
import sys
from array import array
from pathlib import Path


def load(path):
    """The tensors of a safetensors file, each a flat array: the manifest has the shapes."""
    data, codes = path.read_bytes(), {"F64": "d", "F32": "f", "BOOL": "B", "I64": "q"}
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        a, b = entry["data_offsets"]
        tensors[name] = array(codes[entry["dtype"]], data[start + a : start + b])
    return tensors


def lora_linear(x, W, A, B, alpha, r, bias=None, keep=None, p=0.0, use_rslora=False, **_):
    """What is judged: put yours here. Arrays are flat, tokens one after another."""
    n, m = len(A) // r, len(B) // r
    s = alpha / (r**0.5 if use_rslora else r)
    h = [v * k / (1 - p) for v, k in zip(x, keep, strict=True)] if keep else x

    def dot(a, i, b, j, k):
        return sum(u * v for u, v in zip(a[i * k : i * k + k], b[j * k : j * k + k], strict=True))

    y = []
    for t in range(len(x) // n):
        u = [dot(h, t, A, k, n) for k in range(r)]
        base = [dot(x, t, W, i, n) + (bias[i] if bias else 0) for i in range(m)]
        y += [base[i] + s * dot(u, 0, B, i, r) for i in range(m)]
    return y


folder, holds = Path(sys.argv[1]), []
tensors = load(folder / "linear.safetensors")
for v in json.loads((folder / "manifest.json").read_text("utf-8"))["vectors"]:
    if (v["level"], v["method"], v["result"]) == ("linear", "lora_linear", "valid"):
        y = lora_linear(**{k: tensors[f"{v['id']}.in.{k}"] for k in v["inputs"]}, **v["settings"])
        off = [abs(got - want) for got, want in zip(y, tensors[f"{v['id']}.out.y"], strict=True)]
        sigma = tensors.get(f"{v['id']}.sigma.float64.y", [0] * len(off))
        z = [d / s if s else d and float("inf") for d, s in zip(off, sigma, strict=True)]
        rms = (sum(each**2 for each in z) / len(z)) ** 0.5
        limit = v["outputs"]["y"]
        holds.append(max(z) <= limit["max_z"] and rms <= limit["rms_z"])
print(f"{sum(holds)} of {len(holds)} hold")
sys.exit(not all(holds))
