"""Tiny models and batches that the engine suites share, and one process to compare with, written another way.

`Reference` knows nothing of RaySwift's losses, batches or engines: it feeds whole documents one by one to the
Hugging Face model, takes F.cross_entropy, clips by hand and steps by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rayswift import plugins
from rayswift.config.job import AdapterSpec, Job
from rayswift.data.collate import PackedSequence, collate
from rayswift.data.packing import pack
from rayswift.data.types import PackedBatch
from rayswift.methods.sft import Sft
from rayswift.parallel.engine import Engine, StepStats
from rayswift.planning.layout import Layout, Seat

VOCAB_SIZE = 128
MAX_LENGTH = 32
DOCS_PER_STEP = 11
METHOD = Sft(Sft.Config())


@dataclass(frozen=True)
class Document:
    """A tokenized row: which tokens, and which of them are trained on."""

    ids: np.ndarray
    mask: np.ndarray


def tiny_model(
    arch: str = "qwen3", *, lora: bool = False, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0,
    layers: int = 2,
) -> Any:  # fmt: skip
    """A random model of a few blocks whose weights are large enough for a leak or a missing step to be seen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from rayswift.models.adapters import add_lora

    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 128}
    other = {} if arch == "gpt2" else {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    if arch.endswith("moe"):
        other |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    other["tie_word_embeddings"] = tied
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(arch, vocab_size=VOCAB_SIZE, initializer_range=0.1, **ends, **sizes, **other)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.config.use_cache = False
    if not lora:
        return model
    adapted = add_lora(model, AdapterSpec(rank=4), seed=seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # starts as zero, which would leave half of the adapter without gradients
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def documents(count: int, seed: int) -> list[Document]:
    """Random documents of 2 to 20 tokens, about a third of them not trained on."""
    random = np.random.default_rng(seed)
    found = []
    for length in random.integers(2, 21, count):
        mask = (random.random(length) < 0.7).astype(np.int64)
        mask[-1] = 1  # every document trains something
        found.append(Document(random.integers(3, VOCAB_SIZE, length), mask))
    return found


def sequences(rows: Sequence[Document], *, packing: bool) -> list[PackedSequence]:
    """The documents packed into sequences, or one by one."""
    bins = pack([len(row.ids) for row in rows], MAX_LENGTH) if packing else [[i] for i in range(len(rows))]
    return [
        PackedSequence(
            np.concatenate([rows[i].ids for i in members]),
            np.concatenate([rows[i].mask for i in members]),
            [len(rows[i].ids) for i in members],
        )
        for members in bins
    ]


def share(
    rows: Sequence[Document], *, packing: bool, micro_batches: int, data_rank: int = 0, data_size: int = 1
) -> list[PackedBatch]:
    """One rank's micro-batches of a step over these documents; ranks and micro-batches get unequal numbers of them."""
    mine = sequences(rows, packing=packing)[data_rank::data_size]
    return [collate(mine[i::micro_batches], pad_id=0) for i in range(micro_batches)]


class Reference:
    """A bare torch loop over unpacked documents in one process."""

    def __init__(self, model: Any, job: Job) -> None:
        self._model, self._lr, self._max_norm = model.train(), job.train.lr, job.train.max_grad_norm
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def step(self, rows: Sequence[Document]) -> tuple[float, float]:
        """(mean loss of a trained token, gradient norm before clipping) of one SGD step."""
        loss = self._loss(rows)
        grads = torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True)  # an expert no token chose
        flat = [grad.flatten() for grad in grads if grad is not None]
        norm = float(torch.cat(flat).norm())
        scale = 1.0 if self._max_norm is None else min(1.0, self._max_norm / (norm + 1e-6))
        with torch.no_grad():
            for parameter, grad in zip(self._trained.values(), grads, strict=True):
                if grad is not None:
                    parameter -= self._lr * scale * grad
        return float(loss.detach()), norm

    def evaluate(self, rows: Sequence[Document]) -> float:
        """The mean loss of a trained token, nothing changed."""
        self._model.eval()
        with torch.no_grad():
            loss = float(self._loss(rows))
        self._model.train()
        return loss

    def _loss(self, rows: Sequence[Document]) -> torch.Tensor:
        total, count = torch.zeros(()), 0
        for row in rows:
            ids = torch.from_numpy(row.ids)
            logits = self._model(input_ids=ids[None], use_cache=False).logits[0]
            kept = torch.from_numpy(row.mask[1:]).bool()
            total = total + F.cross_entropy(logits[:-1][kept], ids[1:][kept], reduction="sum")
            count += int(kept.sum())
        return total / count

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained tensors."""
        return {name: p.detach() for name, p in self._trained.items()}


def build(
    job: Job, layout: Layout, *, arch: str = "qwen3", tied: bool = False, layers: int = 2, engine: str = "fsdp2"
) -> Any:
    """This rank's engine around the tiny model."""
    lora = job.adapter is not None
    dtype = getattr(torch, job.model.dtype) if lora else torch.float32
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = tiny_model(arch, lora=lora, tied=tied, dtype=dtype, layers=layers)
    engine_class = plugins.load("parallel.engines", engine)
    return engine_class(model, job, Seat(layout, rank), torch.device("cpu"))


def take_step(
    engine: Engine, number: int, *, packing: bool = True, micro_batches: int = 1, lr: float = 0.1, method: Any = METHOD
) -> StepStats:
    """The stats of one SFT step over the documents of step `number`, the same ones for every layout."""
    batches = share(
        documents(DOCS_PER_STEP, seed=number), packing=packing, micro_batches=micro_batches,
        data_rank=engine.data_rank, data_size=engine.data_size,
    )  # fmt: skip
    count = engine.sum_over_data([sum(float(METHOD.count(batch)) for batch in batches)])[0]
    return engine.optimizer_step(engine.forward_backward(batches, method, count), lr)
