"""A small server with OpenAI's interface for chats, for trying a run in other programs: prompts, edits and adapters stay attached.

It answers one request at a time and reads no file. Many users at once, or many requests, are for vLLM and its relatives, which take what
`luthier export` writes.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from luthier.errors import LuthierError, Say, printable, silent
from luthier.generation.endpoint_address import is_here
from luthier.runs.completions import Completions, RefusedError, Written, event

MOST_BYTES = 1 << 20
"""Largest request."""
CONNECTIONS = 64
"""Most connections at once."""
KEY = "LUTHIER_API_KEY"
"""The environment variable with the key that requests have to bring; without it none is asked for."""
_PATIENCE_SECONDS = 60.0
_LEFT_UNREAD = 16 * MOST_BYTES
"""Of what a refused client still sends, what is taken off its hands."""
_CHAT = "/v1/chat/completions"
_MODELS = "/v1/models"


def serve(completions: Completions, *, host: str = "127.0.0.1", port: int = 8000, say: Say = silent) -> Server:
    """Listen; `serve_forever` of what is returned answers.

    Args:
        completions: what answers.
        host: the address to listen on; others than this machine's own can be reached by whoever reaches this machine.
        port: 0 for one that is free.
        say: hears of requests.

    Raises:
        LuthierError: the address cannot be listened on.
    """
    if not 0 <= port < 1 << 16:
        raise LuthierError(f"there is no port {port}", where="--port", fix="use 0 to 65535")
    try:
        return Server(completions, host, port, say)
    except OSError as error:
        raise LuthierError(
            f"{host}, port {port}, cannot be listened on: {error.strerror or error}",
            where="--port",
            fix="choose another --port, or an address of this machine as --host",
        ) from error


class Server(ThreadingHTTPServer):
    """Serves one model."""

    daemon_threads = True

    def __init__(self, completions: Completions, host: str, port: int, say: Say) -> None:
        self.completions, self.host, self.say = completions, host, say
        self.key = os.environ.get(KEY, "").strip()
        self.open_to_others = not is_here(host)
        self._connections = threading.BoundedSemaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/v1"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Refuse connections beyond the most there may be."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection until it ends."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of the server."""
        self.say(f"a connection from {client_address[0]} broke off")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "luthier", ""
    timeout = _PATIENCE_SECONDS

    @property
    def mine(self) -> Server:
        return cast(Server, self.server)

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        self.mine.say(printable(format % args))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library itself refuses, as JSON too."""
        self.close_connection = True
        self._send(code, RefusedError(message or HTTPStatus(code).phrase, status=code).body)

    def _guarded(self, do: Any) -> None:
        try:
            self._check_sender()
            do()
        except RefusedError as error:
            self._refuse(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _refuse(self, error: RefusedError) -> None:
        """Answer with an error. What was not read of the request would be taken for the next one, so the connection ends."""
        self.close_connection = True
        try:
            self._send(error.status, error.body)
            # Bytes that lie unread when a connection ends can cost the client the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1.0)
            for _ in range(_LEFT_UNREAD // MOST_BYTES):
                if not self.rfile.read1(MOST_BYTES):
                    return
        except OSError:
            return

    def _check_sender(self) -> None:
        """Refuse what a page in a browser sends by another name of this machine, and whoever lacks the key."""
        host = (self.headers.get("Host") or "").strip()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if not self.mine.open_to_others and not is_here(name) and name != self.mine.host:
            raise RefusedError(f"this server is not `{name}`", status=403, code="wrong_host")
        if self.headers.get("Origin"):
            raise RefusedError("pages in a browser are not answered", status=403, code="wrong_origin")
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if self.mine.key and not hmac.compare_digest(given.encode(), self.mine.key.encode()):
            raise RefusedError("the key is missing or another one", status=401, code="invalid_api_key")

    def _get(self) -> None:
        path, mine = self.path.partition("?")[0].rstrip("/"), self.mine.completions
        if path == "/health":
            self._send(200, {"status": "ok"})
        elif path == _MODELS:
            self._send(200, {"object": "list", "data": [mine.model()]})
        elif path == f"{_MODELS}/{mine.name}":
            self._send(200, mine.model())
        else:
            raise RefusedError(f"there is nothing to get at {_MODELS} but the model `{mine.name}`", status=404, code="not_found")

    def _post(self) -> None:
        if self.path.partition("?")[0].rstrip("/") != _CHAT:
            raise RefusedError(f"requests are answered at {_CHAT}", status=404, code="not_found")
        request = self.mine.completions.check(self._body())
        written = Written(self.mine.completions.name, request)
        if request.stream:
            self._stream(written)
            return
        answered = self.mine.completions.answer(request, lambda text: True)
        self._send(200, written.whole(answered))

    def _body(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise RefusedError("the body must be `Content-Type: application/json`", status=415)
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            raise RefusedError("the length of the body must be named by Content-Length", status=411)
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise RefusedError(f"the body is larger than {MOST_BYTES} bytes", status=413)
        try:
            return json.loads(self.rfile.read(int(length)), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body is no JSON: {printable(str(error))}") from error

    def _stream(self, written: Written) -> None:
        begun = False

        def tell(*documents: Any) -> bool:
            nonlocal begun
            if not begun:
                begun = self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                self.send_header("Cache-Control", "no-cache")
                self.send_header("Connection", "close")
                self.end_headers()
                documents = (written.piece({"role": "assistant", "content": ""}), *documents)
            try:
                self.wfile.write(b"".join(map(event, documents)))
                self.wfile.flush()
            except OSError:
                # Whoever asked has gone: the answer ends here.
                return False
            return True

        try:
            answered = self.mine.completions.answer(written.request, lambda text: tell(written.piece({"content": text})))
        except RefusedError as error:
            if not begun:
                raise
            tell(error.body)
            return
        tell(*written.end(answered), "[DONE]")

    def _send(self, status: int, document: Mapping[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
