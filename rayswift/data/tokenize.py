"""From Samples to Examples: many texts per tokenizer call, the loss mask, and what becomes of rows that are too long.

The tokenizer is given; how text becomes ids is known by `segments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rayswift.data.formats import RowError
from rayswift.data.rendering import Rendered, Rendering, render
from rayswift.data.segments import SegmentIds, segment_ids
from rayswift.data.types import Example, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["right", "left", "delete", "split"]


def encode(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    rendering: Rendering,
    truncation: Truncation | None = None,
) -> list[list[Example] | RowError]:
    """The Examples of each Sample, at most `max_length` tokens long, or why it has none; in the order of `samples`.

    `truncation` None splits plain text and cuts conversations at the right. Raises ConfigError for a tokenizer
    that lacks a chat template and is asked for one.
    """
    rendered = [_render(sample, tokenizer, rendering) for sample in samples]
    ids = iter(segment_ids([text for one in rendered if not isinstance(one, RowError) for text in one], tokenizer))
    results: list[list[Example] | RowError] = []
    for sample, texts in zip(samples, rendered, strict=True):
        if isinstance(texts, RowError):
            results.append(texts)
            continue
        how = truncation or ("split" if sample.text is not None else "right")
        wholes = [_join(text, next(ids), tokenizer) for text in texts]
        try:
            results.append([piece for whole in wholes for piece in _fit(whole, max_length, how)])
        except RowError as error:
            results.append(error)
    return results


def _render(sample: Sample, tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> list[Rendered] | RowError:
    try:
        texts = render(sample, tokenizer, rendering)
        for text in texts:
            for segment in text.segments:
                segment.text.encode("utf-8")  # half a surrogate pair would fail the whole batch in the tokenizer
    except UnicodeEncodeError as error:
        return RowError(f"holds half a surrogate pair at character {error.start + 1}")
    except RowError as error:
        return error
    return texts


def _join(text: Rendered, ids: SegmentIds, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The segments as one Example, untruncated. The first token is never trained: nothing predicts it."""
    input_ids: list[int] = []
    mask: list[int] = []
    for segment, found in zip(text.segments, ids, strict=True):
        input_ids += found
        mask += [int(segment.trained)] * len(found)
    if text.add_special_tokens and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        mask.append(1)
    mask[:1] = [0] * len(mask[:1])
    return Example(input_ids, mask)


def _fit(whole: Example, max_length: int, how: Truncation) -> list[Example]:
    """The Example cut to `max_length`. Raises RowError when it is to be deleted, or nothing trained is left."""
    length = len(whole.input_ids)
    if length > max_length and how == "delete":
        raise RowError(f"has {length} tokens, over data.max_length={max_length}")
    pieces = [piece for piece in _pieces(whole, max_length, how) if any(piece.loss_mask)]
    if not pieces:
        cut = f": its {length} tokens are over data.max_length={max_length}" if length > max_length else ""
        raise RowError(f"has no token left to train on{cut}")
    return pieces


def _pieces(whole: Example, max_length: int, how: Truncation) -> Iterator[Example]:
    length = len(whole.input_ids)
    if length <= max_length:
        yield whole
        return
    starts = {"right": [0], "left": [length - max_length], "split": list(range(0, length, max_length))}[how]
    for start in starts:
        window = slice(start, start + max_length)
        yield Example(whole.input_ids[window], [0, *whole.loss_mask[window][1:]])
