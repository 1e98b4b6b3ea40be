"""What a run proves of itself before its first step, on its own model, layout and rows; it stops where that fails.

That packed documents do not see each other, that rows have the losses packed that they have alone, and that what is
trained before an answer is what the server will send. Nothing of the model, its optimizer or any random state changes.
Shape legend: B sequences in a micro-batch, T tokens in a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from rayswift.config.job import Job
from rayswift.data.collate import PackedSequence, collate, joined
from rayswift.data.detect import normalise
from rayswift.data.formats import RowError
from rayswift.data.loss_rule import LossRule
from rayswift.data.rendering import prompts_before_answers
from rayswift.data.sources import read_rows
from rayswift.data.stream import StreamPlan
from rayswift.data.tokenize import encode
from rayswift.data.types import BadRow, Encoded, Example, PackedBatch, Sample
from rayswift.errors import ConfigError, DataError, RaySwiftError
from rayswift.parallel.engine import Engine
from rayswift.training.build import broadcast
from rayswift.training.media import media_encoder
from rayswift.training.order import WorkOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

_LEAK_TOLERANCE = 1e-5  # nats; a fresh random model, the least sensitive there is, leaks 0.02 and more
_TOLERANCE = {"float32": 1e-6, "float16": 2.5e-4, "bfloat16": 2e-3, "float8": 1e-2}
"""Of a loss, relative to it where it is over 1. Measured over all architectures (`bench/self_check.py`): at most 7e-9,
9e-6 and 5e-5 where rows can be packed, so that larger models may round 30 times as much; 6e-3 and more where not."""
_ROUNDING = 4.0  # times what another shape of the unpacked batch changes, for models that round more than small ones
_NUM_ROWS, _LOOKED_AT = 6, 32
_NUM_DOCUMENTS, _DOCUMENT_TOKENS = 4, 64
_FIX = "set data.packing=false"


@dataclass(frozen=True)
class Checked:
    """What was found: the largest difference of a document's loss in nats, None where nothing is packed, and in which
    time."""

    difference: float | None
    num_documents: int
    num_prompts: int
    seconds: float


@dataclass(frozen=True)
class _Rows:
    """The first rows as documents, how many prompts were compared, and what is wrong with one of them, if anything."""

    documents: tuple[PackedSequence, ...] = ()
    num_prompts: int = 0
    fault: str = ""


def self_check(engine: Engine, order: WorkOrder, rank: int) -> Checked:
    """What the checks found. Called by all ranks, of which the first reads the rows. Raises ConfigError on all of them
    where a check fails."""
    began = time.perf_counter()
    job = order.job
    rows = broadcast(_read(order) if rank == 0 else None)
    if isinstance(rows, RaySwiftError):
        raise rows
    if rows.fault:
        raise ConfigError(
            f"has a chat template that trains another prompt than is served: {rows.fault}",
            path="model.path", value=job.model.path,
            fix="mend chat_template.jinja, so that a conversation begins with the text that "
            "add_generation_prompt makes of the turns before its answer",
        )  # fmt: skip
    difference = None
    if job.data.packing:
        refuse_leaking_packing(engine, job)
        difference = refuse_other_losses(engine, job, rows.documents)
    return Checked(difference, len(rows.documents), rows.num_prompts, round(time.perf_counter() - began, 3))


def refuse_leaking_packing(engine: Engine, job: Job) -> None:
    """Raise ConfigError when packed documents see each other in this model. Called by all ranks.

    Isolation rests on how transformers reads position ids, which some architectures ignore (state-space
    models, learned or relative positions). The loss would still fall and the model be useless, so one short
    document behind two different ones is compared before the first step: what it cannot see adds exactly nothing,
    in any precision.
    """
    first, other, document = np.arange(5, 17), np.arange(17, 5, -1), np.arange(20, 28)
    seen = slice(len(first), len(first) + len(document) - 1)
    behind_first = engine.forward(_batch([[plain(first), plain(document)]]))[0, seen]
    behind_other = engine.forward(_batch([[plain(other), plain(document)]]))[0, seen]
    difference = (behind_first - behind_other).abs().max()
    if float(difference) > _LEAK_TOLERANCE:
        raise ConfigError(
            f"lets packed documents see each other in this model (log-probabilities move by {float(difference):.2g})",
            path="data.packing",
            value=True,
            fix=_FIX,
        )


def refuse_other_losses(engine: Engine, job: Job, documents: Sequence[PackedSequence]) -> float:
    """The largest difference, in nats per token, between a document's loss packed as the job packs and by itself.

    Called by all ranks with the same documents. Raises ConfigError on all of them where it is no rounding: some
    architectures begin something anew in the middle of a document when others stand before it (chunks, convolutions).
    """
    rows_per_batch = 2 if job.train.micro_batch_size > 1 else 1
    documents = _enough(documents)
    room = max(2, job.data.max_length * rows_per_batch // len(documents))
    documents = [document if document.media else _shortened(document, room) for document in documents]
    packed = [list(documents[start::rows_per_batch]) for start in range(rows_per_batch)]
    alone = [[document] for document in documents]
    losses_alone = _losses(engine, alone, documents)
    losses_packed = _losses(engine, packed, documents)
    differences = np.abs(losses_packed - losses_alone)
    bounds = _TOLERANCE[job.model.dtype] * np.maximum(1.0, losses_alone)
    if _on_any(engine, differences > bounds):
        bounds = bounds + _ROUNDING * np.abs(_losses(engine, alone[::-1], documents, multiple_of=64) - losses_alone)
    worst = int(np.argmax(differences - bounds))
    if _on_any(engine, ~(differences <= bounds)):
        raise ConfigError(
            f"gives rows other losses than they have alone in this model: {losses_packed[worst]:.6f} where it is "
            f"{losses_alone[worst]:.6f}, more than {bounds[worst]:.1g} apart",
            path="data.packing",
            value=True,
            fix=_FIX,
        )
    return float(differences.max())


def _on_any(engine: Engine, wrong: np.ndarray) -> bool:
    """Whether anything is wrong on any data rank, so that all take the same way."""
    return engine.sum_over_data([float(wrong.any())])[0] > 0


def _losses(
    engine: Engine,
    sequences: Sequence[Sequence[PackedSequence]],
    documents: Sequence[PackedSequence],
    multiple_of: int = 8,
) -> np.ndarray:
    """The mean loss of each of `documents` where it stands in the batch of these sequences, float64."""
    logprobs_BT = engine.forward(_batch(sequences, multiple_of)).double().cpu()
    found: dict[int, float] = {}
    for row, sequence in enumerate(sequences):
        start = 0
        for document in sequence:
            found[id(document)] = -float(logprobs_BT[row, start : start + len(document.input_ids) - 1].mean())
            start += len(document.input_ids)
    return np.array([found[id(document)] for document in documents])


def _batch(sequences: Sequence[Sequence[PackedSequence]], multiple_of: int = 8) -> PackedBatch:
    """The documents of each sequence end to end, as training collates them."""
    return collate([joined(documents) for documents in sequences], 0, multiple_of)


def plain(ids: np.ndarray) -> PackedSequence:
    """A document of text in which every token counts one."""
    return PackedSequence(ids, np.ones(len(ids), np.float32), [len(ids)])


def _shortened(document: PackedSequence, length: int) -> PackedSequence:
    rope_AT = None if document.rope_AT is None else document.rope_AT[:, :length]
    return replace(plain(document.input_ids[:length]), rope_AT=rope_AT)


def _enough(documents: Sequence[PackedSequence]) -> list[PackedSequence]:
    """Enough documents; where the job's rows give fewer, made-up ones of tokens that every vocabulary has."""
    made_up = [plain(np.arange(5 + number, 25 + number)) for number in range(_NUM_DOCUMENTS - len(documents))]
    return [*documents, *made_up]


