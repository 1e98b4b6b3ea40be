"""The Hugging Face hub, or another under HF_ENDPOINT, through huggingface_hub: its cache, its login, HF_HUB_OFFLINE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

from rayswift.data.hubs import HubError, HubFile, Pin, check, listed, records

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_KIND = "dataset"


class Hf:
    """Files lie in huggingface_hub's cache, where `hf cache` manages them."""

    default_revision: ClassVar[str] = "main"

    def commit(self, repo: str, revision: str) -> str:
        """As `Hub.commit`."""
        with _refusals(revision):
            return _api().resolve_revision(repo, repo_type=_KIND, revision=revision or None).resolved

    def files(self, repo: str, pin: Pin) -> list[HubFile]:
        """As `Hub.files`. Without network, what other programs have cached of the commit counts as well."""
        with _refusals(pin.name):
            return listed(records("hf", repo), pin.commit, lambda: _tree(repo, pin.commit))

    def download(self, repo: str, pin: Pin, file: HubFile) -> str:
        """As `Hub.download`."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        there = try_to_load_from_cache(repo, file.path, revision=pin.commit, repo_type=_KIND)
        if isinstance(there, str):
            return there
        with _refusals(pin.name), _quietly():
            local = hf_hub_download(repo, file.path, repo_type=_KIND, revision=pin.commit, endpoint=_endpoint())
        try:
            check(file, local, f"{repo}/{file.path}")
        except Exception:
            for path in {local, os.path.realpath(local)}:
                with suppress(OSError):
                    os.remove(path)
            raise
        return local


def _tree(repo: str, commit: str) -> list[HubFile]:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

    try:
        tree = list(_api().list_repo_tree(repo, recursive=True, revision=commit, repo_type=_KIND))
    except HfHubHTTPError:
        raise
    except Exception as error:
        try:
            cached = get_cached_repo_tree(repo, repo_type=_KIND, revision=commit)
        except CachedRepoTreeNotFoundError:
            raise error from None
        return [HubFile(file.path, file.size) for file in cached]
    return [
        HubFile(one.path, one.size, one.lfs.sha256 if one.lfs else None, None if one.lfs else one.blob_id)
        for one in tree
        if isinstance(one, RepoFile)
    ]


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint())


def _endpoint() -> str | None:
    """As it is set now: huggingface_hub reads it when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _refusals(revision: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a HubError."""
    from httpx import HTTPError
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise HubError("is gated on the hub", "accept its terms there and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise HubError(f"has no revision {revision} on the hub", "check the part behind @") from error
    except RepositoryNotFoundError as error:
        rule, fix = "is no dataset on the hub", "check the spelling; if it is private, log in with `hf auth login`"
        raise HubError(rule, fix) from error
    except (HTTPError, RevisionResolutionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        rule = f"is not in the cache, and cannot be had from the hub: {reason}"
        raise HubError(rule, "check the network and HF_ENDPOINT, or name a local file") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without huggingface_hub's progress bars: RaySwift shows its own."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
