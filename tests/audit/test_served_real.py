"""Real servers on the loopback: with the adapter, without, at another scale, with other names."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from extras import needs, optional
from safetensors.numpy import load_file, save_file

from minilora.audit.served import ServerError, served
from minilora.audit.served.client import Client, Refused

optional("tokenizers")

from served_folders import write  # noqa: E402

pytestmark = pytest.mark.very_slow
START = 240
"""Seconds that a server may take to start."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served"))


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running(command, tmp_path, port):
    """The URL of a server that this command starts, once it lists its models."""
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        for _ in range(4 * START):
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            with contextlib.suppress(ServerError, Refused):
                Client(url, 5).ask("/models")
                break
            time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def audited(url, model, folders):
    return served(url, model, str(folders / "base"), str(folders / "peft"))


def renamed(folder, new, file, rename):
    """A copy of an adapter whose tensors have other names."""
    shutil.copytree(folder, new)
    tensors = load_file(folder / file)
    save_file({rename(name): array for name, array in tensors.items()}, new / file)
    return new


VERDICTS = [("mlx", "fine"), (None, "not-applied"), ("mlx, twice the scale", "factor")]


@needs("mlx_lm")
@pytest.mark.parametrize(("adapter", "verdict"), VERDICTS)
def test_mlx_lm(folders, tmp_path, adapter, verdict):
    port = free_port()
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folders / "base")]
    command += ["--adapter-path", str(folders / adapter)] if adapter else []
    with running([*command, "--port", str(port)], tmp_path, port) as url:
        report = audited(url, "default_model", folders)
    found = report.entries[0]
    assert found.verdict == verdict, found.text
    assert found.figures["noise"] < 1e-3
    if verdict == "factor":
        assert found.figures["low"] <= 2 <= found.figures["high"]


@needs("mlx_lm")
def test_mlx_lm_refuses_names_that_fit_nothing(folders, tmp_path):
    port = free_port()
    other = renamed(
        folders / "mlx", tmp_path / "other", "adapters.safetensors", lambda name: f"other.{name}"
    )
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folders / "base")]
    command += ["--adapter-path", str(other), "--port", str(port)]
    with (
        running(command, tmp_path, port) as url,
        pytest.raises(ServerError, match="generation thread died"),
    ):
        audited(url, "default_model", folders)


def whole(folders, new, alpha=None, rename=None):
    """A folder as transformers' serve reads one: the base's files and the adapter's."""
    shutil.copytree(folders / "base", new)
    tensors = load_file(folders / "peft" / "adapter_model.safetensors")
    tensors = {rename(name) if rename else name: array for name, array in tensors.items()}
    save_file(tensors, new / "adapter_model.safetensors")
    settings = json.loads((folders / "peft" / "adapter_config.json").read_text())
    settings["lora_alpha"] = alpha or settings["lora_alpha"]
    (new / "adapter_config.json").write_text(json.dumps(settings))
    return new


@needs("transformers", "peft", "fastapi", "uvicorn", "openai")
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "fine"),
        (None, "not-applied"),
        ({"alpha": 16}, "factor"),
        # It warns in its log and serves the base.
        ({"rename": lambda name: name.replace("layers", "blocks")}, "not-applied"),
    ],
)
def test_transformers_serve(folders, tmp_path, change, verdict):
    port = free_port()
    model = folders / "base" if change is None else whole(folders, tmp_path / "model", **change)
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(model), "--device", "cpu"]
    with running([*command, "--port", str(port)], tmp_path, port) as url:
        report = audited(url, str(model), folders)
    found = report.entries[0]
    assert found.verdict == verdict, found.text
    if verdict == "factor":
        assert found.figures["low"] < 2 < found.figures["high"]
