"""Servers that are slow, refuse, cut off or lie: a clear message each, and what nobody is sent."""

import socket
import threading

import pytest
from completions_server import Model, serving, slowly

from minilora.audit.served import ServerError, served
from minilora.audit.served.client import LARGEST_BODY, Client, Refused, key_of
from minilora.cli.main import main

pytestmark = pytest.mark.slow

LLAMA = "reference:llama"
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def right():
    return Model()


def asked(url, *more):
    return main(
        [
            "audit",
            "served",
            "--url",
            url,
            "--model",
            "m",
            "--base",
            LLAMA,
            "--adapter",
            LLAMA,
            *more,
        ]
    )


def html(handler):
    handler.send(200, b"<html><body>Log in \x1b[31m</body></html>", "text/html")


def not_json(handler):
    handler.send(200, b'{"choices": [')


def status(number, text=""):
    return lambda handler: handler.send(number, {"error": {"message": text}})


def cut_off(handler):
    handler.wfile.write(OK + b"Content-Length: 1000\r\n\r\n{")
    handler.close_connection = True


def no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")
    handler.close_connection = True


def redirect(handler):
    handler.send(307, b"", Location="http://127.0.0.1:9/v1")


def silent(handler):
    slowly(handler, b"", b"")


def dripping(handler):
    slowly(handler, OK + b"\r\n", b" ")


def dripping_header(handler):
    slowly(handler, OK, b"X-A: 1\r\n", 0.1)


def endless(handler):
    slowly(handler, OK + b"\r\n", b" " * 2**20, 0)


def deep(handler):
    handler.send(200, b"[" * 10**6)


RAW = {
    html: "text/html, not JSON: '<html><body>Log in [31m",
    not_json: "not JSON",
    status(401): "--api-key-env",
    status(403): "--api-key-env",
    status(404, "no such route"): "status 404: no such route",
    status(500, "out of\nmemory"): "status 500: out of memory",
    cut_off: "cut off",
    no_http: "not HTTP",
    redirect: "status 307 to http://127.0.0.1:9/v1",
    silent: "no answer in 0.3 s",
    dripping: "no answer in 0.3 s",
    dripping_header: "no answer in 0.3 s",
    deep: "not JSON",
}


@pytest.mark.parametrize("raw", RAW, ids=lambda raw: raw.__name__)
def test_a_server_that_cannot_be_used_is_told_of(raw, capsys):
    with serving(raw=raw) as (url, _):
        assert asked(url, "--timeout", "0.3" if "0.3" in RAW[raw] else "20") == 3
    message = capsys.readouterr().err
    assert url in message
    assert RAW[raw] in message
    assert "\x1b" not in message


def test_an_endless_answer_is_read_to_a_bound():
    with serving(raw=endless) as (url, _), pytest.raises(ServerError, match=str(LARGEST_BODY)):
        Client(url, 60).ask("/models")


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ServerError, match="refused"):
            Client(url).ask("/models")


def test_a_server_that_only_accepts_times_out():
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"no answer in 0\.2 s"):
            Client(url, 0.2).ask("/models")


def test_https_is_not_asked_of_a_server_without_it():
    with serving(raw=html) as (url, _), pytest.raises(ServerError, match="TLS"):
        Client(url.replace("http", "https"), 5).ask("/models")


@pytest.mark.parametrize(
    "url",
    ["ftp://h", "h:80", "http://", "http://u:p@h", "http://h/?a=b", "http://h:x", "http://h\n"],
)
def test_a_wrong_url_is_wrong_usage(url, capsys):
    assert asked(url) == 2
    assert "--url" in capsys.readouterr().err


def test_the_password_in_a_url_is_not_shown(capsys):
    asked("http://user:secret@host")
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/proxy", "/proxy/v1"])
def test_the_address_may_have_v1_or_not(end):
    path = Client("http://127.0.0.1:1" + end).path
    assert path == ("/proxy/v1" if "proxy" in end else "/v1")


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("KEY", "sk-123")
    with serving(raw=status(500, "wrong key sk-123")) as (url, behaviour):
        assert asked(url, "--api-key-env", "KEY") == 3
    assert behaviour.asked[0][2]["Authorization"] == "Bearer sk-123"
    message = capsys.readouterr().err
    assert "sk-123" not in message
    assert "***" in message


def test_without_the_option_no_key_is_sent(right):
    with serving(right) as (url, behaviour):
        served(url, "m", LLAMA, LLAMA)
    assert not any("Authorization" in headers for _, _, headers in behaviour.asked)


