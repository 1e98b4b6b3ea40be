"""What stands behind a model's name: a started engine with its tokenizer and places, and how one is made of a folder.

Knows the engine protocol and the files of a folder; knows no route, and not where an engine runs.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol

from rayswift import plugins
from rayswift.models.loading import load_config, load_tokenizer
from rayswift.serving.admission import Admission
from rayswift.serving.api_errors import unknown_version
from rayswift.serving.defaults import SamplingDefaults
from rayswift.serving.engine import Engine
from rayswift.serving.lineage import lineage_of
from rayswift.serving.placement import engine_options
from rayswift.serving.prompts import PromptBuilder
from rayswift.serving.spec import ServeSpec
from rayswift.serving.versions import version_of


@dataclass(frozen=True)
class ServedModel:
    """One started engine with the tokenizer that makes its prompts and the places it has."""

    engine: Engine
    prompts: PromptBuilder
    admission: Admission
    version: str | None = None
    """Of the export that it was started from; None for any other folder."""
    lineage: dict[str, Any] | None = None
    """What clients may know of where it comes from; None for a folder that is no export."""
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    """How its answers are sampled unless a request asks for something else."""

    @property
    def takes_media(self) -> bool:
        """Whether there may be more than text in a conversation."""
        return self.prompts.takes_media

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings instead of answers."""
        return self.engine.embedding is not None

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.engine.max_model_len

    def pick(self, version: str | None) -> ServedModel:
        """The version that answers a request which asks for this one, or for none. Raises ApiError (404)."""
        if version not in (None, self.version):
            raise unknown_version()
        return self

    def instead_of(self, failed: ServedModel) -> ServedModel | None:
        """None: there is no other version."""
        return None

    def blame(self, refusing: ServedModel) -> None:
        """Nothing: there is no other version."""

    def check(self) -> None:
        """Raises ServeError when it cannot answer any more."""
        self.engine.check()


class Served(Protocol):
    """What is behind a model's name: one started engine, or several versions of which each request is given one."""

    @property
    def takes_media(self) -> bool:
        """Whether there may be more than text in a conversation."""

    @property
    def embeds(self) -> bool:
        """Whether it makes embeddings instead of answers."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer together."""

    @property
    def lineage(self) -> dict[str, Any] | None:
        """What clients may know of where it comes from; None for a folder that is no export."""

    def pick(self, version: str | None) -> ServedModel:
        """The version that answers a request which asks for this one, or for none. Raises ApiError (404)."""

    def instead_of(self, failed: ServedModel) -> ServedModel | None:
        """What answers a request of which this one could not begin the answer; None where nothing else can."""

    def blame(self, refusing: ServedModel) -> None:
        """Count a request against the version that would not take it, for another has answered it."""

    def check(self) -> None:
        """Raises ServeError when it cannot answer any more."""


async def open_model(spec: ServeSpec, folder: str, number: int = 0) -> ServedModel:
    """A started engine with its tokenizer and its places: its replica's model of that number.

    Raises ConfigError or ServeError when it cannot load.
    """
    made = plugins.load("serving.engines", spec.engine, path="engine")
    engine: Engine = made(folder, engine_options(spec, folder, number))
    return await started(spec, folder, engine)


async def started(spec: ServeSpec, folder: str, engine: Engine) -> ServedModel:
    """The model of an engine, which is started first. Raises ConfigError or ServeError when it cannot."""
    await engine.start()
    tokenizer = await asyncio.to_thread(load_tokenizer, folder)  # others are answered meanwhile
    num_ids = getattr(load_config(folder).get_text_config(), "vocab_size", None)
    prompts = PromptBuilder(tokenizer, engine.media_encoder, spec.max_media, engine.max_model_len, num_ids)
    places = Admission(spec.max_concurrency, spec.max_queued)
    return ServedModel(engine, prompts, places, version_of(folder), lineage_of(folder), SamplingDefaults.of(folder))
