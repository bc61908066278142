"""A side's process: it loads what it measures, and works when a line tells it to."""

import contextlib
import json
import os
import resource
import sys
import time
from importlib import import_module
from typing import Any

from minilora.studies.bench.cases import KINDS
from minilora.studies.bench.sides import Missing


def peak_memory() -> int:
    """The most bytes that this process has held at a time.

    Linux has it in a file; ``ru_maxrss`` there counts the process that started this one too.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(target: str, given: str) -> None:
    """Serves ``[what, times]`` lines: a method of the side, or "memory"."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    module, _, name = target.partition(":")
    try:
        side = getattr(import_module(module), name)(**json.loads(given))
    except ModuleNotFoundError as error:
        extra = "jax" if str(error.name).startswith("jax") else "peers"
        return answer(missing=f"{error.name} is not installed; pip install 'minilora[{extra}]'")
    except Missing as error:
        return answer(missing=str(error))
    answer(versions=side.versions, kinds=[kind for kind in KINDS if hasattr(side, kind)])
    for line in sys.stdin:
        what, times = json.loads(line)
        if what == "memory":
            answer(value=peak_memory())
            continue
        run = getattr(side, what)
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            value = run()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        answer(seconds=seconds, cpu=cpu, value=value)


if __name__ == "__main__":
    main(*sys.argv[1:])
