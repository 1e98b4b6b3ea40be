"""Trained tensors become one model: written over the base, or, for an adapter, merged into it and measured.

An adapter is merged into what it was trained on: of a base packed into 4 bits, that is what the bits stand for.

Everything here is float32 on the CPU: rounding to the dtype of the export comes last, in `export/pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.types import Example
from rayswift.errors import ExportError
from rayswift.export.measured import Difference
from rayswift.export.source import Source
from rayswift.export.terms import MERGE_BOUNDS
from rayswift.export.verify import difference, load_in_float32, logprobs_of
from rayswift.models.adapter_folder import attach_adapter
from rayswift.models.adapters import add_lora, load_adapter_state, load_base
from rayswift.models.loading import load_model
from rayswift.models.quantized import compute_in_float32, unpack
from rayswift.parallel.precision import compute_dtype
from rayswift.planning.parts import part_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from rayswift.config.job import ModelSpec, Part

_UNMERGED = "train one of the linear layers between embeddings and head, without biases"


@dataclass(frozen=True)
class Merged:
    """One ordinary model, and how far merging moved it; `change` is None where nothing was merged."""

    model: PreTrainedModel
    change: Difference | None = None


def build(source: Source, prompts: Sequence[list[int] | Example]) -> Merged:
    """The model of a source in float32. `prompts` are what a merge is measured on.

    Raises ExportError when the tensors are not those of the base, or when merging changed what the model computes,
    ConfigError when the base was packed in training by what is not installed.
    """
    if source.packed is not None:
        model, before = _as_trained(source, source.packed, prompts)
        return merge(adapt(model, source), prompts, before)
    model = load_in_float32(source.base)
    if source.is_plain:
        return Merged(model)
    if source.adapter is None and source.adapter_dir is None:
        overwrite(model, source.weights(), frozen=source.freeze)
        return Merged(model)
    return merge(adapt(model, source), prompts)


def adapt(model: PreTrainedModel, source: Source) -> PeftModel:
    """`model` with the trained adapter on it, not merged."""
    if source.adapter_dir is not None:
        return attach_adapter(model, source.adapter_dir)
    assert source.adapter is not None
    adapted = add_lora(model, source.adapter, seed=0, freeze=source.freeze)
    load_adapter_state(adapted, source.weights())
    return adapted


def _as_trained(
    source: Source, spec: ModelSpec, prompts: Sequence[list[int] | Example]
) -> tuple[PreTrainedModel, tuple[torch.Tensor, ...]]:
    """The base unpacked, and what the adapter says on it while it is packed as in training; both in float32."""
    packed = load_model(spec, dtype=compute_dtype(spec.dtype))
    compute_in_float32(packed)
    model = load_base(source.base, dtype="float32")
    unpack(packed, model)
    return model, logprobs_of(adapt(packed, source), prompts)


def merge(
    adapted: PeftModel, prompts: Sequence[list[int] | Example], before: Sequence[torch.Tensor] | None = None
) -> Merged:
    """The adapter merged into its base, and the measured difference. Raises ExportError when it is no rounding.

    `before` is what was trained says to the prompts, where that is not `adapted` itself.
    """
    before, on_tied = before or logprobs_of(adapted, prompts), _is_on_tied_embeddings(adapted)
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(f"cannot be merged: {error}", path="adapter", fix="train again with a lower lr") from error
    except RuntimeError as error:  # such as a bias for a layer that has none
        reason = str(error).rstrip(".")
        raise ExportError(f"cannot be merged: {reason}", path="adapter", fix=_UNMERGED) from error
    change = difference(logprobs_of(model, prompts), before, MERGE_BOUNDS)
    if not change.within and on_tied:
        raise ExportError(
            "is on embeddings that are tied to the output head, and cannot be merged: the two are one weight, and the "
            "adapter changes one of them",
            path="adapter",
            fix=_UNMERGED,
        )
    if not change.within:
        raise ExportError(
            f"changed the model when it was merged: log-probabilities moved by up to {change.max_abs:.3g}",
            path="adapter",
            fix="report this with the model's architecture",
        )
    return Merged(model, change)


def _is_on_tied_embeddings(adapted: PeftModel) -> bool:
    """Whether the adapter is on the input embeddings or on the output head of a model in which both are one weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model: Any = adapted.get_base_model()
    configs = (model.config, model.config.get_text_config())
    if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return False
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(isinstance(end, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for end in ends)


def overwrite(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], *, frozen: Sequence[Part] = ()) -> None:
    """Write trained tensors over the model's own. Raises ExportError unless every parameter is written exactly once.

    Those of `frozen` parts are kept. Tied parameters count as one, whichever of their names the tensors come under.
    """
    import torch

    own = model.state_dict(keep_vars=True)
    unknown = sorted(set(weights) - set(own))
    written = {own[name].data_ptr() for name in weights if name in own}
    lacking = sorted(
        name
        for name, p in own.items()
        if p.data_ptr() not in written and isinstance(p, torch.nn.Parameter) and part_of(name) not in frozen
    )
    wrong = sorted(name for name in weights if name in own and own[name].shape != weights[name].shape)
    for names, rule in ((unknown, "are unknown to"), (lacking, "are missing for"), (wrong, "have another shape in")):
        if names:
            raise ExportError(
                f"does not fit: {len(names)} tensors {rule} {type(model).__name__}, among them {names[0]}",
                path="checkpoint",
                fix="export with the base model the run was started from",
            )
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