def _read(order: WorkOrder) -> _Rows | RaySwiftError:
    """The first rows, or why they cannot be read, for all ranks to raise: alone, this one would leave them waiting."""
    try:
        return _first_rows(order)
    except RaySwiftError as error:
        return error
    except Exception as error:
        return DataError(
            f"the first rows cannot be read ({type(error).__name__}: {error}); repair the data, or set "
            "train.self_check=false"
        )


def _first_rows(order: WorkOrder) -> _Rows:
    """The first usable rows of the job. Prompts are compared of those without media."""
    from rayswift.models.loading import load_tokenizer

    stream = order.train_stream
    settings = stream.settings
    media = media_encoder(order.job.model.path, settings)
    tokenizer = load_tokenizer(order.job.model.path)
    rows = list(islice(_samples(stream, media), _NUM_ROWS))
    encoded = encode(
        [sample for sample, _ in rows], tokenizer, max_length=settings.max_length, rendering=settings.rendering,
        truncation=settings.truncation, loss=settings.loss, media=media, encoded=[one for _, one in rows],
    )  # fmt: skip
    found = (_document(one[0], settings.max_length) for one in encoded if isinstance(one, list))
    documents = tuple(islice((document for document in found if document is not None), _NUM_DOCUMENTS))
    num_prompts = 0
    for sample in [sample for sample, _ in rows if settings.rendering == "chat" and not sample.media]:
        compared = compare_prompts(sample, tokenizer, settings.loss)
        if isinstance(compared, str):
            return _Rows(documents, num_prompts, compared)
        num_prompts += compared
    return _Rows(documents, num_prompts)


