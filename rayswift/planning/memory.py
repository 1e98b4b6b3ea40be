"""Memory of the worker that needs most, part by part, in bytes.

Sources: ZeRO, arXiv 1910.02054 (states per parameter); Korthikanti et al., arXiv 2205.05198 (activations: 34 bytes per
token, layer and hidden unit in 16 bit, 24 of which tensor parallelism cuts; attention scores are not kept because sdpa
recomputes them); Narayanan et al., arXiv 2104.04473 (micro-batches in flight in a pipeline); Dettmers et al., arXiv
2305.14314 (nf4 with double quantization).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from rayswift.config.deepspeed_json import Zero
from rayswift.config.job import Job
from rayswift.planning.layout import Layout
from rayswift.planning.model_shape import ModelShape
from rayswift.planning.parts import part_of
from rayswift.planning.slices import Slice, all_slices

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 2}  # float8: of what is not a matrix product
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit constant per 64 of them, and one in float32 per 256
_ACTIVATION_BYTES_16BIT, _CUT_BY_TP, _FEED_FORWARD = 34, 24, 19
_RUNTIME_BYTES = 300 * 10**6  # an interpreter with torch and transformers loaded, or a CUDA context
_ZERO_BUCKET, _ZERO_LIVE = 5 * 10**8, 10**9  # parameters; DeepSpeed's defaults
_NOT_ON_DEVICE = ("host", "nvme")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one worker at the peak of a step: on its device, and what offloading puts on its host and local disk."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    runtime: int = _RUNTIME_BYTES
    host: int = 0
    nvme: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """What lies on the device, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_ON_DEVICE}

    @property
    def total(self) -> int:
        """The sum of the parts on the device."""
        return sum(self.parts.values())


def trainable_params(shape: ModelShape, job: Job) -> int:
    """Parameters that get gradients. A LoRA pair on an (n, m) matrix has rank * (n + m) of them."""
    if job.adapter is None:
        return shape.num_params - shape.frozen_params(job.model.freeze)
    wanted = job.adapter.targets
    targets = (wanted,) if isinstance(wanted, str) else wanted
    return job.adapter.rank * sum(
        layer.num_in + layer.num_out
        for layer in shape.linear_layers()
        if part_of(layer.name) not in job.model.freeze
        if wanted == "all-linear" or any(map(layer.is_named, targets))
    )


def estimate(shape: ModelShape, job: Job, layout: Layout, zero: Zero | None = None) -> MemoryEstimate:
    """The memory of the worker that needs most. Monotone: more tokens, layers or rank never need less.

    `zero` is how an engine shards that knows ZeRO's stages; None is FSDP, which shards everything.
    """
    trained = trainable_params(shape, job)
    slices = all_slices(shape, layout, job.parallel.schedule, job.num_micro_batches(layout.data_size))
    found = (_of_slice(shape, job, layout, one, round(trained * one.share_of_blocks), zero) for one in slices)
    return max(found, key=lambda memory: (memory.total, memory.host))


def checkpoint_bytes(shape: ModelShape, job: Job) -> int:
    """Bytes of one checkpoint on disk: trained weights in float32 and the optimizer's states."""
    return (4 + _state_bytes(job)) * trainable_params(shape, job)


def _of_slice(
    shape: ModelShape, job: Job, layout: Layout, part: Slice, adapter: int, zero: Zero | None
) -> MemoryEstimate:
    """The memory of a worker with this slice of the model; `adapter` counts its trained parameters where there is one.

    Low-rank pairs are cut by tensor parallelism in one of their two matrices only.
    """
    compute, full = DTYPE_BYTES[job.model.dtype], job.adapter is None
    lora = 0 if full else adapter * (1 + layout.tp) // (2 * layout.tp)
    stored = 4 if zero is None else compute  # ZeRO keeps the float32 copy with the optimizer's state
    states = _state_bytes(job) + (4 if stored < 4 else 0)
    ways = _Ways.of(layout, zero, job.num_micro_batches(layout.data_size))
    still = shape.frozen_params(job.model.freeze) if full else 0  # what is not trained of a dense model
    trained = _Params(part.dense - still, part.experts) if full else _Params(lora, 0)
    frozen = _Params(still, 0).over(ways.parameters, 1, stored) if full else _frozen_bytes(job, part, ways, layout)
    kept = _Kept(
        parameters=trained.over(ways.parameters, layout.ep, stored) + frozen,
        gradients=trained.over(ways.gradients, layout.ep, 4),
        reduced=trained.over(ways.optimizer, layout.ep, 4),
        optimizer=trained.over(ways.optimizer, layout.ep, states),
    ).moved(_offload(job) if zero is None else zero)
    return MemoryEstimate(
        parameters=kept.parameters,
        gradients=kept.gradients,
        optimizer=kept.optimizer,
        gathered=_gathered(shape, job, layout, part, lora, zero),
        activations=_activations(shape, job, layout, part),
        logits=tokens_per_worker(job, layout) * shape.vocab_size * (compute + 8) // layout.tp if part.has_head else 0,
        host=kept.host,
        nvme=kept.nvme,
    )


def _offload(job: Job) -> Zero:
    """What FSDP moves to the host, in ZeRO's words."""
    offload = job.parallel.offload
    return Zero(3, offload != "none", offload == "parameters", nvme=job.parallel.nvme is not None)


