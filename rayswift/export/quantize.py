"""A model made smaller in place by llm-compressor: which layers, on which rows, one block of the model at a time.

Knows no quantizer: each is a module of `export/quantizers`. What comes out is proved by `export/verify.py`.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rayswift import plugins
from rayswift.config import problems
from rayswift.data.media.features import model_inputs
from rayswift.data.types import Example
from rayswift.errors import ConfigError, ExportError
from rayswift.export.measured import Quantization
from rayswift.export.quantizers import FAMILY, Layers, Quantizer
from rayswift.export.rows import Rows
from rayswift.export.terms import QuantizeSpec
from rayswift.planning.parts import module_of, part_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OPTION = "--quantizer"


_ROUTERS = (".gate", ".router", ".shared_expert_gate")
"""Names that routers of experts end in: a wrong choice of expert costs more than a router weighs."""
_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
_MIN_FRACTION = 0.9
"""Of the weights of a language model's blocks: with less it is not the small model that was asked for."""


def asked(
    name: str, settings: Mapping[str, Any], given: Mapping[str, Any], *, num_calibration: int, num_held_out: int
) -> QuantizeSpec | None:
    """The spec of the options of a command, those left out being None; None for the quantizer `none`.

    Raises ConfigError for options of a quantizer beside `none`.
    """
    said = {option: value for option, value in {**settings, **given}.items() if value is not None}
    if name != "none":
        own = {option: value for option, value in settings.items() if value is not None}
        others = {option: value for option, value in given.items() if value is not None}
        return QuantizeSpec(name, own, num_calibration=num_calibration, num_held_out=num_held_out, **others)
    if said:
        option, value = next(iter(said.items()))
        raise ConfigError(
            "says how to quantize, and nothing is quantized", path=f"--{option.replace('_', '-')}", value=value,
            fix=f"add {_OPTION} {', '.join(plugins.names(FAMILY))}",
        )  # fmt: skip
    return None


def load_quantizer(spec: QuantizeSpec) -> Quantizer:
    """The quantizer asked for. Raises ConfigError for a name or setting nobody knows, or without llm-compressor."""
    name = spec.name
    kind = plugins.load(FAMILY, name, path=_OPTION)
    try:
        config = kind.Config.model_validate(dict(spec.settings))
    except ValidationError as error:
        raise problems.together(
            problems.explain(error, {}, model=kind.Config, root=f"{name}."), f"{_OPTION} {name}"
        ) from None
    if find_spec("llmcompressor") is None:
        raise ConfigError(
            "needs llm-compressor, which is not installed", path=_OPTION, value=name,
            fix="pip install 'rayswift[quantize]'",
        )  # fmt: skip
    made: Quantizer = kind(config)
    return made


def quantize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: QuantizeSpec, quantizer: Quantizer, rows: Rows
) -> Quantization:
    """Quantize the linear layers of the language model in place, and say what was done.

    Output heads, routers of experts and towers stay as they are. Raises ConfigError for a group size that layers
    cannot be cut into, ExportError for a model most of whose weights lie outside linear layers.
    """
    name = spec.name
    chosen, layers = _layers(model)
    _check_groups(chosen, quantizer.group_size, name)
    fraction = _fraction(model, chosen)
    if fraction < _MIN_FRACTION:
        raise ExportError(
            f"would leave {1 - fraction:.0%} of the weights of its blocks as they are: {type(model).__name__} keeps "
            "them outside linear layers, as fused experts are kept",
            path=_OPTION, value=name, fix="export without a quantizer, or serve with vLLM's own --quantization fp8",
        )  # fmt: skip
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    _run(model, tokenizer, quantizer, layers, rows.examples if quantizer.needs_rows else ())
    return Quantization(
        quantizer=name,
        settings=quantizer.config.model_dump(mode="json"),
        num_layers=len(chosen),
        ignore=layers.ignore,
        fraction=fraction,
        bytes_before=num_bytes,
        calibration=rows.used if quantizer.needs_rows else None,
        versions={package: version(package) for package in ("llmcompressor", "compressed-tensors")},
    )


def _layers(model: PreTrainedModel) -> tuple[dict[str, torch.nn.Linear], Layers]:
    """The linear layers to quantize, by name, and how a quantizer is told of them.

    Of the others patterns and no names, because files keep the names that modules had before transformers' own
    (`language_model.lm_head`): a list of names would be read back as that of other layers.
    """
    import torch

    head, chosen, ignore = model.get_output_embeddings(), dict[str, torch.nn.Linear](), dict[str, None]()
    for name, one in model.named_modules():
        if not isinstance(one, torch.nn.Linear):
            continue
        last = name.rpartition(".")[2]
        if part_of(name) != "language":
            ignore[rf"re:(.*\.)?{re.escape(module_of(name))}\..*"] = None
        elif one is head or f".{name}".endswith(_ROUTERS):
            ignore[rf"re:(.*\.)?{re.escape(last)}$"] = None
        else:
            chosen[name] = one
    return chosen, Layers(tuple(ignore), _blocks(chosen) if _has_towers(model) else None)


