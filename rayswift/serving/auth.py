"""Who may ask: API keys read once, kept and compared as sha256, and the rule that an open endpoint stays on loopback.

Knows keys, hosts and headers. Never prints, stores or returns a key. Knows neither Ray nor a web framework; files of
keys without a key in them are read by `serving/keys.py`.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence

from rayswift.errors import ConfigError, ServeError
from rayswift.serving import keys as key_files
from rayswift.serving.keys import fingerprint as fingerprint
from rayswift.serving.spec import ApiKey, ServeSpec

VARIABLE = "RAYSWIFT_API_KEY"
ALLOW_NO_KEY = "RAYSWIFT_ALLOW_NO_KEY"
"""Set to 1, it says that an endpoint whose address somebody else chooses may be open to whoever reaches it."""
MIN_KEY_CHARS = 8
_OF_A_SECRET = f"a mounted secret: defaultMode 0400, or have it set {VARIABLE} instead"
"""How to close what chmod cannot: Kubernetes mounts a secret for everybody to read unless told otherwise."""


def secured(spec: ServeSpec, environ: Mapping[str, str] | None = None) -> ServeSpec:
    """The spec with the sha256 of every configured key, its limits, and no key file: ready to be sent to replicas.

    Raises ConfigError for a key file that is missing, holds no usable key, or may be read by others; ServeError when
    the endpoint would be open to other machines without a key.
    """
    environ = os.environ if environ is None else environ
    limited: tuple[ApiKey, ...] = ()
    if spec.api_key_file:
        plain, limited = _keys_of_file(spec.api_key_file)
        most = max(spec.num_replicas, spec.max_replicas or 1)
        if most > 1 and any(key.is_limited for key in limited):
            _note(f"{spec.api_key_file}: limits hold for each of up to {most} replicas by itself")
    else:  # where there are keys with limits, the variable adds none without
        plain = [] if spec.api_keys else _keys_of_variable(environ)
    hashes = tuple(dict.fromkeys([*spec.api_key_sha256, *map(fingerprint, plain)]))
    keys = (*spec.api_keys, *limited)
    made = spec.model_copy(update={"api_key_sha256": hashes, "api_keys": keys, "api_key_file": None})
    if not made.has_keys and not is_loopback(spec.host):
        raise ServeError(
            "would let every machine on the network use the models without a key",
            path="host",
            value=spec.host,
            fix=f"give --api-key-file FILE or set {VARIABLE}, or listen on 127.0.0.1",
        )
    return made


def secured_anywhere(spec: ServeSpec, environ: Mapping[str, str] | None = None) -> ServeSpec:
    """`secured`, for an endpoint that listens where Ray Serve's own settings say and not on the spec's host.

    Raises ServeError without a key, because then no host of ours keeps strangers out, unless ALLOW_NO_KEY is 1.
    """
    environ = os.environ if environ is None else environ
    made = secured(spec, environ)
    if not made.has_keys and environ.get(ALLOW_NO_KEY) != "1":
        raise ServeError(
            "is not set: Ray Serve chooses the address, and whoever reaches it could use the models",
            path=VARIABLE,
            fix=f"set it or name an api_key_file in the YAML file; {ALLOW_NO_KEY}=1 serves without a key",
        )
    return made


def check_variable(environ: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError when RAYSWIFT_API_KEY is set to what cannot be a key."""
    _keys_of_variable(os.environ if environ is None else environ)


def is_allowed(authorization: str, hashes: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of the keys. Takes the same time for every wrong key."""
    return matching(authorization, hashes) is not None


def matching(authorization: str, hashes: Sequence[str]) -> int | None:
    """Which of the keys an Authorization header carries, the first if several. Same time for every wrong key."""
    scheme, _, key = authorization.partition(" ")
    given = fingerprint(key.strip())
    matches = [hmac.compare_digest(given, known) for known in hashes]
    return matches.index(True) if scheme.lower() == "bearer" and any(matches) else None


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


def _keys_of_file(file: str) -> tuple[list[str], tuple[ApiKey, ...]]:
    """The keys in a file of lines, or those with limits in a file of hashes. One of the two is empty."""
    field = "api_key_file"
    if file.startswith(key_files.PREFIX) and not os.path.exists(file):
        raise ConfigError("is a key and no file of keys", path=field, fix=f"set {VARIABLE} to it")
    text, status = key_files.open_text(file, field)
    if key_files.holds_hashes(text):
        limited = key_files.parse(text, status, file, field)
        if not limited:
            raise ConfigError("holds no key", path=field, value=file, fix="make one with: rayswift keys add")
        return [], limited
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if not keys:
        raise ConfigError("is empty", path=field, value=file, fix="write one key per line, or use rayswift keys add")
    checked = _checked(keys, field, f"of {file} ")
    if key_files.is_open(status):  # as ssh does with a private key
        raise ConfigError("holds keys that others may read or write", path=field, value=file,
                          fix=f"{key_files.how_to_close(file)}  # {_OF_A_SECRET}")  # fmt: skip
    return checked, ()


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


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
