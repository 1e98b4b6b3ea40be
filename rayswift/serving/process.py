"""What the process that serves does beside serving: looks at its port, says how to ask, waits to be stopped.

Knows sockets, signals and a ServeSpec; knows no Ray and no model.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rayswift.errors import ServeError
from rayswift.serving import auth, keys
from rayswift.serving.spec import ServeSpec


class _Asked(NamedTuple):
    """A question as a person may write it: its route, what it says in JSON and in Python, and where the answer is."""

    path: str
    json: str
    python: str
    shown: str


_TURNS = '[{"role": "user", "content": "Hello"}]'
_ANSWERS = _Asked("chat/completions", f'"messages": {_TURNS}', f"messages={_TURNS}", "choices[0].message.content")
_VECTORS = _Asked("embeddings", '"input": ["Hello"]', 'input=["Hello"]', "data[0].embedding")
"""Of a folder that sentence-transformers wrote."""


def check_port(host: str, port: int) -> None:
    """Raises ServeError when nothing can listen on the port of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            rule = f"cannot be listened on ({error.strerror or error})"
            fix = f"stop the program that uses it (ss -ltnp 'sport = :{port}') or give another --port"
            raise ServeError(rule, path="port", value=port, fix=fix) from error


def ready_text(spec: ServeSpec) -> str:
    """What is printed when the endpoint answers: its URL and its page, and a question in curl and in Python.

    With a key both take it from RAYSWIFT_API_KEY; where that is not what the endpoint was started with, a line before
    them says how to set it.
    """
    name, keyed = next(iter(spec.models)), bool(spec.api_key_file or spec.has_keys or auth.VARIABLE in os.environ)
    header = f' \\\n    -H "Authorization: Bearer ${auth.VARIABLE}"' if keyed else ""
    key = f'os.environ["{auth.VARIABLE}"]' if keyed else '"none"'
    asked = _VECTORS if (Path(spec.models[name]) / "modules.json").is_file() else _ANSWERS
    return f"""\
Serving {", ".join(spec.models)} at {spec.url}, with a chat page at {spec.url.removesuffix("v1")}  (Ctrl-C stops)

{_key_line(spec)}  curl {spec.url}/{asked.path}{header} \\
    -H "Content-Type: application/json" \\
    -d '{{"model": "{name}", {asked.json}}}'

  {"import os; " if keyed else ""}from openai import OpenAI
  client = OpenAI(base_url="{spec.url}", api_key={key})
  reply = client.{asked.path.replace("/", ".")}.create(model="{name}", {asked.python})
  print(reply.{asked.shown})
"""


def _key_line(spec: ServeSpec) -> str:
    """How to set RAYSWIFT_API_KEY to a key that is accepted; nothing where it is one already, or none is needed."""
    if spec.api_key_file and not keys.is_of_hashes(spec.api_key_file):
        file = shlex.quote(os.path.abspath(spec.api_key_file))
        return f'  export {auth.VARIABLE}="$(grep -m 1 . {file})"\n\n'
    if spec.api_key_file:
        return f"  export {auth.VARIABLE}=KEY   # a key that `rayswift keys add` has shown\n\n"
    if spec.api_keys or (spec.api_key_sha256 and auth.VARIABLE not in os.environ):
        return f"  export {auth.VARIABLE}=KEY   # one of the keys whose sha256 the endpoint was given\n\n"
    return ""


def answers(spec: ServeSpec) -> bool:
    """Whether the endpoint says over HTTP that it is well."""
    request = urllib.request.Request(spec.url.removesuffix("/v1") + "/health")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def told_to_stop() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt for the duration, as Ctrl-C is. Off the main thread no signal arrives."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


def wait_for_stop_signal() -> None:
    """Returns on Ctrl-C or SIGTERM. Off the main thread only the process's end ends it."""
    with told_to_stop():
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
