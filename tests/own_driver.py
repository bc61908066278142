"""minilora itself behind the line protocol, in another process: every method that it carries."""

import json
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from minilora.verify.implementation.contract import METHODS, SESSION, positional
from minilora.verify.implementation.messages import CARRIED, RESULTS
from minilora.verify.implementation.minilora_impl import Minilora


def put(tree, path, array):
    """An array in the place that its name in the file says."""
    key, _, rest = path.partition(".")
    at = int(key) if isinstance(tree, list) else key
    if rest and (isinstance(tree, list) or key in tree):
        put(tree[at], rest, array)
    else:
        tree[at if isinstance(tree, list) else path] = array


def flat(value, path=""):
    """The arrays of an answer by their names in the file."""
    if isinstance(value, dict | list):
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, entry in entries for k, v in flat(entry, f"{path}{key}.").items()}
    return {path[:-1]: np.array(value, order="C")}  # the library takes memory as it lies


def run(message):
    settings = message["settings"]
    with safe_open(message["in"], framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            put(settings, name, file.get_tensor(name))
    method = message["method"]
    if method.startswith("session."):
        if method == "session.end":
            del sessions[message["session"]]
            return
        name = method.removeprefix("session.")
        arguments = [settings[argument] for argument in positional(name, SESSION)]
        answer = getattr(sessions[message["session"]], name)(*arguments)
        if answer is not None:
            answer = {RESULTS[method]: answer} if method in RESULTS else answer
            save_file(flat(answer), message["out"])
        return
    keyword = "*" in METHODS[method]
    names = positional(method)
    given = {name: settings.pop(name) for name in names if name != "settings"}
    arguments = [given.get(name, settings) for name in names]  # what is left are the settings
    answer = getattr(own, method)(*arguments, **(settings if keyword else {}))
    if method == "session":
        sessions[message["seq"]] = answer
        return
    if answer is None:  # of save, which leaves files and says nothing
        return
    if method == "trainable":  # names alone
        answer = dict.fromkeys(answer, True)
    if isinstance(answer, tuple):  # of merge, with a bias
        answer = dict(zip((RESULTS[method], "bias"), answer, strict=True))
    elif method in RESULTS:
        answer = {RESULTS[method]: answer}
    save_file(flat(answer), message["out"])


own = Minilora()
sessions = {}
implementation = {
    "name": own.name,
    "version": own.version,
    "language": "Python",
    "methods": [name for name in CARRIED if hasattr(own, name.partition(".")[0])],
    "dtypes": own.dtypes,
    "precision": own.precision,
    "conventions": own.conventions,
    "mixed": own.mixed,
}
for line in sys.stdin:
    message = json.loads(line)
    if message["cmd"] == "stop":
        break
    answer = {"seq": message["seq"], "ok": True}
    if message["cmd"] == "start":
        answer = {"seq": 0, "protocol": 1, "implementation": implementation}
    else:
        try:
            run(message)
        except ValueError as error:  # what a session refuses
            answer = {"seq": message["seq"], "error": {"message": str(error)}}
    print(json.dumps(answer), flush=True)
