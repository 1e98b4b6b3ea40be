"""A stand-in on this machine for an OpenAI-compatible endpoint, for what asks one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a-key-of-the-endpoint"
_PATHS = ("/v1/chat/completions", "/v1/completions")


class StandIn(ThreadingHTTPServer):
    """Repeats the last word of the last message or text as its answer; refuses `too long`, and fails at `break`."""

    def __init__(self, models: tuple[str, ...] = ("demo",), key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.key = models, key
        self.seen: list[dict[str, Any]] = []
        self.owner = "test"
        self.listed: Any = None
        """What /models says instead of these."""

    def handle_error(self, *_: Any) -> None:
        """A client that has gone away is nothing to print."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._allowed():
            data = [
                {"id": name, "object": "model", "created": 0, "owned_by": self.server.owner}
                for name in self.server.models
            ]
            said = {"object": "list", "data": data} if self.server.listed is None else self.server.listed
            self._send(200 if self.path == "/v1/models" else 404, said)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        if self.path not in _PATHS or body["model"] not in self.server.models:
            self._error(404, "The model does not exist")
            return
        self.server.seen.append(body)
        is_chat = self.path == _PATHS[0]
        said = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if said in ("too long", "break"):
            self._error(400 if said == "too long" else 501, f"{said}, says the endpoint")
            return
        word = said.split()[-1]
        answer = {"message": {"role": "assistant", "content": word}} if is_chat else {"text": word}
        choices = [{"index": 0, "finish_reason": "length" if "forever" in said else "stop", **answer}]
        kind = "chat.completion" if is_chat else "text_completion"
        self._send(200, {"id": "1", "object": kind, "created": 0, "model": "demo", "choices": choices})

    def _allowed(self) -> bool:
        allowed = self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        if not allowed:
            self._error(401, "wrong key")
        return allowed

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "t", "param": None, "code": None}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-should-retry", "false")  # the client would wait before it tries again
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return None


def started(server: StandIn) -> Iterator[StandIn]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
