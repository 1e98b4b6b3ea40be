"""What is served, to whom and within which bounds: the ServeSpec, from a YAML file or made from an export folder.

Knows pydantic only: no Ray, no torch. What an API key must look like is known by `serving/auth.py`, how files of keys
are read and written by `serving/keys.py`. An error about a key or its hash never shows what was given.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from rayswift.config import problems, yamlfile
from rayswift.config.job import Dtype, MediaSpec, Number, PositiveInt, Section
from rayswift.errors import ConfigError

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$"
ModelName = Annotated[str, Field(pattern=_NAME, max_length=200)]


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("is not a sha256 of 64 hex digits; it is shown nowhere, as it may be a key")
    return value


def _list(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("is not a list; write its entries in [ ]")
    return value


Sha256 = Annotated[str, BeforeValidator(_sha256)]


class ApiKey(Section):
    """One client's key, of which only the sha256 is known, and what it may ask for.

    Limits hold for each replica by itself: `num_replicas` of them together let through up to that many times as much.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$", max_length=100)]
    """What the key is called by those who gave it out."""
    sha256: Annotated[Sha256, Field(repr=False)]
    """sha256 (hex) of the key."""
    created: str | None = None
    """When it was made."""
    requests_per_minute: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Most requests let in within any 60 seconds, of whatever kind, per replica; null is no limit."""
    max_concurrency: PositiveInt | None = None
    """Most requests being answered at the same time, a stream until its last byte, per replica; null is no limit."""
    models: Annotated[tuple[ModelName, ...], Field(min_length=1)] | None = None
    """The models it may ask and sees; null is every one."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_mapping(cls, value: object) -> object:
        if not isinstance(value, Mapping | ApiKey):
            raise ValueError("is not a mapping of name, sha256 and limits; it is shown nowhere, as it may be a key")
        return value

    @property
    def is_limited(self) -> bool:
        """Whether its requests are counted."""
        return self.requests_per_minute is not None or self.max_concurrency is not None


