"""The first five minutes: a model made, trained, exported, served and asked on this machine, from nothing.

One module per kind (`text`, `vision`); everything it makes is an ordinary job file, run directory or export.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import ConfigError
from rayswift.serving.auth import check_variable

if TYPE_CHECKING:
    from rayswift.quickstart.result import QuickstartResult, VisionResult

KINDS = ("text", "vision")
MARKER = ".rayswift-quickstart"


def run_quickstart(kind: str, output: str, *, force: bool = False) -> QuickstartResult | VisionResult:
    """What was reached, everything made lying below `output`. `force` replaces the folder of an earlier quickstart.

    Raises ConfigError for an unknown kind, a RAYSWIFT_API_KEY that cannot be one, or a folder that cannot be used.
    """
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        raise ConfigError("is not a quickstart of this version", path="kind", value=kind,
                          fix=f"did you mean {close[0]}?" if close else f"use {', '.join(KINDS)}")  # fmt: skip
    check_variable()  # serving comes last, after minutes of training
    folder = Path(output)
    try:
        _claim(folder, force)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror or error}", path="output", value=output,
                          fix="name another folder with --output") from error  # fmt: skip
    if kind == "vision":
        from rayswift.quickstart import vision

        return vision.run(folder)
    from rayswift.quickstart import text

    return text.run(folder)


def _claim(folder: Path, force: bool) -> None:
    """Makes an empty folder. Only what an earlier quickstart made is ever removed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (folder / MARKER).is_file():
            raise ConfigError("exists and is not the folder of a quickstart", path="output", value=str(folder),
                              fix="name another folder with --output")  # fmt: skip
        if folder.is_symlink():
            raise ConfigError("is a link, and is not followed to remove what is there", path="output",
                              value=str(folder), fix="remove it, or name another folder with --output")  # fmt: skip
        if not force:
            raise ConfigError("holds an earlier quickstart", path="output", value=str(folder),
                              fix="replace it with --force, or name another folder with --output")  # fmt: skip
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text("Everything in this folder was made by `rayswift quickstart` and may be deleted.\n")
