"""An export on a model hub: checked against its manifest, then uploaded whole in one commit.

Knows huggingface_hub. A commit appears whole or not at all, so nobody can load half an export.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import ConfigError, ExportError
from rayswift.export.kept import RECORDS
from rayswift.export.manifest import UNFINISHED, ExportManifest, read_valid
from rayswift.serving.versions import version_of

if TYPE_CHECKING:
    from huggingface_hub.hf_api import HfApi, ModelInfo

_OF_THE_HUB = {".gitattributes"}
"""What a repository has from the beginning, and keeps."""
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Pushed:
    """Where an export lies on a hub: the repository, the commit, and the export's version."""

    repo: str
    commit: str
    version: str
    url: str


def push(
    folder: str, repo: str, *, public: bool = False, branch: str = "main", force: bool = False,
    endpoint: str | None = None,
) -> Pushed:  # fmt: skip
    """Where the export in `folder` lies after it was uploaded to `repo` (`org/name`), which is made if it is not there.

    A new repository is private unless `public`; that an older one is public is told. What lies in `repo` is replaced:
    if it is an export, or with `force`. `endpoint` is another hub than that of HF_ENDPOINT. Raises ExportError for a
    folder that is no verified export or has changed since, and when the hub refuses it or is not reached; ConfigError
    for a name that is none, and a repository that has something else.
    """
    from httpx import HTTPError
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
        _check_place(_place(api, repo, branch), public=public, force=force)
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
    except (OSError, HTTPError, RuntimeError) as error:  # the hub's client wraps what happens to a file in the last
        raise ExportError(
            f"could not be uploaded to {api.endpoint}: {_reason(error)}", path="REPO", value=repo,
            fix="check the network and HF_ENDPOINT, and try again: an export is published whole or not at all",
        ) from error  # fmt: skip
    return Pushed(repo, str(made.oid), version, str(made.commit_url))


def _place(api: HfApi, repo: str, branch: str) -> ModelInfo:
    """What lies on a branch, which is made of main where it is not there: the hub takes commits to those it has."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(repo, revision=branch)
    except RevisionNotFoundError:
        api.create_branch(repo, branch=branch, exist_ok=True)
        return api.model_info(repo, revision=branch)


def _check_place(found: ModelInfo, *, public: bool, force: bool) -> None:
    """Tells of a repository that is public unasked. Raises ConfigError for one whose files no export left, unless
    `force`."""
    if found.private is False and not public:
        print(f"warning: {found.id} is public, and what is published there is, too", file=sys.stderr)
    names = {file.rfilename for file in found.siblings or ()} - _OF_THE_HUB
    if names and names.isdisjoint(RECORDS) and not force:
        raise ConfigError(
            f"has {len(names)} files that are no export of RaySwift, among them {min(names)}: they would be deleted",
            path="REPO", value=found.id, fix="name another repository, or replace them with --force",
        )  # fmt: skip


def _message(manifest: ExportManifest, version: str) -> str:
    made_by = f"{manifest.method} " if manifest.method else ""
    return f"RaySwift {made_by}export {version}" + (f", {manifest.quantizer}" if manifest.quantizer != "none" else "")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
