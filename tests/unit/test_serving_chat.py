"""`rayswift chat` against a stand-in that streams: turns, what is stopped, what is refused, and a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from openai.types import Model

from rayswift import cli
from rayswift.errors import ConfigError, ServeError
from rayswift.serving.chat import HINT, Chat, Settings, converse, open_chat
from rayswift.serving.client import connected, printable

KEY = "a-key-of-the-endpoint"


class StandIn(ThreadingHTTPServer):
    """Streams the last message back word by word; `wait` holds the second word until the client has gone."""

    daemon_threads = True

    def __init__(self, models: dict[str, Any], key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.key, self.fingerprint = models, key, None
        self.seen: list[dict[str, Any]] = []
        self.gone = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        if not self._allowed():
            return
        cards = [{"id": name, "object": "model", "created": 0, "owned_by": "test", "rayswift": known}
                 for name, known in self.server.models.items()]  # fmt: skip
        if self.path == "/v1/models":
            self._send(200, {"object": "list", "data": cards})
        elif self.path == "/v1/models/unlisted":
            self._send(200, {"id": "unlisted", "object": "model", "created": 0, "owned_by": "test"})
        else:
            self._error(404, "The model does not exist")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._allowed():
            return
        self.server.seen.append(body)
        said = body["messages"][-1]["content"]
        if said in ("too long", "busy", "break"):
            self._error({"too long": 400, "busy": 429, "break": 501}[said], f"{said}, \x1b[31msays the endpoint")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, word in enumerate(said.split(" ")):
                while number and said.startswith("wait"):
                    self._chunk({"choices": []})
                    time.sleep(0.01)
                if word == "fail":
                    self._event({"error": {"message": "it failed", "type": "server_error"}})
                    return
                self._chunk({"choices": [{"index": 0, "delta": {"content": f" {word}" if number else word}}]})
            self._chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()

    def _chunk(self, fields: dict[str, Any]) -> None:
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        self._event(head | {"system_fingerprint": self.server.fingerprint} | fields)

    def _event(self, document: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(document).encode() + b"\n\n")

    def _allowed(self) -> bool:
        allowed = self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}"
        if not allowed:
            self._error(401, "wrong key")
        return allowed

    def _error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "t", "param": None, "code": None}})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("x-should-retry", "false")  # the client would wait before it tries again
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None:
        return None


class Lines:
    """A terminal whose person types these lines; `stop_at` is the piece of an answer at which Ctrl-C is pressed."""

    def __init__(self, *lines: str, interactive: bool = True, stop_at: str | None = None) -> None:
        self._lines, self._stop_at, self.interactive = list(lines), stop_at, interactive
        self.said, self.notes = "", list[str]()

    def read(self) -> str | None:
        return self._lines.pop(0) if self._lines else None

    def say(self, text: str) -> None:
        self.said += text
        if text == self._stop_at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def _serve(server: StandIn) -> Iterator[StandIn]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSWIFT_API_KEY", raising=False)


@pytest.fixture
def served() -> Iterator[StandIn]:
    yield from _serve(StandIn({"demo": {"version": "0123456789ab"}}))


@pytest.fixture
def locked() -> Iterator[StandIn]:
    yield from _serve(StandIn({"demo": None, "other": None}, KEY))


def talk(url: str, terminal: Lines, model: str | None = None, settings: Settings | None = None) -> Chat:
    with connected(url, argument="URL", retries=0) as client:
        chat = open_chat(client, url, model, settings or Settings())
        converse(chat, terminal)
        return chat


def test_turns_are_sent_along_until_they_are_forgotten(served: StandIn) -> None:
    terminal = Lines("one two\n", "\n", "three", "/reset", "four", "/exit", "never")
    chat = talk(served.url, terminal, settings=Settings("Be brief.", 0.5, 7))
    assert terminal.said == "one two\nthree\nfour\n"
    assert terminal.notes == ["demo, version 0123456789ab", HINT, "forgotten"]
    system = {"role": "system", "content": "Be brief."}
    sent = [[turn["content"] for turn in body["messages"]] for body in served.seen]
    assert sent == [["Be brief.", "one two"], ["Be brief.", "one two", "one two", "three"], ["Be brief.", "four"]]
    assert all(body["messages"][0] == system for body in served.seen)
    assert all((body["temperature"], body["max_tokens"], body["stream"]) == (0.5, 7, True) for body in served.seen)
    assert chat.turns == [{"role": "user", "content": "four"}, {"role": "assistant", "content": "four"}]


def test_what_is_not_given_is_left_to_the_endpoint(served: StandIn) -> None:
    talk(served.url, Lines("hi"))
    assert set(served.seen[0]) == {"model", "messages", "stream"}


def test_a_stopped_answer_ends_there_and_the_conversation_goes_on(served: StandIn) -> None:
    terminal = Lines("wait for ever", "next", stop_at="wait")
    chat = talk(served.url, terminal)
    assert (terminal.said, terminal.notes[2:]) == ("wait\nnext\n", ["stopped"])
    assert [turn["content"] for turn in chat.turns] == ["wait for ever", "wait", "next", "next"]
    assert served.gone.wait(10)  # the endpoint is told
    with pytest.raises(KeyboardInterrupt):
        talk(served.url, Lines("wait for ever", interactive=False, stop_at="wait"))


@pytest.mark.parametrize(("question", "told"), [
    ("too long", "URL={} refuses to answer (400): too long, [31msays the endpoint; shorten or change what is asked"),
    ("busy", "URL={} refuses to answer (429): busy, [31msays the endpoint; wait, and ask again"),
    ("break", "URL={} does not answer: break, [31msays the endpoint; check that it runs, and the URL"),
    ("half fail", "URL={} does not answer: it failed; check that it runs, and the URL"),
])  # fmt: skip
def test_an_answer_that_is_refused_is_told_to_a_person_and_ends_a_script(
    served: StandIn, question: str, told: str
) -> None:
    terminal = Lines(question, "next")
    chat = talk(served.url, terminal)
    assert terminal.notes[2:] == [told.format(served.url)]
    assert terminal.said.endswith("\nnext\n")
    assert [turn["content"] for turn in chat.turns][-2:] == ["next", "next"]
    with pytest.raises(ServeError) as caught:
        talk(served.url, Lines(question, "next", interactive=False))
    assert (str(caught.value), caught.value.exit_code) == (told.format(served.url), 1)


def test_another_version_that_answers_is_told(served: StandIn) -> None:
    served.fingerprint = "ba9876543210"
    terminal = Lines("a", "b")
    talk(served.url, terminal)
    assert terminal.notes == ["demo, version 0123456789ab", HINT, "demo, version ba9876543210"]


def test_an_endpoint_that_knows_no_version_tells_none(locked: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_API_KEY", KEY)
    terminal = Lines("a")
    talk(locked.url, terminal, "other")
    assert (terminal.notes, locked.seen[0]["model"]) == (["other", HINT], "other")


def test_an_answer_cannot_steer_the_terminal(served: StandIn) -> None:
    terminal = Lines("a\x1b]0;title\x07 b\x9b2J\r\tc")
    talk(served.url, terminal)
    assert terminal.said == "a]0;title b2J\tc\n"
    assert printable("tab\tline\nü 你 \x7f") == "tab\tline\nü 你 "


def test_the_url_of_the_page_is_taken_for_the_one_of_the_api(served: StandIn) -> None:
    for url in (served.url.removesuffix("/v1"), served.url.removesuffix("v1"), f"{served.url}/"):
        terminal = Lines("hi")
        talk(url, terminal)
        assert terminal.said == "hi\n"


def test_the_model_has_to_be_one_of_those_served(locked: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="RAYSWIFT_API_KEY is not set, and a key is asked for"):
        talk(locked.url, Lines())
    monkeypatch.setenv("RAYSWIFT_API_KEY", "another-key-of-mine")
    with pytest.raises(ConfigError, match="RAYSWIFT_API_KEY is refused by") as caught:
        talk(locked.url, Lines(), "demo")
    assert "another-key-of-mine" not in str(caught.value)
    monkeypatch.setenv("RAYSWIFT_API_KEY", KEY)
    with pytest.raises(ConfigError, match=r"--model is needed: .* serves demo, other; write --model demo"):
        talk(locked.url, Lines())
    with pytest.raises(ConfigError, match=r"--model=absent is no model of http://.*/v1; use demo, other"):
        talk(locked.url, Lines(), "absent")
    terminal = Lines("a")
    talk(locked.url, terminal, "unlisted")
    assert terminal.said == "a\n"


def test_a_model_that_makes_vectors_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(name: str, task: str) -> Model:
        return Model(id=name, object="model", created=0, owned_by="test", task=task)  # type: ignore[call-arg]

    served = {name: card(name, task) for name, task in (("e", "embed"), ("m", "generate"))}
    monkeypatch.setattr("rayswift.serving.chat.models_of", lambda _: served)
    client: Any = None  # it is not asked
    assert open_chat(client, "http://localhost/v1", None, Settings()).model == "m"


@pytest.mark.parametrize(("url", "code", "told"), [
    ("nowhere", 2, "URL=nowhere has no host; write http://HOST:PORT/v1"),
    ("http://me:secret@localhost/v1", 2, "URL carries a user name or password"),
    ("http://127.0.0.1:1/v1", 1, "URL=http://127.0.0.1:1/v1 does not answer: Connection error"),
])  # fmt: skip
def test_an_endpoint_that_cannot_be_reached(url: str, code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["chat", url])
    shown = capsys.readouterr().err
    assert (caught.value.code, told in shown, "secret" in shown) == (code, True, False)


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "rayswift.cli", "chat", *args]


def test_of_a_pipe_each_line_is_a_turn(served: StandIn, root: Path) -> None:
    done = subprocess.run(
        _command(served.url, "--temperature", "0", "--system", "S"), input="one two\n\nthree\n", cwd=root,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "one two\nthree\n")
    assert done.stderr == "demo, version 0123456789ab\n"
    assert served.seen[0]["temperature"] == 0
    failed = subprocess.run(
        _command(served.url), input="busy\nnext\n", cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert (failed.returncode, failed.stdout) == (1, "\n")
    assert "error: URL=" in failed.stderr
    assert "refuses to answer (429)" in failed.stderr


def test_in_a_terminal_ctrl_c_stops_an_answer_and_then_ends_the_chat(served: StandIn, root: Path) -> None:
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        _command(served.url), cwd=root, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    try:
        _read_until(mine, "> ")
        os.write(mine, b"wait for ever\n")
        _read_until(mine, "ever\r\nwait")
        _interrupt(process, lambda: _is_shown(mine, "stopped\r\n\r\n> "))
        os.write(mine, b"and on\n")
        _read_until(mine, "and on\r\nand on\r\n\r\n> ")
        _interrupt(process, lambda: process.poll() is not None)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)
    assert served.gone.wait(10)


def _interrupt(process: subprocess.Popen[Any], is_heard: Callable[[], bool]) -> None:
    """Presses Ctrl-C, and again where nothing came of it: Python misses one just before it starts to wait."""
    for _ in range(12):
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if is_heard():
                return
            time.sleep(0.02)
    raise AssertionError("Ctrl-C is not heard")


def _is_shown(terminal: int, expected: str) -> bool:
    try:
        _read_until(terminal, expected, 4)
    except AssertionError:
        return False
    return True


def _read_until(terminal: int, expected: str, timeout_s: float = 60) -> None:
    """Reads what the command writes until `expected` was seen."""
    found, deadline = "", time.monotonic() + timeout_s
    while expected not in found:
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"never shown: {expected!r}; but {found!r}"
        found += os.read(terminal, 4096).decode()
