"""What is served and within which bounds: the ServeSpec, read from a YAML file or made from an export folder.

Knows pydantic only: no Ray, no torch. What an API key must look like is known by `serving/auth.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from rayswift.config import problems, yamlfile
from rayswift.config.job import Dtype, MediaSpec, Number, PositiveInt, Section
from rayswift.errors import ConfigError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$"
ModelName = Annotated[str, Field(pattern=_NAME, max_length=200)]


class ServeSpec(Section):
    """One endpoint. Bounds marked "per model" hold for each model of each replica."""

    models: Annotated[dict[ModelName, str], Field(min_length=1)]
    """The name clients ask for -> the export folder (or any Hugging Face folder)."""
    engine: str = "local"
    """The engine: a module of `rayswift/serving/engines`."""
    host: str = "127.0.0.1"
    """The address to listen on. Any address but a loopback one needs an API key."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """The port to listen on."""
    api_key_file: str | None = None
    """A file whose lines are the keys clients may send; without it RAYSWIFT_API_KEY is the key."""
    api_key_sha256: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """sha256 (hex) of further keys: what replicas are given, so that no key itself is stored in the cluster."""
    dtype: Dtype | Literal["auto"] = "auto"
    """The type weights are loaded in; `auto` takes them as exported."""
    device: Literal["auto", "cpu", "cuda", "npu", "mps", "xpu"] = "auto"
    """The kind of device; `auto` takes the accelerator that torch finds."""
    max_model_len: PositiveInt | None = None
    """Longest prompt plus answer in tokens; null takes what the model was built for."""
    max_new_tokens: PositiveInt = 4096
    """Longest answer in tokens that a request may ask for."""
    max_concurrency: PositiveInt = 16
    """Answers generated at the same time, per model."""
    max_queued: Annotated[int, Field(ge=0)] = 64
    """Answers that may wait for a place; further requests are told 429 and when to come back. Per model."""
    max_choices: PositiveInt = 16
    """Most answers one request may ask for (`n` times the number of prompts)."""
    max_body_bytes: PositiveInt = 2 * 2**20
    """Largest request body, images and sounds not counted."""
    max_media: Annotated[int, Field(ge=0)] = 8
    """Most images and sounds in one request, over all its messages; 0 serves text only."""
    max_media_bytes: PositiveInt = 8 * 2**20
    """Largest size of a request's images and sounds together."""
    max_media_pixels: PositiveInt = 16_000_000
    """Most pixels of an image before the model's processor scales it."""
    max_media_seconds: Annotated[Number, Field(gt=0)] = 120
    """Longest sound."""
    request_timeout_s: Annotated[Number, Field(gt=0)] = 600
    """Seconds a request may take from its arrival to its last token."""
    num_replicas: PositiveInt = 1
    """Copies of the endpoint, each with every model loaded."""
    cpus_per_replica: Annotated[Number, Field(ge=0)] = 1
    """CPU cores that Ray reserves for a replica; also its number of threads."""
    gpus_per_replica: Annotated[Number, Field(ge=0)] = 0
    """Accelerators that Ray reserves for a replica."""
    start_timeout_s: Annotated[Number, Field(gt=0)] = 600
    """Seconds to wait for the models to be placed, loaded and warmed up."""

    @property
    def media(self) -> MediaSpec:
        """The bounds of one image or sound, as they are told to the code that decodes it."""
        return MediaSpec(
            max_bytes=self.max_media_bytes, max_pixels=self.max_media_pixels, max_audio_seconds=self.max_media_seconds
        )

    @property
    def url(self) -> str:
        """The base URL that OpenAI clients are given, ending in `/v1`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"


def parse(raw: Mapping[str, Any], *, source: str = "the serve spec") -> ServeSpec:
    """The spec that plain data describes. Raises ConfigError listing every problem."""
    try:
        return ServeSpec.model_validate(raw)
    except ValidationError as error:
        raise problems.together(problems.explain(error, {}, model=ServeSpec, root="serve."), source) from None


def name_of(folder: str) -> str:
    """The name under which a folder is served that is given none: its own. Raises ConfigError where it is no name."""
    name = os.path.basename(os.path.abspath(folder))
    if not re.match(_NAME, name):
        raise ConfigError(
            "has a name that cannot be a model's (letters, digits and ._/:@- only)",
            path="models",
            value=folder,
            fix=f"give it one: NAME='{folder}', or in a YAML file models: {{NAME: '{folder}'}}",
        )
    return name


def load(path: str) -> ServeSpec:
    """The spec in a YAML file, or the one that serves an export folder under its own name. Raises ConfigError."""
    if os.path.isdir(path):
        return parse({"models": {name_of(path): path}})
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "is neither an export folder nor a YAML file that can be read",
            path="serve",
            value=path,
            fix="check the path",
        ) from error
    raw, _ = yamlfile.parse(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(
            "is not a mapping of keys to values", path="serve", value=path, fix="write models: {NAME: DIR}"
        )
    return parse(raw, source=path)
