"""The Job: everything a run depends on, frozen, validated, and hashed.

Knows pydantic only. The docstring under a field is its help, its documentation and its schema text.
What a method's own options mean is known by that method's `Config` (`rayswift/methods/`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Base of every job section: frozen, no unknown keys, numbers finite, docstrings under fields are descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes `true` for 1 and 1.0, people mean a switch."""
        wanted = _leaf_types(cls.model_fields[info.field_name or ""].annotation)
        given = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, bool) for item in given) and wanted & {int, float} and bool not in wanted:
            raise PydanticCustomError("float_type" if float in wanted else "int_type", "is not a number")
        return value


def _leaf_types(annotation: Any) -> set[type]:
    """`{int, str}` for `PositiveInt | Literal["auto"]`."""
    args = get_args(annotation)
    if get_origin(annotation) is Literal:
        return set(map(type, args))
    return set().union(*map(_leaf_types, args)) if args else {annotation}


Number = float  # `2e-5`, which is a string to YAML 1.1, is read as one too
Fraction = Annotated[Number, Field(ge=0, lt=1)]
NonNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Tag = Literal["role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag"]
Part = Literal["vision", "audio", "projector", "language"]
Dtype = Literal["float32", "bfloat16", "float16", "float8"]


class MethodSpec(BaseModel):
    """Which loss is trained. Further keys are the options of that method's own Config."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str = "sft"
    """The method: a module of `rayswift/methods`, such as `sft` or `pretrain`."""

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside `name`, to be validated by the method's Config."""
        return dict(self.model_extra or {})


class ModelSpec(Section):
    """Which base model is trained."""

    path: str
    """A local Hugging Face folder, or a hub id with an optional revision: `org/name@revision`."""
    dtype: Dtype = "float32"
    """The type forward and backward are computed in. Trained parameters are kept in float32. `float16` scales the loss,
    `float8` multiplies matrices in FP8 (torchao) and computes the rest in bfloat16."""
    quantization: Literal["nf4"] | None = None
    """Keep the frozen base of an adapter in 4 bits (bitsandbytes, double quantization): QLoRA."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """The attention implementation of transformers."""
    freeze: tuple[Part, ...] = ()
    """Parts that are not trained, by full fine-tuning or an adapter: `[vision, projector]`."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


