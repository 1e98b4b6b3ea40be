"""Who may ask: API keys read once, kept and compared as sha256, and the rule that an open endpoint stays on loopback.

Knows keys, hosts and headers. Never prints, stores or returns a key. Knows neither Ray nor a web framework.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from rayswift.errors import ConfigError, ServeError
from rayswift.serving.spec import ServeSpec

VARIABLE = "RAYSWIFT_API_KEY"
ALLOW_NO_KEY = "RAYSWIFT_ALLOW_NO_KEY"
"""Set to 1, it says that an endpoint whose address somebody else chooses may be open to whoever reaches it."""
MIN_KEY_CHARS = 8


def secured(spec: ServeSpec, environ: Mapping[str, str] | None = None) -> ServeSpec:
    """The spec with the sha256 of every configured key and no key file, ready to be sent to replicas.

    Raises ConfigError for a key file that is missing or holds no usable key, ServeError when the endpoint would be
    open to other machines without a key.
    """
    environ = os.environ if environ is None else environ
    keys = _keys_of_file(spec.api_key_file) if spec.api_key_file else _keys_of_variable(environ)
    hashes = tuple(dict.fromkeys([*spec.api_key_sha256, *map(fingerprint, keys)]))
    if not hashes and not is_loopback(spec.host):
        raise ServeError(
            "would let every machine on the network use the models without a key",
            path="host",
            value=spec.host,
            fix=f"give --api-key-file FILE or set {VARIABLE}, or listen on 127.0.0.1",
        )
    return spec.model_copy(update={"api_key_sha256": hashes, "api_key_file": None})


def secured_anywhere(spec: ServeSpec, environ: Mapping[str, str] | None = None) -> ServeSpec:
    """`secured`, for an endpoint that listens where Ray Serve's own settings say and not on the spec's host.

    Raises ServeError without a key, because then no host of ours keeps strangers out, unless ALLOW_NO_KEY is 1.
    """
    environ = os.environ if environ is None else environ
    made = secured(spec, environ)
    if not made.api_key_sha256 and environ.get(ALLOW_NO_KEY) != "1":
        raise ServeError(
            "is not set: Ray Serve chooses the address, and whoever reaches it could use the models",
            path=VARIABLE,
            fix=f"set it or name an api_key_file in the YAML file; {ALLOW_NO_KEY}=1 serves without a key",
        )
    return made


def check_variable(environ: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError when RAYSWIFT_API_KEY is set to what cannot be a key."""
    _keys_of_variable(os.environ if environ is None else environ)


def fingerprint(key: str) -> str:
    """sha256 of a key in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def is_allowed(authorization: str, hashes: tuple[str, ...]) -> bool:
    """Whether an Authorization header carries one of the keys. Takes the same time for every wrong key."""
    scheme, _, key = authorization.partition(" ")
    given = fingerprint(key.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]
    return scheme.lower() == "bearer" and any(matches)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address given as `127.0.0.1`, `::1` or `localhost`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def host_of(header: str) -> str:
    """The host in a Host header without its port: `[::1]:8000` -> `::1`."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _keys_of_file(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot be read: {reason}", path="api_key_file", value=file, fix="check the path") from error
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ConfigError("is empty", path="api_key_file", value=file, fix="write one key per line")
    return _checked(keys, "api_key_file", f"of {file} ")


def _keys_of_variable(environ: Mapping[str, str]) -> list[str]:
    key = environ.get(VARIABLE)
    if key is None:
        return []
    return _checked([key.strip()], VARIABLE, "")


def _checked(keys: list[str], path: str, where: str) -> list[str]:
    """The keys, none of them too short to be one or impossible in a header. The message never shows a key."""
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"key {number} {where}is not at least {MIN_KEY_CHARS} printable ASCII characters without a space",
                path=path,
                fix="make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'",
            )
    return keys
