"""An HTTP server with OpenAI's interface that serves minilora's own model, honestly or not.

It computes with merged weights and another softmax than the oracle, so that the two agree only to
rounding.
"""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import ml_dtypes
import numpy as np
from scipy.special import log_softmax

from minilora.io.loading import open_adapted, open_base
from minilora.spec.lora import TrainableSpec, merge
from minilora.spec.models import Batch, logits
from minilora.spec.quantization import dequantize, quantize

ROUNDED = {
    "float32": lambda W: W,
    "bfloat16": lambda W: W.astype(ml_dtypes.bfloat16).astype(np.float32),
    "float16": lambda W: W.astype(np.float16).astype(np.float32),
    "four bits": lambda W: W if min(W.shape) == 1 else dequantize(quantize(W, "nf4", 32)),
}


@dataclass
class Model:
    """What is served: the base, or with the adapter at ``factor``, in rounded weights."""

    base: str = "reference:llama"
    adapter: str | None = "reference:llama"
    factor: float | None = 1.0
    rounding: str = "float32"
    spoil: float = 0.0
    known: dict = field(default_factory=dict)

    def __post_init__(self):
        opened = open_base(self.base)
        self.c, self.tokenizer, self.W = opened.config, opened.tokenizer, dict(opened.weights)
        if self.factor is not None:
            model = open_adapted(opened, self.adapter)
            scale = {at: self.factor * s for at, s in model.tuning.scale.items()}
            tuning = replace(model.tuning, scale=scale, trained=frozenset())
            self.W = dict(merge(dict(model.weights), tuning))
        rng = np.random.default_rng(1)
        self.W = {
            name: ROUNDED[self.rounding](
                W + self.spoil * W.std() * rng.normal(size=W.shape)
            ).astype(np.float32)
            for name, W in self.W.items()
        }

    def logprobs(self, ids):
        """log p of every token after each beginning: (t, v)."""
        key = tuple(ids)
        if key not in self.known:
            z, _ = logits(Batch(np.array([ids])), self.W, self.c, TrainableSpec())
            self.known[key] = log_softmax(z.astype(np.float64).T, axis=1)
        return self.known[key]


@dataclass
class Behaviour:
    """What the server can and does.

    ``forms``: of echo, prompt_logprobs, int, bool (the types that ``logprobs`` may have), plain,
    chat; ``ids``: whether prompts may be token ids; ``lie``: a function that changes the JSON
    before it is sent; ``raw``: a function (handler) that answers in its place.
    """

    forms: tuple = ("echo",)
    ids: bool = True
    digits: int = 17
    lie: object = None
    raw: object = None
    models: tuple = ("m",)
    asked: list = field(default_factory=list)


class Bad(Exception):
    pass


def answer(model, behaviour, path, body):
    """The JSON of an honest server."""
    tokenizer, forms = model.tokenizer, behaviour.forms
    chat = path.endswith("/chat/completions")
    if body["model"] not in behaviour.models:
        raise Bad(404, f"no model {body['model']}")
    if chat and "chat" not in forms:
        raise Bad(404, "no chat")
    if chat:
        ids = tokenizer.encode(tokenizer.chat(body["messages"], True), special=False)
    elif isinstance(body["prompt"], list):
        if not behaviour.ids:
            raise Bad(400, "prompt: expected a text")
        ids = body["prompt"]
    else:
        ids = tokenizer.encode(body["prompt"])
    wanted = body.get("logprobs")
    if wanted is not None and type(wanted).__name__ not in forms and not body.get("echo"):
        raise Bad(400, f"logprobs of type {type(wanted).__name__}")
    p = model.logprobs(ids)
    new = list(ids)
    numbers = []
    for _ in range(body["max_tokens"]):
        last = model.logprobs(new)[-1]
        new.append(int(last.argmax()))
        numbers.append(float(last.max()))
    text = tokenizer.decode(new[len(ids) :])
    choice = {"index": 0, "finish_reason": "length"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    own = [None] + [float(p[t - 1, ids[t]]) for t in range(1, len(ids))]

    def rounded(x):
        return x if x is None else float(f"{x:.{behaviour.digits}g}")

    if body.get("echo") and "echo" in forms:
        shown = [tokenizer.token_text(i) for i in new]
        choice["logprobs"] = {"tokens": shown, "token_logprobs": [*map(rounded, own + numbers)]}
    elif wanted is not None and not body.get("echo"):
        choice["logprobs"] = {
            "content": [
                {"token": tokenizer.token_text(i), "logprob": rounded(x)}
                for i, x in zip(new[len(ids) :], numbers, strict=True)
            ]
        }
    if "prompt_logprobs" in body and "prompt_logprobs" in forms:
        entries = zip(ids[1:], own[1:], strict=True)
        choice["prompt_logprobs"] = [None] + [{str(i): {"logprob": rounded(x)}} for i, x in entries]
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(numbers)}
    return {"model": body["model"], "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body, kind="application/json", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        behaviour = self.server.behaviour
        if behaviour.raw:
            return behaviour.raw(self)
        return self.send(200, {"data": [{"id": name} for name in behaviour.models]})

    def do_POST(self):
        behaviour = self.server.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        behaviour.asked.append((self.path, body, dict(self.headers)))
        if behaviour.raw:
            return behaviour.raw(self)
        try:
            found = answer(self.server.model, behaviour, self.path, body)
        except Bad as error:
            return self.send(error.args[0], {"error": {"message": error.args[1]}})
        if behaviour.lie:
            found = behaviour.lie(found)
        return self.send(200, found)


@contextmanager
def serving(model=None, **behaviour):
    """The URL of a server that runs meanwhile, and its `Behaviour`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.model, server.behaviour = model, Behaviour(**behaviour)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.behaviour
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slowly(handler, head, part, pause=0.02, times=10_000):
    """Send ``head``, then ``part`` again and again."""
    try:
        handler.wfile.write(head)
        for _ in range(times):
            handler.wfile.write(part)
            handler.wfile.flush()
            time.sleep(pause)
    except OSError:  # the client has gone
        pass
