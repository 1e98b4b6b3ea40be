"""Messages with marks as chat templates take them: text, or lists of typed parts, whichever the template knows.

Found out by rendering, not by reading the template: two short conversations tell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rayswift.data.media import KINDS, MARKS
from rayswift.data.types import MediaKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = re.compile(f"([{''.join(MARKS.values())}])")
_KIND_OF = {mark: kind for kind, mark in MARKS.items()}
_PROBE = "qzx"


@dataclass(frozen=True)
class _Form:
    """What a template takes. `always`: texts that are no lists of parts vanish. `kinds`: what it has of each kind."""

    always: bool
    kinds: dict[MediaKind, MediaKind]


def with_parts(tokenizer: PreTrainedTokenizerBase, chat: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with typed parts where its template needs them: for media, and for all text if it renders no other.

    A template that knows no parts keeps the marks, which stand for the placeholders then.
    """
    template = tokenizer.chat_template
    form = _form(tokenizer, template if isinstance(template, str) else "")
    if not form.always and not form.kinds:
        return list(chat)
    return [message | {"content": _parts(content, form)} if _needs_parts(content := message.get("content"), form)
            else message for message in chat]  # fmt: skip


def _needs_parts(content: Any, form: _Form) -> bool:
    return isinstance(content, str) and (form.always or bool(form.kinds and _MARK.search(content)))


def _parts(content: Any, form: _Form) -> list[dict[str, Any]]:
    pieces = [piece for piece in _MARK.split(content) if piece]
    return [{"type": form.kinds.get(kind, kind)} if (kind := _KIND_OF.get(piece)) else {"type": "text", "text": piece}
            for piece in pieces]  # fmt: skip


def taken_kinds(tokenizer: PreTrainedTokenizerBase) -> tuple[MediaKind, ...]:
    """The kinds whose media the chat template writes as such; all of them under a template that knows no parts."""
    template = tokenizer.chat_template
    form = _form(tokenizer, template if isinstance(template, str) else "")
    return tuple(kind for kind in KINDS if not form.kinds or form.kinds.get(kind) == kind)


@lru_cache(maxsize=8)
def _form(tokenizer: PreTrainedTokenizerBase, template: str) -> _Form:
    """Kept per tokenizer and template."""
    text = _rendered(tokenizer, _PROBE)
    part = {"type": "text", "text": _PROBE}
    parts = _rendered(tokenizer, [part])
    if parts is None or _PROBE not in parts or "'type'" in parts:  # a list that was printed, not rendered
        return _Form(always=False, kinds={})
    shown = {kind for kind in KINDS if _rendered(tokenizer, [{"type": kind}, part]) not in (None, parts)}
    kinds: dict[MediaKind, MediaKind] = {kind: kind for kind in shown}
    if "video" not in shown and "image" in shown:
        kinds["video"] = "image"  # a model that knows no video reads its frames
    return _Form(always=text is None or _PROBE not in text, kinds=kinds)


def _rendered(tokenizer: PreTrainedTokenizerBase, content: Any) -> str | None:
    """A conversation of one question; None where the template fails on it."""
    try:
        return str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except Exception:  # a template may fail in any way on what it does not know
        return None
