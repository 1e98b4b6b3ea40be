"""Pretraining: the same likelihood as SFT on plain text, where every token of a document is trained."""

from __future__ import annotations

from typing import ClassVar, Literal

from rayswift.config.job import Section
from rayswift.methods.sft import Sft


class Pretrain(Sft):
    """The next-token loss on documents; only the rendering differs from SFT."""

    class Config(Section):
        """Pretraining has no options yet."""

    rendering: ClassVar[Literal["text", "chat"]] = "text"
