"""A side of a benchmark: a process of its own that works when it is told to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

SIDES = {
    "minilora": "minilora.studies.bench.minilora_side:MiniloraSide",
    "peft": "minilora.studies.bench.peers.peft:Peft",
    "peft-warm": "minilora.studies.bench.peers.peft:Warm",
    "torch": "minilora.studies.bench.peers.torch:ByHand",
    "torch-compile": "minilora.studies.bench.peers.torch:Compiled",
    "jax": "minilora.studies.bench.peers.jax:Jax",
}
"""What can be measured, each with its class; beside itself, this package shows what options do."""


class Missing(Exception):
    """What a side needs is not installed; the message says how to install it."""


class Side:
    """One side in a process of its own, which works when it is told to.

    ``kinds`` are those of `KINDS` that it can do.
    Errors: Missing without its library; RuntimeError with what the process said when it ended.
    """

    def __init__(self, name: str, folder: Path, threads: int, **options: Any) -> None:
        self.name, self.error = name, folder / f"{name}-{os.urandom(4).hex()}.txt"
        given = json.dumps({"folder": str(folder), "threads": threads, **options})
        command = [sys.executable, "-m", "minilora.studies.bench.worker", SIDES[name], given]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        with self.error.open("w") as error:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=error,
                text=True,
                env=environment,
            )
        try:
            answer = self._answer()
            if "missing" in answer:
                raise Missing(f"{name} cannot be measured: {answer['missing']}")
        except BaseException:
            self.close()
            raise
        self.versions: str = answer["versions"]
        self.kinds: list[str] = answer["kinds"]

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        line = self._stream(self.process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.error.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def run(self, what: str, times: int = 1) -> dict[str, Any]:
        """{"seconds", "cpu", "value"}: how long ``what`` took, so many times; what it gave last."""
        stream = self._stream(self.process.stdin)
        stream.write(json.dumps([what, times]) + "\n")
        stream.flush()
        return self._answer()