class AdapterSpec(Section):
    """A low-rank adapter trained instead of the whole model (peft)."""

    name: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: PositiveInt = 8
    """The rank of the update."""
    alpha: Number = 16
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Module names that get an adapter, or `all-linear`."""


class DataSource(Section):
    """One source of rows: a file, a glob, a folder, an fsspec URL or a dataset on a hub."""

    path: str
    """A path, a glob (`data/*.jsonl`), a folder, a URL that fsspec opens (`s3://bucket/x.jsonl`), or a dataset on
    Hugging Face's hub or ModelScope: `hf::ID[@REVISION][:SUBSET][/SPLIT][#N]`, `ms::...`; N are the first rows."""
    dataset: str | None = None
    """An entry of the LLaMA-Factory `dataset_info.json` that `path` names: its file, columns and tags are used."""
    format: str = "auto"
    """The row format: a module of `rayswift/data/formats`, or `auto` to find it from the columns."""
    columns: dict[str, str] = {}
    """Rename columns before the format is found: `{question: query}`."""
    tags: dict[Tag, str] = {}
    """What turns call their keys and roles, in LLaMA-Factory's words: `{role_tag: speaker, user_tag: customer}`."""
    text_unit: Literal["line", "paragraph", "document"] = "line"
    """What a row of a `.txt` file is: a line, a paragraph (blank lines between), or the whole file."""
    system: str | None = None
    """A system message put before rows that have none."""
    question: str | None = None
    """What rows of images, sounds or videos with only a text, caption or label are asked: `Which digit is this?`"""
    limit: PositiveInt | None = None
    """Use the first so many rows of this source."""
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How often each row is seen per epoch; 0.5 is a seeded half of the rows, 2 is every row twice. Another
    `data.mixing.stopping` than `weights` takes it for a share instead."""


class MixingSpec(Section):
    """How much of each source an epoch has."""

    stopping: Literal["weights", "first_exhausted", "all_exhausted"] = "weights"
    """`weights`: each source is visited as often as its `weight` says. Under the others, weights are the shares that
    sources have of an epoch, 3 and 1 as well as 0.75 and 0.25, and every source is mixed in evenly.
    `first_exhausted`: an epoch ends when the first source is used up; of the others it has seeded parts.
    `all_exhausted`: it ends when the last source was seen whole; the others begin again."""


class MediaSpec(Section):
    """How images, audio and video are read and bounded. What is over a bound is quarantined."""

    kinds: tuple[Literal["image", "audio", "video"], ...] | Literal["auto"] = "auto"
    """What the rows have; `auto` looks at the first rows of each source. A row with another kind is quarantined."""
    folder: str | None = None
    """The folder or URL that paths in rows start from. Default: the folder of the data file."""
    allow_outside: bool = False
    """Also read paths that lead out of that folder."""
    allow_urls: bool = False
    """Also fetch `http://` and `https://` URLs that rows name."""
    max_bytes: PositiveInt = 256 << 20
    """The largest file read."""
    max_pixels: PositiveInt = 50_000_000
    """The most pixels of an image, or of a frame of a video, before it is scaled down."""
    max_audio_seconds: Annotated[Number, Field(gt=0)] = 600.0
    """The longest sound."""
    video_fps: Annotated[Number, Field(gt=0)] = 2.0
    """Frames taken of each second of a video."""
    max_frames: Annotated[PositiveInt, Field(ge=2)] = 64
    """The most frames taken of a video."""


class DataSpec(Section):
    """What is trained on, what is held out, and how rows become sequences."""

    train: tuple[DataSource, ...] = Field(min_length=1)
    """The sources trained on."""
    eval: tuple[DataSource, ...] = ()
    """The held-out sources that `eval_loss` is measured on."""
    max_length: Annotated[PositiveInt, Field(ge=8)] = 1024
    """The longest sequence, in tokens."""
    packing: bool = True
    """Fill sequences with several documents, isolated from each other by their position ids."""
    truncation: Literal["right", "left", "delete", "split"] | None = None
    """What to do with a row over `max_length`: cut it at the right or the left, quarantine it (`delete`), or
    `split` it into several sequences. Default: `split` for plain text, `right` for conversations."""
    loss: str = "default"
    """What is trained in conversations: `default` (every answer of the assistant), `last_round` (those after the last
    question) or `all` (every token). Then, chained with `+`, the parts of answers that count more or not at all, as
    in `last_round+ignore_empty_think+hermes`: names of modules of `rayswift/data/weighting`."""
    loss_weights: dict[str, NonNegative | tuple[NonNegative, NonNegative]] = {}
    """More such parts: a regular expression and the factor of what it matches, or `[a, b]` for a delimiter and for
    what follows it up to the next delimiter: `{"\\\\d+": 2, "Observation:": [1, 0]}`."""
    media: MediaSpec = MediaSpec()
    """Images, audio and video."""
    mixing: MixingSpec = MixingSpec()
    """How much of each source an epoch has."""
    shuffle: bool = True
    """Visit the rows in a new seeded order in every epoch."""
    max_bad_fraction: Annotated[Number, Field(ge=0, le=1)] = 0.01
    """The run ends with exit code 4 once more than this fraction of an epoch's rows is quarantined."""
    chunk_rows: PositiveInt = 2048
    """Rows that are shuffled, tokenized and packed together: the unit of work and of the ledger."""
    cache: str | None = None
    """A folder or URL that every worker sees, where tokenized and packed rows are kept: a second run over the same
    files with the same tokenizer and settings starts at once. Nothing else is taken from it, and no rows with media."""
    num_workers: PositiveInt | None = None
    """Ray Data tasks that prepare rows at the same time. Default: what the cluster has to spare."""


