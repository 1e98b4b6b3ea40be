"""Images, audio and video of a row: where they stand in its text, how they are read, decoded and encoded.

In the text of a Message a medium is one private character, its mark: nothing that people write is taken for it.
"""

from __future__ import annotations

from rayswift.data.types import MediaKind

KINDS: tuple[MediaKind, ...] = ("image", "audio", "video")
MARKS: dict[MediaKind, str] = {"image": "\ue000", "audio": "\ue001", "video": "\ue002"}
"""Characters of Unicode's private use area."""
TAGS: dict[MediaKind, str] = {kind: f"<{kind}>" for kind in KINDS}
"""How the rows of ms-swift and LLaMA-Factory mark the place of a medium."""
