"""The keys a job may have, and what a person who wrote another one probably meant.

Reads the fields of the pydantic models; knows the spellings of other trainers. Knows no files.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayswift.config.job import Job

# What Hugging Face Trainer, ms-swift, LLaMA-Factory and axolotl call it -> what it is here.
FOREIGN = {
    "adam_beta1": "train.betas", "adam_beta2": "train.betas", "attn_implementation": "model.attention",
    "attn_impl": "model.attention", "base_model": "model.path", "batch_size": "train.global_batch_size",
    "bf16": "model.dtype=bfloat16", "cutoff_len": "data.max_length", "dataset": "data.train.0.path",
    "datasets": "data.train.0.path", "deepspeed": "parallel.deepspeed", "epoch": "train.epochs",
    "eval_dataset": "data.eval.0.path", "eval_steps": "train.eval_every", "finetuning_type": "adapter.name",
    "flash_attn": "model.attention", "fp16": "model.dtype=float16", "fsdp": "parallel.dp_shard",
    "gpus": "cluster.workers", "grad_clip": "train.max_grad_norm",
    "gradient_accumulation": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_checkpointing": "model.activation_checkpointing", "learning_rate": "train.lr",
    "logging_steps": "train.log_every", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank", "lora_rank": "adapter.rank", "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets", "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule", "max_samples": "data.train.0.limit",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length",
    "micro_batch": "train.micro_batch_size", "model_id": "model.path", "model_max_length": "data.max_length",
    "model_name_or_path": "model.path", "n_epochs": "train.epochs", "num_epochs": "train.epochs",
    "num_gpus": "cluster.workers", "num_processes": "cluster.workers", "num_train_epochs": "train.epochs",
    "num_workers_per_node": "cluster.workers", "optim": "train.optimizer", "output_dir": "output",
    "per_device_train_batch_size": "train.micro_batch_size", "pipeline_model_parallel_size": "parallel.pp",
    "pipeline_parallel_size": "parallel.pp", "context_parallel_size": "parallel.cp",
    "sequence_parallel_size": "parallel.cp", "expert_parallel_size": "parallel.ep",
    "expert_model_parallel_size": "parallel.ep", "preprocessing_num_workers": "data.num_workers",
    "quarantine": "data.max_bad_fraction", "r": "adapter.rank", "report_to": "logging.trackers",
    "resume_from_checkpoint": "train.resume", "run_name": "name", "sample_packing": "data.packing",
    "save_steps": "train.save_every", "save_total_limit": "train.keep_checkpoints",
    "sequence_len": "data.max_length", "stage": "method.name", "steps": "train.max_steps",
    "target_modules": "adapter.targets", "tensor_model_parallel_size": "parallel.tp",
    "tensor_parallel_size": "parallel.tp", "tokenizer_path": "model.path", "torch_dtype": "model.dtype",
    "train_batch_size": "train.micro_batch_size", "train_type": "adapter.name", "use_gradient_checkpointing":
    "model.activation_checkpointing", "val_dataset": "data.eval.0.path", "warmup_ratio": "train.warmup_steps",
    "dataloader_num_workers": "data.num_workers", "dataset_num_proc": "data.num_workers",
    "eval_strategy": "train.eval_every", "evaluation_strategy": "train.eval_every", "gradient_clipping":
    "train.max_grad_norm", "group_by_length": "data.packing", "neat_packing": "data.packing",
    "overwrite_output_dir": "train.resume", "per_device_eval_batch_size": "train.micro_batch_size",
    "save_strategy": "train.save_every", "split_dataset_ratio": "data.eval.0.path", "truncation_strategy":
    "data.truncation", "tuner_type": "adapter.name", "val_set_size": "data.eval.0.path",
}  # fmt: skip
_NOTES = {
    "gradient_accumulation": "accumulation follows from global_batch_size / (micro_batch_size * workers)",
    "gradient_accumulation_steps": "accumulation follows from global_batch_size / (micro_batch_size * workers)",
    "group_by_length": "packed sequences have no padding that sorting could save",
    "neat_packing": "packed documents never see each other",
    "overwrite_output_dir": "a run is continued, or gets another name",
    "split_dataset_ratio": "held-out rows are files of their own",
    "val_set_size": "held-out rows are files of their own",
    "warmup_ratio": "the warmup is counted in steps",
}
_QUANTIZED_BASE = "a base in 4 bits is model.quantization=nf4, with adapter.name=lora"
# What other trainers have and a job has not, with what to do instead.
_ABSENT = {
    "load_in_4bit": _QUANTIZED_BASE, "load_in_8bit": _QUANTIZED_BASE, "quantization_bit": _QUANTIZED_BASE,
    "quant_bits": _QUANTIZED_BASE, "quant_method": _QUANTIZED_BASE,
    "chat_template": "the chat template is the tokenizer's own: chat_template.jinja in the folder of model.path",
    "template": "the chat template is the tokenizer's own: chat_template.jinja in the folder of model.path",
}  # fmt: skip


def section(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model an annotation holds (`AdapterSpec | None`, `tuple[DataSource, ...]`), if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        return next((found for arg in get_args(annotation) if (found := section(arg))), None)
    return None


def is_list(annotation: Any) -> bool:
    """Whether an annotation holds a list of values."""
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return any(is_list(arg) for arg in get_args(annotation))
    return get_origin(annotation) in (tuple, list)


def is_index(part: str | int) -> bool:
    """Whether a part of a key numbers a list's entries. `²` is a digit to Python and no number."""
    text = str(part)
    return text.isascii() and text.isdecimal()


