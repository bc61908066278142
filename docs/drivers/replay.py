"""Replays a transcript to a driver: python replay.py transcript.json ./driver ARGUMENTS.

Needs no package.

Sends each recorded line, with the recorded arrays in files, and compares what comes back.
"""

import json
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path

CODES = {"F64": "d", "F32": "f", "I64": "q", "BOOL": "B"}


def write(path, tensors):
    """A safetensors file: 8 bytes with the header's length, the header in JSON, the numbers."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        numbers = array(CODES[tensor["dtype"]], tensor["data"]).tobytes()
        ends = [len(data), len(data) + len(numbers)]
        header[name] = {"dtype": tensor["dtype"], "shape": tensor["shape"], "data_offsets": ends}
        data += numbers
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read(path):
    """The tensors of such a file, each with its dtype, shape and numbers."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            a, b = (start + end for end in entry.pop("data_offsets"))
            found[name] = entry | {"data": array(CODES[entry["dtype"]], data[a:b]).tolist()}
    return found


def agrees(got, recorded):
    """Whether an answer has what was recorded; a text may be another."""
    if isinstance(recorded, dict):
        return isinstance(got, dict) and all(agrees(got.get(k), v) for k, v in recorded.items())
    return isinstance(got, str) if isinstance(recorded, str) else got == recorded


transcript, *command = sys.argv[1:]
driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
exchanges, wrong = json.loads(Path(transcript).read_text())["exchanges"], []
with tempfile.TemporaryDirectory() as folder:
    for number, exchange in enumerate(exchanges):
        send, out = dict(exchange["send"]), Path(folder) / "out"
        if "in" in send:
            write(Path(folder) / "in", exchange["in"])
            send |= {"in": f"{folder}/in", "out": str(out)}
        driver.stdin.write(json.dumps(send) + "\n")
        driver.stdin.flush()
        if "receive" not in exchange:
            continue
        answer = json.loads(driver.stdout.readline() or "{}")
        ok = agrees(answer, exchange["receive"])
        if ok and "out" in exchange:
            ok = read(out) == exchange["out"]
        if not ok:
            wrong.append(f"{number}: {json.dumps(send)[:200]} -> {json.dumps(answer)[:200]}")
driver.stdin.close()
print(f"{len(exchanges) - len(wrong)} of {len(exchanges)} as recorded", *wrong, sep="\n")
sys.exit(bool(wrong) or driver.wait())
