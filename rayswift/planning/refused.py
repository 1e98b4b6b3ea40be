"""Which architectures cannot be cut along an axis, packed or adapted, although nothing in their config says so.

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
    """Why architectures are refused, and for which of their configs and jobs. `axis` is one, `packing` or `adapter`."""

    axis: str
    model_types: tuple[str, ...]
    reason: str
    applies: Callable[[Mapping[str, Any], Job], bool] = lambda config, job: True
    instead: str | None = None


def _trains_everything(config: Mapping[str, Any], job: Job) -> bool:
    return job.adapter is None


def _has_head_norms(config: Mapping[str, Any], job: Job) -> bool:
    return bool(config.get("use_qk_norm"))


def _trains_head_norms(config: Mapping[str, Any], job: Job) -> bool:
    return _has_head_norms(config, job) and _trains_everything(config, job)


def _adapts_experts(config: Mapping[str, Any], job: Job) -> bool:
    """Whether peft 0.21 moves an adapter from layers of these names to fused experts, which once had such layers."""
    return bool(_targets(job) & {"all-linear", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def _adapts_router(config: Mapping[str, Any], job: Job) -> bool:
    return bool(_targets(job) & {"all-linear", "router"})


def _targets(job: Job) -> set[str]:
    """The last parts of the names of the layers an adapter goes on."""
    if job.adapter is None:
        return set()
    targets = [job.adapter.targets] if isinstance(job.adapter.targets, str) else job.adapter.targets
    return {target.rpartition(".")[2] for target in targets}


def _caps_scores(config: Mapping[str, Any], job: Job) -> bool:
    return config.get("attn_logit_softcapping") is not None


def _chunks_are_shorter(config: Mapping[str, Any], job: Job) -> bool:
    chunk = config.get("attention_chunk_size")
    return chunk is not None and chunk < job.data.max_length


_SHARED = ("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "qwen3_next")
_HYBRIDS = ("jamba", "lfm2", "mamba", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
_LEFT_OUT = "transformers' plan leaves out its {}, of whose gradients each worker has a part"
_NOT_CUT = "transformers' plan does not cut its head norms (use_qk_norm) with the heads"
_CAPS = "its attention caps scores (attn_logit_softcapping), which the exchanged one does not"
_CHUNKS = "it attends to chunks of a sequence (attention_chunk_size), which would begin in the middle of documents"
_ROUTER = "its router is a linear layer that gives back two tensors"
_EXPERTS = "peft puts its adapter on stacked experts, whose low-rank pairs cannot be cut"
_ATTENTION_ONLY = "name the attention's layers in adapter.targets, or use parallel.{axis}=1"

REFUSED: tuple[Refusal, ...] = (
    Refusal("tp", ("apertus",), _LEFT_OUT.format("activations"), _trains_everything),
    Refusal("tp", ("glm4_moe",), _LEFT_OUT.format("head norms (use_qk_norm)"), _trains_head_norms),
    Refusal("tp", ("cohere",), _NOT_CUT, _has_head_norms),
    Refusal("tp", ("llama4_text",), "it changes in place what transformers' plan hands it as a view"),
    Refusal("tp", _SHARED, _EXPERTS, _adapts_experts, _ATTENTION_ONLY),
    Refusal("ep", _SHARED, _EXPERTS, _adapts_experts, _ATTENTION_ONLY),
    Refusal("adapter", ("llama4_text", "phimoe"), _ROUTER, _adapts_router),
    Refusal("cp", ("bloom", "falcon", "gptj", "mpt"), "its attention cannot be exchanged for one over whole sequences"),
    Refusal("cp", ("nemotron", "stablelm"), "its attention is not handed down what the exchange needs"),
    Refusal("cp", _HYBRIDS, "some of its blocks are no attention and would see a part of each sequence"),
    Refusal("cp", ("gemma2",), _CAPS, _caps_scores),
    Refusal("cp", ("gpt_oss",), "its attention has sinks, which the exchanged one has not"),
    Refusal("cp", ("llama4_text",), "it attends to chunks of tokens, of which the exchanged attention does not know"),
    Refusal("packing", ("bloom", "falcon", "gpt_oss", "mpt", "opt"), "its attention does not look at position ids"),
    Refusal("packing", _HYBRIDS, "its blocks carry a state from one token to the next, over documents too"),
    Refusal("packing", ("llama4_text",), _CHUNKS, _chunks_are_shorter),
)


def check_refused(job: Job, config: Mapping[str, Any]) -> None:
    """Raises PlanError for what is known to go wrong with the model of a parsed config.json."""
    nested = config.get("text_config")
    inner = nested if isinstance(nested, Mapping) else config
    names = (str(config.get("model_type")), str(inner.get("model_type")))
    p = job.parallel
    asked: dict[str, Any] = {"tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep}
    asked = {axis: size for axis, size in asked.items() if size > 1}
    asked |= {"packing": True} if job.data.packing else {}
    asked |= {"adapter": job.adapter.targets} if job.adapter is not None else {}
    for refusal in REFUSED:
        name = next((name for name in names if name in refusal.model_types), None)
        if name is not None and refusal.axis in asked and refusal.applies(inner, job):
            raise _error(refusal, name, asked[refusal.axis])


_WORDING = {
    "packing": ("pack rows of", "data.packing", "use data.packing=false"),
    "adapter": ("adapt", "adapter.targets", "name the attention's layers"),
}


def _error(refusal: Refusal, name: str, value: Any) -> PlanError:
    axis = refusal.axis
    cut = ("cut", f"parallel.{axis}", f"use parallel.{axis}=1; dp_shard shards its parameters too")
    verb, path, instead = _WORDING.get(axis, cut)
    fix = refusal.instead.format(axis=axis) if refusal.instead else instead
    return PlanError(f"has no way to {verb} {name}: {refusal.reason}", path=path, value=value, fix=fix)
