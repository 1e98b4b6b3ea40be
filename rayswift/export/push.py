"""An export on a model hub: checked against its manifest, then uploaded whole in one commit.

Knows huggingface_hub. A commit appears whole or not at all, so nobody can load half an export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rayswift.errors import ConfigError, ExportError
from rayswift.export.manifest import UNFINISHED, ExportManifest, read_valid
from rayswift.serving.versions import version_of

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """Where an export lies on a hub: the repository, the commit, and the export's version."""

    repo: str
    commit: str
    version: str
    url: str


def push(folder: str, repo: str, *, public: bool = False, branch: str = "main", endpoint: str | None = None) -> Pushed:
    """Where the export in `folder` lies after it was uploaded to `repo` (`org/name`), which is made if it is not there.

    A new repository is private unless `public`. `endpoint` is another hub than that of HF_ENDPOINT. Raises ExportError
    for a folder that is no verified export or has changed since, and when the hub refuses it; ConfigError for a name
    that is none.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError("is no name of a repository", path="REPO", value=repo, fix="write ORG/NAME") from error
    manifest, version = read_valid(folder), version_of(folder)
    if not manifest.is_verified or version is None:
        raise ExportError("was never verified, and is not published", path=folder, fix="export it again")
    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=Path(folder), revision=branch, commit_message=_message(manifest, version),
            delete_patterns="*", ignore_patterns=f"{UNFINISHED}*",
        )  # fmt: skip
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise ExportError(
            f"was refused by the hub ({status}): {_reason(error)}", path="REPO", value=repo,
            fix=_LOGIN if status in (401, 403) else "try again; nothing was published",
        ) from error  # fmt: skip
    except (OSError, RuntimeError) as error:  # the hub's client wraps what happens to one file in a RuntimeError
        raise ExportError(
            f"could not be uploaded: {_reason(error)}", path="REPO", value=repo, fix="try again; nothing was published"
        ) from error
    return Pushed(repo, str(made.oid), version, str(made.commit_url))


def _message(manifest: ExportManifest, version: str) -> str:
    made_by = f"{manifest.method} " if manifest.method else ""
    return f"RaySwift {made_by}export {version}" + (f", {manifest.quantizer}" if manifest.quantizer != "none" else "")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
