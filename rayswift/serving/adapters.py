"""From the name of an adapter that a client sends to its folder, which lies below one folder and nowhere else.

Knows names, folders and which files an adapter may consist of. Loads nothing; whether an adapter fits its base is known
by the engine.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from rayswift.serving.api_errors import unknown_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_MAX_PARTS, _MAX_CONFIG_BYTES = 4, 2**20
_KINDS = ("LORA",)
_log = logging.getLogger("rayswift.serving")


def find_adapter(root: Path, name: str) -> Path:
    """The real folder of the adapter `root/name`, all of whose files lie below `root` too.

    A name is one to four parts of letters, digits and `._@-`, joined by `/`; none begins with a dot, so none is `..`.
    Raises ApiError: 404 (model_not_found) for whatever is no such adapter, all alike, so that nothing is told of the
    disk. Why a folder that is there is not served stands in the log.
    """
    parts = check_adapter_name(name)
    try:
        home = root.resolve(strict=True)
        folder = home.joinpath(*parts).resolve(strict=True)
        refused = _refused(folder, home)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12
        raise unknown_model(name) from None
    if refused is not None:
        _log.warning("the adapter %s is not served: %s", name, refused)
        raise unknown_model(name)
    return folder


def check_adapter_name(name: str) -> list[str]:
    """The parts of an adapter's name. Raises ApiError (404) for what cannot be one."""
    parts = name.split("/")
    if len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
        raise unknown_model(name)
    return parts


def _refused(folder: Path, home: Path) -> str | None:
    """Why a folder is not served as an adapter; None where it is. Raises OSError for a file that is not there."""
    if not folder.is_relative_to(home) or folder == home:
        return "it is a link to the outside"
    for name in (CONFIG, WEIGHTS):
        file = (folder / name).resolve(strict=True)
        if not file.is_relative_to(home):
            return f"its {name} is a link to the outside"
        if not file.is_file():  # a pipe would never end
            return f"its {name} is no file"
    # A loader may take one of them instead, and pickles can run code.
    if others := sorted(file.name for file in folder.glob("adapter_model.*") if file.name != WEIGHTS):
        return f"it has {others[0]} beside {WEIGHTS}"
    return _refused_config(folder / CONFIG)


def _refused_config(file: Path) -> str | None:
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        return f"its {CONFIG} has more than {_MAX_CONFIG_BYTES} bytes"
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return f"its {CONFIG} is not JSON"
    if not isinstance(config, dict) or config.get("peft_type") not in _KINDS:
        return f"its {CONFIG} has another peft_type than {' or '.join(_KINDS)}"
    if config.get("auto_mapping"):
        return f"its {CONFIG} has an auto_mapping, which names code to import"
    return None
