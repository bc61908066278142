"""How quick `minilora audit merged` is beside reading the same files, of the disk and of memory.

``python -m merge_catalogue.speed --output FILE`` records it on SmolLM2-135M with an adapter of rank
16 on all linear layers: the best of several runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path

from merge_catalogue.side_by_side import table
from merge_catalogue.worlds import BF16, F16, F32, adapt, smollm2, write_model
from minilora.audit.merged import merged

DTYPES = {"float32": F32, "bfloat16": BF16, "float16": F16}
BLOCK = 2**20


def dropped(files):
    """Take the files out of the system's memory."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files):
    """Read the files from one end to the other."""
    buffer = bytearray(BLOCK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def best(work, before, runs):
    """The seconds of the quickest run, and the processor's in it."""
    times = []
    for _ in range(runs):
        before()
        began, cpu = time.monotonic(), time.process_time()
        work()
        times.append((time.monotonic() - began, time.process_time() - cpu))
    return min(times)


def measured(dtype, runs, layers=None):
    """A row for a right merge, and one for a merged model that is the base again."""
    world = adapt(smollm2(DTYPES[dtype], layers=layers), r=16, effect=0.02)
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = world.write(Path(folder))
        model = write_model(Path(folder) / "merged", world.merge(), world.config)
        for label, there in (("right", model), ("the base again", base)):
            copies = [base / "model.safetensors", there / "model.safetensors"]
            files = list(dict.fromkeys([*copies, adapter / "adapter_model.safetensors"]))

            def audit(there=there, label=label):
                assert merged(base, adapter, there).exit_status == int(label != "right")

            row = {"dtype": dtype, "merge": label, "bytes": sum(f.stat().st_size for f in copies)}
            for name, work in (("read", partial(read, copies)), ("audit", audit)):
                for state in ("cold", "warm"):
                    before = partial(dropped if state == "cold" else read, files)
                    row[f"{name} {state}"], row[f"{name} {state} cpu"] = best(work, before, runs)
            yield row


def speed_table(data):
    """Gigabytes a second, and the audit's share of reading."""

    def rate(row, name):
        return row["bytes"] / 1e9 / row[name]

    rows = []
    for row in data["rows"]:
        shares = (row[f"read {state}"] / row[f"audit {state}"] for state in ("cold", "warm"))
        rows.append(
            [
                row["dtype"],
                row["merge"],
                f"{row['bytes'] / 1e9:.2f} GB",
                *(
                    f"{rate(row, f'{n} {s}'):.2f}"
                    for s in ("cold", "warm")
                    for n in ("read", "audit")
                ),
                *(f"{share:.0%}" for share in shares),
                f"{row['audit warm cpu'] / row['bytes'] * 1e9:.2f}",
            ]
        )
    head = ["base", "merged model", "base and merged", "read, disk", "audited", "read, memory",
            "audited", "of the disk's", "of the memory's", "processor s/GB"]  # fmt: skip
    return table(head, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, help="so many of the model's 30 layers alone")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    rows = [r for dtype in DTYPES for r in measured(dtype, options.runs, options.layers)]
    machine = f"{os.cpu_count()} processors, {platform.machine()}"
    data = {"machine": machine, "layers": options.layers, "rows": rows}
    Path(options.output).write_text(json.dumps(data, indent=1) + "\n")
    print(speed_table(data))


if __name__ == "__main__":
    main()