def _has_towers(model: PreTrainedModel) -> bool:
    """Whether it takes more than text."""
    return any(part_of(name) != "language" for name, _ in model.named_parameters())


def _blocks(layers: Mapping[str, torch.nn.Linear]) -> str | None:
    """A pattern that the names of blocks like Llama's begin with; None for others."""
    found = {name.split(".layers.")[0] for name in layers if ".layers." in name}
    if len(found) != 1 or {name.rpartition(".")[2] for name in layers} != _LLAMA:
        return None
    return rf"re:{re.escape(found.pop())}\.layers\.\d+\."


def _check_groups(layers: Mapping[str, torch.nn.Linear], size: int, name: str) -> None:
    """llm-compressor fails half way at a layer that does not divide: said before anything is done."""
    odd = [(layer, one.in_features) for layer, one in layers.items() if size > 0 and one.in_features % size]
    if not odd:
        return
    fitting = [n for n in (128, 64, 32) if not any(one.in_features % n for one in layers.values())]
    raise ConfigError(
        f"does not divide the {odd[0][1]} inputs of {odd[0][0]}", path="--group-size", value=size,
        fix=f"use --group-size {fitting[0]}" if fitting else f"use int8 or fp8 instead of {name}",
    )  # fmt: skip


def _fraction(model: PreTrainedModel, layers: Mapping[str, torch.nn.Linear]) -> float:
    """How much of the matrices in the language model's blocks is quantized; embeddings and heads do not count."""
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    inside = sum(
        p.numel() for name, p in model.named_parameters()
        if p.ndim > 1 and id(p) not in ends and part_of(name) == "language"
    )  # fmt: skip
    return sum(one.weight.numel() for one in layers.values()) / max(1, inside)


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quantizer: Quantizer, layers: Layers,
    rows: Sequence[Example],
) -> None:  # fmt: skip
    with redirect_stdout(sys.stderr):  # as it is imported it tells that there is no accelerator
        from llmcompressor.entrypoints.oneshot import oneshot
    from torch.utils.data import DataLoader

    given: dict[str, Any] = {}
    if rows:
        documents: Any = [_inputs(row) for row in rows]  # a list is a data set to torch, and not to its annotations
        given = {
            "dataset": DataLoader(documents, batch_size=None),
            "num_calibration_samples": len(rows),
            "processor": tokenizer,
        }
    with _quietly(), _without_pinned_memory(), _own_attention():
        try:
            oneshot(model=model, recipe=quantizer.modifiers(layers), **given)
        except Exception as error:  # other people's tracing of other people's models: what it raises cannot be listed
            reason = " ".join(str(error).split())[:300]
            raise ExportError(
                f"cannot be quantized so by llm-compressor: {type(error).__name__}: {reason}",
                path="model", value=type(model).__name__, fix=f"use another {_OPTION}; fp8 needs no calibration",
            ) from error  # fmt: skip


def _inputs(row: Example) -> dict[str, torch.Tensor]:
    import torch

    inputs = model_inputs(row)
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


@contextmanager
def _quietly() -> Iterator[None]:
    """Of what llm-compressor logs only errors, and its bars, which alone tell how far it is.

    It has a line for each layer and warns of what is meant, on standard output, where `--json` puts the manifest.
    """
    from llmcompressor.logger import LoggerConfig, configure_logger

    with redirect_stdout(sys.stderr):
        configure_logger(LoggerConfig(console_log_level="ERROR"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_pinned_memory() -> Iterator[None]:
    """AWQ of llm-compressor 0.14 pins memory for an accelerator where there is none, and fails."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    cache: Any = IntermediatesCache
    before = cache.pin_memory
    cache.pin_memory = lambda self, *_, **__: None
    try:
        yield
    finally:
        cache.pin_memory = before


@contextmanager
def _own_attention() -> Iterator[None]:
    """Calibrates with the attention that the model has. llm-compressor 0.14 forces the eager one upon it.

    That one keeps a mask [T, T] of each row until the last block is done, 8 GiB for 256 rows of 4,096 tokens, beside
    the scores of every head of a row. Others need none for a row alone, unless it is longer than a sliding window;
    blocks are called whole, so none may be given. And a config that code of the model hands on is made anew without its
    attention, for which no mask is made: Mistral, Phi-3 and Starcoder2 saw the tokens to come.
    """
    from llmcompressor.pipelines.sequential.helpers import SequentialTracer
    from llmcompressor.utils import helpers
    from transformers import PreTrainedConfig

    module: Any = helpers
    tracer: Any = SequentialTracer
    eager, create_arg = module.use_eager_attention, tracer.create_arg

    def with_attention(self: Any, value: Any) -> Any:
        found = create_arg(self, value)
        if isinstance(value, PreTrainedConfig):
            found.kwargs = {**found.kwargs, "attn_implementation": value._attn_implementation}
        return found

    module.use_eager_attention, tracer.create_arg = nullcontext, with_attention
    try:
        yield
    finally:
        module.use_eager_attention, tracer.create_arg = eager, create_arg


def write_ignored(folder: Path, record: Quantization) -> None:
    """Put the patterns of the layers that stay as they are into config.json, where they were resolved to names."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"]["ignore"] = list(record.ignore)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