@pytest.mark.parametrize("value", [None, " "])
def test_a_variable_without_a_key_is_wrong_usage(monkeypatch, value):
    monkeypatch.delenv("KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("KEY", value)
    with pytest.raises(ValueError, match="KEY"):
        key_of("KEY")


def test_no_proxy_is_used(monkeypatch, right):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with serving(right) as (url, _):
        assert served(url, "m", LLAMA, LLAMA).exit_status == 0


def test_a_redirect_is_not_followed():
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        thread = threading.Thread(target=lambda: seen.extend(_accepted(other)))
        thread.start()
        where = f"http://127.0.0.1:{other.getsockname()[1]}/v1"
        with (
            serving(raw=lambda handler: handler.send(302, b"", Location=where)) as (url, _),
            pytest.raises(ServerError, match="no redirect is followed"),
        ):
            Client(url, key="secret").ask("/models")
        thread.join()
    assert not seen


def _accepted(server):
    try:
        yield server.accept()
    except TimeoutError:
        return


def test_what_a_server_refuses_says_the_status():
    with serving(raw=status(404, "nothing")) as (url, _), pytest.raises(Refused) as refused:
        Client(url).ask("/models")
    assert refused.value.status == 404


def test_an_error_in_an_answer_of_status_200_is_one():
    with (
        serving(raw=lambda h: h.send(200, {"error": "busy"})) as (url, _),
        pytest.raises(Refused, match="busy"),
    ):
        Client(url).ask("/models")


def token_logprobs(change):
    """A lie about the prompt's log-probabilities."""

    def lie(answer):
        found = answer["choices"][0].get("logprobs")
        if found:
            found["token_logprobs"] = change(found["token_logprobs"])
        return answer

    return lie


def with_tokens(answer):
    if found := answer["choices"][0].get("logprobs"):
        found["tokens"] = ["other"] * len(found["tokens"])
    return answer


LIES = {
    "NaN": (token_logprobs(lambda p: [float("nan")] * len(p)), "nan for a log-probability"),
    "text": (token_logprobs(lambda p: ["-1"] * len(p)), "-1 for a log-probability"),
    "positive": (token_logprobs(lambda p: [1.5] * len(p)), "1.5, which is above 0"),
    "none": (token_logprobs(lambda p: [None] * len(p)), "without log-probabilities"),
    "short": (token_logprobs(lambda p: p[:1]), "log-probabilities of 1 tokens"),
    "shape": (token_logprobs(lambda p: {"a": p}), "unknown shape"),
    "tokens": (with_tokens, "the token 'other' where"),
    "count": (lambda a: a | {"usage": {"prompt_tokens": 999}}, "999 tokens in a prompt"),
    "no choices": (lambda a: {}, "without choices"),
    "a list": (lambda a: [a], "without choices"),
    "a number": (lambda a: 7, "without choices"),
    "other choices": (lambda a: {"choices": [7]}, "without choices"),
    "null": (lambda a: {"choices": None, "usage": None}, "without choices"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_server_is_told_of(lie, right, capsys):
    change, expected = LIES[lie]

    def no_text(answer):  # or what it generates would still be compared
        found = change(answer)
        if isinstance(found, dict) and isinstance(found.get("choices"), list):
            for choice in found["choices"]:
                if isinstance(choice, dict):
                    choice.pop("text", None)
        return found

    with serving(right, lie=no_text) as (url, _):
        assert asked(url) == 3
    assert expected in capsys.readouterr().err


def test_an_echo_that_is_off_by_one_is_not_believed(right):
    """As llama-cpp-python 0.3.36 gives it where no token begins a text."""

    def lie(answer):
        found = answer["choices"][0].get("logprobs", {})
        if "token_logprobs" in found:
            first, *rest = found["token_logprobs"]
            found["token_logprobs"] = [first, *rest[1:], -9.0]
        return answer

    with serving(right, lie=lie, forms=("echo", "bool")) as (url, _):
        report = served(url, "m", LLAMA, LLAMA)
    assert report.exit_status == 0
    assert any("they were not used" in entry.text for entry in report.entries)


def test_another_name_in_the_answers_is_noted(right):
    with serving(right, lie=lambda a: a | {"model": "gpt\x1b[2J"}) as (url, _):
        report = served(url, "m", LLAMA, LLAMA)
    assert report.exit_status == 0
    (entry,) = [e for e in report.entries if e.subject == "name of the model"]
    assert "gpt [2J" in entry.text


def test_a_name_that_the_server_does_not_list_is_noted(right):
    def more(answer):
        return answer

    with serving(right, models=("a", "b", "m"), lie=more) as (url, behaviour):
        assert served(url, "m", LLAMA, LLAMA).worst_first[0].verdict != "doubtful"
        behaviour.models = ("a", "b")
        with pytest.raises(ServerError, match="no model m"):
            served(url, "m", LLAMA, LLAMA)


def test_a_server_that_stops_answering_is_undecided(right, capsys):
    count = []

    def lie(answer):
        count.append(1)
        return answer if len(count) < 3 else {}

    with serving(right, lie=lie) as (url, _):
        assert asked(url) == 4
    out = capsys.readouterr().out
    assert "cannot be told yet" in out
    assert "JSON without choices" in out
