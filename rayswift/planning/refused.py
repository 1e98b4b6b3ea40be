"""Which architectures cannot be cut along an axis, or packed, although nothing in their config says so.

Every entry was measured: without it the cell of `bench/architectures.py` computes something else than one process, or
crashes. Engines have nets for architectures that nobody has measured yet; this table tells before a cluster starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayswift.config.job import Job
from rayswift.errors import PlanError


@dataclass(frozen=True)
class Refusal:
    """Why an architecture is refused, and for which of its configs and jobs."""

    reason: str
    applies: Callable[[Mapping[str, Any], Job], bool] = lambda config, job: True


_WHOLE = "its attention cannot be exchanged for one that sees whole sequences"
_CUT_OFF = "its attention is not handed down what the exchange needs"
_MIXED = "some of its blocks are no attention and would see a part of each sequence"
_NO_RESETS = "its attention mask does not look at position ids"
_STATE = "its blocks carry a state from one token to the next, over documents too"
_HYBRIDS = ("jamba", "lfm2", "mamba", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
_NORMS = "transformers' plan leaves out the norms of its heads, of whose gradients each worker has a part"


def _trains_everything(config: Mapping[str, Any], job: Job) -> bool:
    return job.adapter is None


def _has_head_norms(config: Mapping[str, Any], job: Job) -> bool:
    return bool(config.get("use_qk_norm"))


def _trains_head_norms(config: Mapping[str, Any], job: Job) -> bool:
    return _has_head_norms(config, job) and _trains_everything(config, job)


def _caps_scores(config: Mapping[str, Any], job: Job) -> bool:
    return config.get("attn_logit_softcapping") is not None


def _chunks_are_shorter(config: Mapping[str, Any], job: Job) -> bool:
    chunk = config.get("attention_chunk_size")
    return chunk is not None and chunk < job.data.max_length


REFUSED: dict[tuple[str, str], Refusal] = {
    ("apertus", "tp"): Refusal(
        "transformers' plan leaves out its activations, of whose gradients each worker has a part", _trains_everything
    ),
    ("cohere", "tp"): Refusal("transformers' plan does not cut the norms of its heads with them", _has_head_norms),
    ("glm4_moe", "tp"): Refusal(_NORMS, _trains_head_norms),
    ("llama4_text", "tp"): Refusal("it changes in place what transformers' plan hands it as a view"),
    **{(name, "cp"): Refusal(_WHOLE) for name in ("bloom", "falcon", "gptj", "mpt")},
    **{(name, "cp"): Refusal(_CUT_OFF) for name in ("nemotron", "stablelm")},
    **{(name, "cp"): Refusal(_MIXED) for name in _HYBRIDS},
    ("gemma2", "cp"): Refusal("its attention caps scores, which the exchanged one does not", _caps_scores),
    ("gpt_oss", "cp"): Refusal("its attention has sinks, which the exchanged one has not"),
    ("llama4_text", "cp"): Refusal("it attends to chunks of tokens, of which the exchanged attention does not know"),
    **{(name, "packing"): Refusal(_NO_RESETS) for name in ("bloom", "falcon", "gpt_oss", "mpt", "opt")},
    **{(name, "packing"): Refusal(_STATE) for name in _HYBRIDS},
    ("llama4_text", "packing"): Refusal(
        "it attends to chunks of a sequence, which would begin in the middle of documents", _chunks_are_shorter
    ),
}  # fmt: skip
"""(model type, axis or `packing`) -> why not."""


def check_refused(job: Job, config: Mapping[str, Any]) -> None:
    """Raises PlanError for a layout, or packing, that is known to go wrong with the model of a parsed config.json."""
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else config
    names = {str(config.get("model_type")), str(inner.get("model_type"))}
    asked: dict[str, Any] = {
        axis: size for axis in ("tp", "pp", "cp", "ep") if (size := getattr(job.parallel, axis)) > 1
    }
    asked |= {"packing": True} if job.data.packing else {}
    for (name, axis), refusal in REFUSED.items():
        if name in names and axis in asked and refusal.applies(inner, job):
            raise _error(name, axis, asked[axis], refusal.reason)


def _error(name: str, axis: str, value: Any, reason: str) -> PlanError:
    if axis == "packing":
        return PlanError(f"has no way to pack rows of {name}: {reason}", path="data.packing", value=True,
                         fix="set data.packing=false")  # fmt: skip
    return PlanError(f"has no way to cut {name}: {reason}", path=f"parallel.{axis}", value=value,
                     fix=f"use parallel.{axis}=1; dp_shard shards its parameters too")  # fmt: skip
