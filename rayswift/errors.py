"""The one exception tree: what went wrong, where, by which rule, and how to fix it.

Knows the exit codes that scripts hold on to; knows nothing of any other module.
"""

from __future__ import annotations

_ABSENT = object()


class RaySwiftError(Exception):
    """An error a user can act on. `str()` reads `path=value rule; fix`.

    Example: `parallel.tp=6 does not divide num_kv_heads=8 of Qwen3-8B; use 1, 2, 4 or 8`.
    The text is the only positional argument, so that it survives pickling between Ray processes.
    """

    exit_code = 1

    def __init__(self, rule: str, *, path: str | None = None, value: object = _ABSENT, fix: str | None = None) -> None:
        place = "" if path is None else path if value is _ABSENT else f"{path}={_short(value)}"
        super().__init__(f"{place} {rule}".strip() + (f"; {fix}" if fix else ""))


class ConfigError(RaySwiftError):
    """A bad command or config: unknown key, wrong type, missing file, clashing settings."""

    exit_code = 2


class PlanError(RaySwiftError):
    """The job does not fit the cluster, or asks for a layout that cannot work."""

    exit_code = 3


class DataError(RaySwiftError):
    """The data error budget is exceeded, or no row could be used at all."""

    exit_code = 4


class CheckpointError(RaySwiftError):
    """A checkpoint cannot be written, read or trusted."""


class WorkerError(RaySwiftError):
    """A training worker failed more often than `cluster.max_failures` allows."""


class ExportError(RaySwiftError):
    """An export could not be written or did not verify; nothing trusted is left behind."""

    exit_code = 5


class PromotionError(RaySwiftError):
    """A new version was not good enough to answer; the one before it does."""

    exit_code = 5


class ServeError(RaySwiftError):
    """The endpoint cannot start or cannot answer."""


def _short(value: object, limit: int = 120) -> str:
    """The value as a person would type it, cut to `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