def _distinct(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    names: dict[str, str] = {}  # by sha256
    for key in keys:
        if key.name in names.values():
            raise ValueError(f"has two keys of the name {key.name}; give one of them another name")
        if key.sha256 in names:
            raise ValueError(f"has one key as {names[key.sha256]} and as {key.name}; remove one of the two")
        names[key.sha256] = key.name
    return keys


ApiKeys = Annotated[tuple[ApiKey, ...], BeforeValidator(_list), AfterValidator(_distinct)]


class ServeSpec(Section):
    """One endpoint. Bounds marked "per model" hold for each model of each replica."""

    models: Annotated[dict[ModelName, str], Field(min_length=1)]
    """The name clients ask for -> the export folder (or any Hugging Face folder)."""
    engine: str = "auto"
    """The engine: a module of `rayswift/serving/engines`. `auto` takes vllm where its environment is there."""
    engine_python: str | None = None
    """The interpreter of the environment that the engine needs, at the same place on every node; null finds it:
    RAYSWIFT_SERVE_PYTHON, or what `make serve-env` built."""
    adapters: dict[ModelName, str] = Field(default_factory=dict)
    """A model's name -> the folder (or URL, such as s3://bucket/adapters) below which its LoRA adapters lie.

    Clients ask for one as MODEL:ADAPTER; it is loaded when it is first asked for. Engine vllm only."""
    max_adapters: PositiveInt = 4
    """Most adapters that one batch mixes, per model."""
    max_adapter_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = 64
    """Highest rank of an adapter."""
    host: str = "127.0.0.1"
    """The address to listen on. Any address but a loopback one needs an API key."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """The port to listen on."""
    api_key_file: str | None = None
    """The keys clients may send: a file of `rayswift keys add`, or one whose lines are keys without limits.

    Nobody but its owner may read it; root may lend it to a group (0440), as a secret is mounted in a container. Read
    once, when the endpoint starts. Without it RAYSWIFT_API_KEY is the key."""
    api_key_sha256: Annotated[tuple[Sha256, ...], BeforeValidator(_list), Field(repr=False)] = ()
    """sha256 (hex) of further keys: what replicas are given, so that no key itself is stored in the cluster."""
    api_keys: ApiKeys = ()
    """Keys as sha256 with their limits, which hold per replica: what replicas are given of `api_key_file`.

    With them RAYSWIFT_API_KEY is no key."""
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
    cpus_per_replica: Annotated[Number, Field(ge=0)] | None = None
    """CPU cores that Ray reserves for a replica; also its number of threads.

    null is its share of the cores where the endpoint has a cluster of this machine to itself and computes on the CPU,
    and one core elsewhere; see `placement.with_cores`."""
    gpus_per_replica: Annotated[Number, Field(ge=0)] | None = None
    """GPUs that Ray reserves for a replica, which sees no others; 0 computes on the CPU.

    null is `tensor_parallel` for each of its models where the cluster has GPUs; see `placement.with_gpus`. Half a GPU
    (0.5) leaves room for another replica, or for the next version, beside it."""
    tensor_parallel: PositiveInt = 1
    """Accelerators that share each layer of a model. They are on one node: `gpus_per_replica` has to name as many."""
    accelerator_type: str | None = None
    """The kind of node that replicas are placed on, as Ray calls it: A100, H100."""
    gpu_memory_fraction: Annotated[Number, Field(gt=0, le=1)] = 0.9
    """Of an accelerator's memory, what engine vllm takes for weights and cache: models that share one divide it, and
    of half a GPU it is half as much."""
    kv_cache_bytes: PositiveInt = 2 * 2**30
    """Cache of keys and values of engine vllm on a CPU, per model."""
    max_replicas: PositiveInt | None = None
    """Ray adds replicas up to this number while they are busy, and takes them away; null keeps `num_replicas`."""
    target_ongoing_requests: Annotated[Number, Field(gt=0)] | None = None
    """Requests per replica that Ray aims at when it adds or takes away; null is three quarters of max_concurrency."""
    promotable: bool = False
    """Whether a new version of a model can be promoted while it is served: `rayswift serve promote`. Exports only."""
    routing: Literal["load", "prefix"] = "load"
    """How a request finds its replica: where least is to do, or where the most of its prompt is cached already, as long
    as that one is not much busier. `prefix` needs `promotable`, and replicas to choose from."""
    start_timeout_s: Annotated[Number, Field(gt=0)] = 600
    """Seconds to wait for the models to be placed, loaded and warmed up."""

    @model_validator(mode="after")
    def _settings_agree(self) -> ServeSpec:
        if unknown := sorted(set(self.adapters) - set(self.models)):
            raise ValueError(f"adapters names {unknown[0]}, which is not among models; name one of them")
        if self.promotable and self.adapters:
            raise ValueError(
                "adapters are bound to their base by its sha256, and a newly trained version of it would refuse them; "
                "leave adapters or promotable out"
            )
        if self.routing == "prefix" and not self.promotable:
            raise ValueError("routing=prefix needs fronts that know the prompt; set promotable: true")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is less than num_replicas={self.num_replicas}")
        num_models = 1 if self.promotable else len(self.models)  # of a replica
        wanted = self.tensor_parallel * num_models
        if self.device == "cuda" and self.gpus_per_replica == 0:
            raise ValueError("gpus_per_replica=0 hides the GPUs that device=cuda asks for; leave one of the two out")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(
                f"gpus_per_replica={self.gpus:g} is neither whole nor a part of one GPU; Ray has no others"
            )
        if self.tensor_parallel > 1 and 0 < self.gpus < wanted:
            raise ValueError(
                f"gpus_per_replica={self.gpus:g} is less than tensor_parallel={self.tensor_parallel} for "
                f"each of {num_models} models; set it to {wanted}"
            )
        return self

    @property
    def has_keys(self) -> bool:
        """Whether clients have to send a key, as far as its hash is known yet."""
        return bool(self.api_key_sha256 or self.api_keys)

    @property
    def cpus(self) -> float:
        """Cores of a replica; one where nobody has said or found out how many."""
        return 1 if self.cpus_per_replica is None else self.cpus_per_replica

    @property
    def gpus(self) -> float:
        """GPUs of a replica; none where nobody has said or found out how many."""
        return self.gpus_per_replica or 0

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