class TrainSpec(Section):
    """How long, how fast, and how it is kept."""

    epochs: PositiveInt = 1
    """Passes over the data, unless `max_steps` ends the run before."""
    max_steps: PositiveInt | None = None
    """Optimizer steps after which the run ends. Also the horizon of the learning rate schedule."""
    global_batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all workers."""
    micro_batch_size: PositiveInt = 4
    """Sequences per forward pass of one worker."""
    lr: Annotated[Number, Field(gt=0)] = 1e-4
    """The peak learning rate."""
    lr_groups: dict[Part, Annotated[Number, Field(gt=0)]] = {}
    """Other peak learning rates for parts of the model: `{vision: 1e-5, projector: 1e-3}`."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    warmup_steps: Count = 0
    """Optimizer steps over which the learning rate rises from zero."""
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """The learning rate at the end, as a fraction of the peak."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """The optimizer."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices (norms and biases are left alone)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates."""
    momentum: Fraction = 0.0
    """SGD's momentum."""
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null leaves gradients alone."""
    seed: Annotated[Count, Field(lt=2**31)] = 0
    """Seeds the order of rows, dropout and fresh adapters."""
    log_every: PositiveInt = 1
    """Steps between progress lines; metrics.jsonl has every step."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; null evaluates at the start and at the end."""
    save_every: PositiveInt | None = 50
    """Steps between checkpoints; null saves only at the end."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints that are kept."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` continues a run of the same name and job, `never` refuses an existing run, `must` demands one."""
    self_check: bool = True
    """Prove before the first step, on the run's own model and first rows, that packing changes no loss and that the
    prompts trained on are those that will be served; a run that fails is stopped. Takes a second or two."""


class ParallelSpec(Section):
    """How the model and the batch are spread over workers."""

    engine: str = "auto"
    """The engine: a module of `rayswift/parallel/engines`, or `auto`."""
    dp_replicate: PositiveInt = 1
    """Copies of the model that average gradients (DDP)."""
    dp_shard: PositiveInt | Literal["auto"] = "auto"
    """Workers that one copy's parameters, gradients and optimizer state are sharded over (FSDP)."""
    tp: PositiveInt = 1
    """Tensor parallel size."""
    pp: PositiveInt = 1
    """Pipeline parallel size."""
    cp: PositiveInt = 1
    """Context parallel size."""
    ep: PositiveInt = 1
    """Expert parallel size: the experts of a mixture are spread over so many of the dp_shard workers."""
    schedule: Literal["1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = "1f1b"
    """The pipeline schedule. All but `1f1b` put two stages on each worker."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lies in the host's memory between uses: the optimizer's state, or that, parameters and gradients."""
    nvme: str | None = None
    """A folder on fast local disks of every node that takes what `offload` moves out (DeepSpeed's ZeRO-Infinity)."""
    zero_stage: Literal[1, 2, 3] | None = None
    """DeepSpeed's ZeRO stage; null leaves it to the engine."""
    deepspeed: str | None = None
    """A DeepSpeed JSON as Hugging Face users write it, `auto` values included; it is checked against the job."""


class ClusterSection(Section):
    """Where the run happens."""

    workers: PositiveInt | Literal["auto"] = "auto"
    """Training processes, one accelerator each; `auto` takes every accelerator, or one worker on a CPU."""
    device: Literal["auto", "cpu", "cuda", "npu", "mps", "xpu"] = "auto"
    """The kind of device; `auto` takes the accelerator that torch finds."""
    address: str | None = None
    """The Ray cluster to join; null joins the cluster of RAY_ADDRESS, or starts one on this machine."""
    max_failures: Count = 3
    """Worker failures survived by restarting from the newest checkpoint."""
    scheduling_timeout_s: Annotated[Number, Field(gt=0)] = 300
    """Seconds to wait for the workers to be placed before the run ends with exit code 3."""


class LoggingSpec(Section):
    """Where metrics go beside metrics.jsonl. A tracker that fails is reported once and never stops a run."""

    tensorboard: bool = True
    """Write TensorBoard event files below the run directory."""
    trackers: tuple[str, ...] = ()
    """Optional trackers: modules of `rayswift/training/trackers` (`wandb`, `mlflow`, `trackio`)."""
    project: str = "rayswift"
    """The project name trackers file the run under."""


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[^@]*)?")


_HUB_DATASET = re.compile(r"(hf|ms)::", re.IGNORECASE)
_PINNED = re.compile(r"(@?)~[0-9a-f]{40}")


def is_hub_dataset(path: str) -> bool:
    """Whether the path of a source is a dataset on a hub, `hf::...` or `ms::...` (`rayswift.data.hub_sources`)."""
    return _HUB_DATASET.match(path) is not None