@dataclass(frozen=True)
class _Params:
    """Parameters of a worker before its data ranks share them; experts are shared by fewer, `ep` times fewer."""

    dense: int
    experts: int

    def over(self, ways: int, ep: int, bytes_each: float) -> int:
        """Bytes of one worker's share. Of sharded experts a rank of an `ep` group has its own and shares them less."""
        experts_ways = max(1, ways // ep)
        return int(bytes_each * self.dense) // ways + int(bytes_each * self.experts) // experts_ways


@dataclass(frozen=True)
class _Ways:
    """Over how many workers each state of a parameter is shared at the peak of a step."""

    parameters: int
    gradients: int
    optimizer: int

    @classmethod
    def of(cls, layout: Layout, zero: Zero | None, micro_batches: int) -> _Ways:
        """FSDP reduces gradients with the last micro-batch of a step: until then each worker holds them whole."""
        ways = layout.dp_shard * layout.cp
        if zero is not None:
            return cls(ways if zero.stage >= 3 else 1, ways if zero.stage >= 2 else 1, ways)
        return cls(ways, ways if micro_batches == 1 else 1, ways)


@dataclass(frozen=True)
class _Kept:
    """The states of a worker's parameters, and where they are. `reduced` is its share of summed gradients."""

    parameters: int
    gradients: int
    reduced: int
    optimizer: int
    host: int = 0
    nvme: int = 0

    def moved(self, offload: Zero) -> _Kept:
        """The same with what is offloaded on the host or its disk.

        The optimizer steps where its state is, so reduced gradients go there too.
        """
        whole = self.gradients > self.reduced  # these are summed up on the device first
        stepped = self.optimizer + self.reduced if offload.offload_optimizer else 0
        moved = stepped + (self.parameters if offload.offload_parameters else 0)
        return _Kept(
            parameters=0 if offload.offload_parameters else self.parameters,
            gradients=0 if offload.offload_optimizer and not whole else self.gradients,
            reduced=self.reduced,
            optimizer=0 if offload.offload_optimizer else self.optimizer,
            host=0 if offload.nvme else moved,
            nvme=moved if offload.nvme else 0,
        )


def _state_bytes(job: Job) -> int:
    return {"adamw": 8, "sgd": 4 if job.train.momentum else 0}[job.train.optimizer]


def _frozen_bytes(job: Job, part: Slice, ways: _Ways, layout: Layout) -> int:
    """Bytes of a frozen base: in the compute dtype, or the matrices of its blocks in 4 bits, stacked experts not."""
    each = _NF4_BYTES if job.model.quantization == "nf4" else DTYPE_BYTES[job.model.dtype]
    rest = _Params(part.dense - part.dense_blocks, part.experts)
    blocks = _Params(part.dense_blocks, 0).over(ways.parameters, layout.ep, each)
    return blocks + rest.over(ways.parameters, layout.ep, DTYPE_BYTES[job.model.dtype])


def _gathered(shape: ModelShape, job: Job, layout: Layout, part: Slice, lora: int, zero: Zero | None) -> int:
    """Bytes of whole parameters in use: what FSDP or ZeRO gathers, or what autocast casts in one process.

    FSDP has a block and the next one, and embeddings and head all along; in a pipeline it gathers once per step.
    """
    compute, total = DTYPE_BYTES[job.model.dtype], part.dense + part.experts + lora
    if zero is not None:
        return compute * ((min(total, _ZERO_LIVE) if zero.stage == 3 else 0) + 2 * min(total, _ZERO_BUCKET))
    if layout.world_size == 1:
        return compute * (total if job.adapter is None else lora) if compute < 4 else 0
    quantized = job.model.quantization == "nf4"
    blocks = int((_NF4_BYTES if quantized else compute) * part.dense_blocks) + compute * (part.experts + lora)
    matrix = compute * shape.hidden_size * shape.intermediate_size if quantized else 0  # one is unpacked at a time
    at_once = 1.0 if layout.pp > 1 else min(1.0, 2 / shape.num_layers)
    return int(at_once * blocks) + compute * (part.dense - part.dense_blocks) + matrix


def tokens_per_worker(job: Job, layout: Layout) -> int:
    """Tokens of one micro-batch on one worker."""
    return ceil(_rows(job, layout) * job.data.max_length / layout.cp)


def _rows(job: Job, layout: Layout) -> int:
    """Sequences of one micro-batch: there are no more than a data rank has in a step."""
    return min(job.train.micro_batch_size, ceil(job.train.global_batch_size / layout.data_size))


def _activations(shape: ModelShape, job: Job, layout: Layout, part: Slice) -> int:
    """Bytes kept for the backward pass, of all micro-batches in flight, and the masks of packed documents."""
    a_layer = _bytes_per_unit(shape, layout.tp)
    recompute = job.model.activation_checkpointing
    # Recomputation keeps the input of each block and brings back the inside of one block at a time.
    kept = part.num_layers * part.in_flight * (2 if recompute else a_layer) + (a_layer if recompute else 0)
    bytes_16bit = tokens_per_worker(job, layout) * shape.hidden_size * kept
    masks = (
        _rows(job, layout) * job.data.max_length**2
        if job.data.packing and not job.model.attention.startswith("flash")
        else 0
    )
    return ceil(bytes_16bit * DTYPE_BYTES[job.model.dtype] / 2 + masks * part.in_flight)


def _bytes_per_unit(shape: ModelShape, tp: int) -> float:
    """Bytes of a layer's activations per token and hidden unit in 16 bit.

    A mixture has its token once for each expert that it is routed to, going there and back, and three inner vectors
    of each, where a dense layer has its feed-forward part.
    """
    kept = _ACTIVATION_BYTES_16BIT - _CUT_BY_TP + _CUT_BY_TP / tp
    if shape.num_experts == 1:
        return kept
    inner = 6 * (shape.expert_size or shape.intermediate_size) / shape.hidden_size
    return kept + max(0.0, shape.experts_per_token * (4 + inner) - _FEED_FORWARD / tp)