def _document(example: Example, max_length: int) -> PackedSequence | None:
    """The beginning of a row, or the whole of one with media; None for one that is too short or too long."""
    ids = np.array(example.input_ids)
    if len(ids) < 2 or (example.media and len(ids) > max_length // _NUM_DOCUMENTS):
        return None
    whole = replace(plain(ids), media=example.media, rope_AT=example.rope_AT)
    return whole if example.media else _shortened(whole, _DOCUMENT_TOKENS)


def _samples(stream: StreamPlan, media: MediaEncoder | None) -> Iterator[tuple[Sample, tuple[Encoded, ...]]]:
    """The rows that can be read, a few of each file's first ones, with their media encoded."""
    for file in stream.files:
        rows = (raw for span in file.spans for raw in read_rows(file, span))
        for _, _, row in islice(rows, _LOOKED_AT):
            if isinstance(row, BadRow):
                continue
            try:
                sample = normalise(row, stream.formats[file.source], stream.sources[file.source])
                yield sample, media.encode(sample, file.path) if media is not None else ()
            except RowError:
                continue  # the run itself puts it into quarantine


def compare_prompts(sample: Sample, tokenizer: PreTrainedTokenizerBase, rule: LossRule) -> int | str:
    """How many answers of a row are trained behind the very ids that the server sends; what differs where some are not.

    0 for a row that is not trained on: the run itself says why.
    """
    from rayswift.serving.prompts import PromptBuilder

    rule = LossRule(rule.turns)  # what parts of answers count changes no prompt
    (examples,) = encode([sample], tokenizer, max_length=1 << 30, rendering="chat", loss=rule)
    if isinstance(examples, RowError) or sample.text is not None:
        return 0
    served = [PromptBuilder(tokenizer).turns(chat, sample.tools) for chat in prompts_before_answers(sample, rule)]
    for prompt in served:
        if not any(_is_trained_behind(example, prompt) for example in examples):
            return _difference(examples, prompt, tokenizer)
    return len(served)


def _is_trained_behind(example: Example, prompt: Sequence[int]) -> bool:
    length = len(prompt)
    return example.input_ids[:length] == prompt and any(example.loss_mask[length : length + 1])


def _difference(examples: Sequence[Example], prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the text that agrees longest with a prompt leaves it."""

    def agreed(example: Example) -> int:
        pairs = enumerate(zip(example.input_ids, prompt, strict=False))
        ends = min(len(example.input_ids), len(prompt))
        return next((place for place, (one, other) in pairs if one != other), ends)

    example = max(examples, key=agreed)
    place = agreed(example)
    trained, served = (str(tokenizer.decode(list(ids[place : place + 8]))) for ids in (example.input_ids, prompt))
    return f"from token {place + 1} on it is {trained!r} in training and {served!r} in serving"
