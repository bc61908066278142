"""A small HTTP client for one server: bounded in time and memory, without proxies or redirects."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from minilora.io.errors import FormatError

LARGEST_BODY = 2**24
"""So many bytes of an answer are read at most. Top log-probabilities of 1000 tokens need 1 MB."""

SHOWN = 200
"""So many characters of what a server says are shown."""


class ServerError(FormatError):
    """A server that cannot be reached, or whose answers cannot be used."""


class Refused(Exception):
    """The server answers, but not with what was asked for: another form of request may do."""

    def __init__(self, found: str, status: int = 200) -> None:
        super().__init__(found)
        self.status = status


class Client:
    """Asks the server at ``url``, the address that clients of OpenAI's interface call base URL.

    ``key``: sent as a bearer token, to this server alone; ``timeout``: seconds that one request
    may take, from connecting to the last byte.

    Errors: ValueError for a URL that is none of http or https, or holds a user, a query or a
    fragment.
    """

    def __init__(self, url: str, timeout: float = 60.0, key: str = "") -> None:
        self.url, self.timeout, self.key = url, timeout, key
        if not (url + key).isascii() or any(c <= " " or c == "\x7f" for c in url + key):
            raise ValueError("--url, or the key: found a blank or a sign that is not ASCII")
        try:
            parts = urlsplit(url)
            self.port, self.host = parts.port, parts.hostname or ""
        except ValueError as error:
            raise ValueError(f"--url {url}: {error}") from None
        if parts.username is not None or parts.query or parts.fragment:
            found = "found a user, a query or a fragment"
            raise ValueError(f"--url: {found}; leave it out, and give a key by --api-key-env")
        if parts.scheme not in ("http", "https") or not self.host:
            raise ValueError(f"--url {url}: expected http://HOST:PORT or https://HOST")
        self.secure = parts.scheme == "https"
        path = parts.path.rstrip("/")
        self.path = path if path.endswith("/v1") else f"{path}/v1"

    def ask(self, path: str, body: Any = None) -> Any:
        """The JSON that the server answers at ``path``, to a GET, or to a POST of ``body``.

        Errors: ServerError if it cannot be reached, is too slow, cuts off, sends too much, asks for
        a key, or redirects; Refused if it answers, but not with JSON, or with another status.
        """
        try:
            status, headers, data = self._exchange(path, body)
        except ssl.SSLError as error:
            raise self.error("connection", _words(error), "TLS", "check https and port") from None
        except (socket.gaierror, ConnectionRefusedError) as error:
            expected = "a server that listens there"
            raise self.error("connection", _words(error), expected, "start it, check --url") from (
                None
            )
        except TimeoutError:
            found, expected = f"no answer in {self.timeout:g} s", "a whole answer"
            raise self.error(path, found, expected, "raise --timeout") from None
        except (http.client.HTTPException, OSError, ValueError) as error:
            found = f"an answer cut off or not HTTP ({_words(error)})"
            raise self.error(path, found, "a whole answer", "see the server's log") from None
        return self._json(path, status, headers, data)

    def _json(self, path: str, status: int, headers: Any, data: bytes) -> Any:
        if 300 <= status < 400:
            where = self.shown(headers.get("Location") or "nowhere")
            remedy = "give that server by --url if you trust it: no redirect is followed"
            raise self.error(path, f"status {status} to {where}", "an answer", remedy)
        if status in (401, 403):
            remedy = "name the variable of the environment that holds a key by --api-key-env"
            raise self.error(path, f"status {status}", "an answer", remedy)
        if len(data) > LARGEST_BODY:
            found, expected = f"more than {LARGEST_BODY} bytes", "a shorter answer"
            raise self.error(path, found, expected, "is it another kind of server?")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            kind = self.shown(headers.get("Content-Type") or "no type")
            text = self.shown(data[: 4 * SHOWN].decode("utf-8", "replace"))
            found = f"status {status}, {kind}, not JSON: {text!r}"
            raise Refused(found, status) from None
        error = answer.get("error") if isinstance(answer, dict) else None
        if status != 200 or error:
            said = error.get("message", error) if isinstance(error, dict) else error or answer
            raise Refused(f"status {status}: {self.shown(str(said))}", status)
        return answer

    def error(self, field: str, found: object, expected: object, remedy: str) -> ServerError:
        """The error of this server."""
        return ServerError(self.url, field, found, expected, remedy)

    def shown(self, text: str) -> str:
        """What the server said, short, on one line, without control characters and the key."""
        if self.key:
            text = text.replace(self.key, "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + "…"

    def _exchange(self, path: str, body: Any) -> tuple[int, Any, bytes]:
        """The status, the headers and at most `LARGEST_BODY` + 1 bytes of the answer."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=self.timeout)
        late, sockets = threading.Event(), list[socket.socket]()

        def stop() -> None:  # a server that sends a byte now and then never times out
            late.set()
            for one in sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)  # which the connection forgets before the answer's end
            answer = self._read(connection, path, body)
            if late.is_set():  # what ends with the connection looks whole
                raise TimeoutError
            return answer
        except (http.client.HTTPException, OSError, ValueError):
            if late.is_set():
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()
            connection.close()

    def _read(self, connection: Any, path: str, body: Any) -> tuple[int, Any, bytes]:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection.request("GET" if body is None else "POST", self.path + path, data, headers)
        response = connection.getresponse()
        read = bytearray()
        while len(read) <= LARGEST_BODY and (part := response.read1(2**16)):
            read += part
        if len(read) <= LARGEST_BODY and response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return response.status, response.headers, bytes(read)


def _words(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or error  # without the error's number
    text = " ".join(str(said).split()) or type(error).__name__
    return text[:SHOWN]


def key_of(variable: str | None) -> str:
    """The key in this variable of the environment; no key for None.

    Errors: ValueError if it is not set.
    """
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"--api-key-env {variable}: the variable is not set, or empty")
    return key