def field_at(loc: tuple[str | int, ...], model: type[BaseModel] = Job) -> FieldInfo | None:
    """The field behind `("data", "train", 0, "path")`, or None. Numbers index lists."""
    current: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in loc:
        if is_index(part) and field is not None and is_list(field.annotation):
            continue
        if current is None or part not in current.model_fields:
            return None
        field = current.model_fields[str(part)]
        current = section(field.annotation)
    return field


def level(loc: tuple[str | int, ...], model: type[BaseModel] = Job) -> type[BaseModel] | None:
    """The section that holds the keys below `loc`; None where there is no section."""
    if not loc:
        return model
    field = field_at(loc, model)
    return None if field is None else section(field.annotation)


@cache
def known(model: type[BaseModel] = Job) -> tuple[str, ...]:
    """Every dotted key of a model, sections and leaves; list entries are spelled with index 0."""
    return tuple(_known(model, ""))


def _known(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        below = section(field.annotation)
        if below is not None:
            yield from _known(below, f"{prefix}{name}.0." if is_list(field.annotation) else f"{prefix}{name}.")


def suggestion(loc: tuple[str | int, ...], model: type[BaseModel] = Job, *, root: str = "") -> str:
    """What to write instead of an unknown key: `did you mean train.lr?`, or the keys that exist there."""
    word = str(loc[-1]).replace("-", "_").lower()
    here = level(loc[:-1], model)
    prefix = root + "".join(f"{part}." for part in loc[:-1])
    names = list(here.model_fields) if here else []
    if (close := _closest(word, names)) and close not in FOREIGN:
        return f"did you mean {prefix}{close}?"
    if model is not Job and close is None:
        close = word  # an option of a method that is none may be a key of the job
    if word in _ABSENT:
        return _ABSENT[word]
    if close in FOREIGN:
        note = f" ({_NOTES[close]})" if close in _NOTES else ""
        return f"did you mean {FOREIGN[close]}?{note}"
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(known())}
    if found := difflib.get_close_matches(word, leaves, n=1, cutoff=0.75):
        return f"did you mean {leaves[found[0]]}?"
    return f"the keys there are {', '.join(names)}" if names else "there is nothing to set there"


def is_foreign(word: str) -> bool:
    """Whether another trainer has a setting of this name."""
    return word in FOREIGN or word in _ABSENT


def _closest(word: str, names: list[str]) -> str | None:
    """The name that is closest to a word: one of `names`, or, when it is nearly that, of another trainer's."""
    if word in FOREIGN:
        return word
    found = difflib.get_close_matches(word, {*names, *FOREIGN}, n=1, cutoff=0.85)
    return next(iter(found or difflib.get_close_matches(word, names, n=1, cutoff=0.6)), None)
