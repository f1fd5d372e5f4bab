"""An OpenAI-compatible endpoint on this machine, for tests: it answers by a rule, fails and dawdles on request, and counts requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

KEY = "sk-test-0123456789"


class Reply(NamedTuple):
    """What is sent back: plain data becomes JSON, text and bytes are sent as they are."""

    status: int = 200
    body: Any = ""
    headers: Mapping[str, str] = {}


def said(text: str | None, *, prompt: int | None = 10, completion: int = 5, model: str = "stub-2026") -> Reply:
    """A chat completion; without a count of tokens where `prompt` is None."""
    usage = {} if prompt is None else {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return Reply(body={"object": "chat.completion", "model": model, "choices": [choice], **usage})


def refused(status: int, message: str = "no", *, code: str = "", **headers: str) -> Reply:
    """An error as OpenAI writes it."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Reply(status, {"error": {"message": message, "code": code}}, named)


@dataclass
class Stub:
    """A running endpoint."""

    url: str = ""
    answer: Callable[[dict[str, Any]], str | Reply] = lambda body: "yes"
    """From a request's body to what is said."""
    failures: list[Reply] = field(default_factory=list)
    """What the first requests get instead, in turn."""
    slow: float = 0.0
    """Seconds before each answer."""
    key: str | None = None
    """Requests with another one are refused; None: any will do."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """What was asked."""
    paths: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[str]:
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def reply(self, path: str, body: dict[str, Any], authorization: str | None) -> Reply:
        """What a request gets."""
        with self._lock:
            self.paths.append(path)
            self.bodies.append(body)
            self.authorizations.append(authorization)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            failure = self.failures.pop(0) if self.failures else None
        time.sleep(self.slow)
        found = self.answer(body) if failure is None else failure
        with self._lock:
            self._now -= 1
        if self.key is not None and authorization != f"Bearer {self.key}":
            return refused(401, f"Incorrect API key provided: {(authorization or '').removeprefix('Bearer ')}")
        return said(found) if isinstance(found, str) else found


@contextmanager
def serving(stub: Stub) -> Iterator[Stub]:
    """A stub that can be asked, on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8"))
            reply = stub.reply(self.path, body, self.headers.get("Authorization"))
            sent = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
            sent = sent.encode() if isinstance(sent, str) else sent
            try:
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(sent))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(sent)
            except OSError:
                # Whoever asked no longer listens.
                self.close_connection = True

        def log_message(self, *said: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