def is_hub_id(path: str) -> bool:
    """Whether a model path is `name`, `org/name` or `org/name@revision` and no local folder."""
    return not os.path.isdir(path) and _HUB_ID.fullmatch(path) is not None


# Changing these between two sessions of a run does not change which losses it computes, or extends it knowingly.
_FREE_ON_RESUME: dict[str, tuple[str, ...]] = {
    "train": (
        "epochs",
        "max_steps",
        "log_every",
        "eval_every",
        "save_every",
        "keep_checkpoints",
        "resume",
        "self_check",
    ),
    "data": ("num_workers", "eval", "max_bad_fraction", "cache"),
}


class Job(Section):
    """One training run. See the README for an example file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name; its directory is `output/name`."""
    output: str = "runs"
    """The folder, or fsspec URL, that run directories are made in."""
    method: MethodSpec = MethodSpec()
    """The method and its options."""
    model: ModelSpec
    """The base model."""
    adapter: AdapterSpec | None = None
    """The adapter, or null for full fine-tuning."""
    data: DataSpec
    """The rows."""
    train: TrainSpec = TrainSpec()
    """The optimization."""
    parallel: ParallelSpec = ParallelSpec()
    """The layout."""
    cluster: ClusterSection = ClusterSection()
    """The cluster."""
    logging: LoggingSpec = LoggingSpec()
    """The metrics."""

    @model_validator(mode="after")
    def _batch_sizes_agree(self) -> Job:
        if self.train.global_batch_size < self.train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={self.train.micro_batch_size} is larger than "
                f"train.global_batch_size={self.train.global_batch_size}; lower it to the global batch size"
            )
        return self

    @model_validator(mode="after")
    def _settings_belong_together(self) -> Job:
        if self.model.quantization is not None and self.adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization} freezes the base, and without an adapter there is "
                "nothing else to train; set adapter.name=lora, or model.quantization=null"
            )
        if set(self.model.freeze) & set(self.train.lr_groups):
            part = sorted(set(self.model.freeze) & set(self.train.lr_groups))[0]
            raise ValueError(
                f"train.lr_groups gives {part} a learning rate, and model.freeze keeps it as it is; leave out one"
            )
        if self.data.media.kinds != "auto" and len(set(self.data.media.kinds)) < len(self.data.media.kinds):
            raise ValueError("data.media.kinds names a kind twice")
        p = self.parallel
        if p.nvme is not None and p.offload == "none" and p.deepspeed is None:
            raise ValueError(
                f"parallel.nvme={p.nvme} takes what parallel.offload moves out, which is nothing; "
                "set parallel.offload=optimizer or parameters, or parallel.nvme=null"
            )
        return self

    @property
    def run_dir(self) -> str:
        """The run directory, `output/name`, as a path or URL."""
        return f"{self.output.rstrip('/')}/{self.name}"

    @property
    def needs_base(self) -> bool:
        """Whether what is trained means something beside its own base only: a checkpoint lacks what was not trained."""
        return self.adapter is not None or bool(self.model.freeze)

    def num_micro_batches(self, data_size: int) -> int:
        """Micro-batches of one of `data_size` data ranks per optimizer step."""
        return -(-self.train.global_batch_size // (data_size * self.train.micro_batch_size))

    def identity(self) -> dict[str, Any]:
        """The part of the job that decides which losses are computed, as plain data.

        Local paths count by their last part only: the same run may be continued from another folder, as every
        `ray job submit --working-dir .` does. That the rows are the same is known by the ledger's fingerprint, and
        that a local base is the same by the hash of its weights. A hub id counts whole, its revision too; the commit
        that a dataset of a hub was pinned to is no part of the job, and that its rows are the same is known as well.
        """
        plain = self.model_dump(mode="json", exclude={"output", "cluster", "parallel", "logging"})
        for section, keys in _FREE_ON_RESUME.items():
            for key in keys:
                plain[section].pop(key)
        base = self.model.path
        plain["model"]["path"] = base if is_hub_id(base) else os.path.basename(base.rstrip("/"))
        for source in plain["data"]["train"]:
            path = source["path"]
            hub = is_hub_dataset(path)
            source["path"] = _PINNED.sub("", path) if hub else os.path.basename(path.rstrip("/"))
        return plain

    def job_hash(self) -> str:
        """sha256 (hex) of `identity()`: two jobs with the same hash train the same model on the same rows."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
