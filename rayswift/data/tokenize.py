"""From Samples to Examples: many texts per tokenizer call, the loss mask, and what becomes of rows that are too long.

The tokenizer is given; how text becomes ids is known by `segments`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from rayswift.data.formats import RowError, one_row
from rayswift.data.loss_rule import LossRule
from rayswift.data.rendering import Rendered, Rendering, Segment, render
from rayswift.data.segments import Tokens, segment_tokens
from rayswift.data.types import Encoded, Example, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayswift.data.media.encoder import MediaEncoder

Truncation = Literal["right", "left", "delete", "split"]
_Tokenized = tuple[Rendered, list[Tokens]]
_DEFAULT = LossRule()


def encode(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    rendering: Rendering,
    truncation: Truncation | None = None,
    loss: LossRule = _DEFAULT,
    media: MediaEncoder | None = None,
    encoded: Sequence[tuple[Encoded, ...]] = (),
) -> list[list[Example] | RowError]:
    """The Examples of each Sample, at most `max_length` tokens long, or why it has none; in the order of `samples`.

    `truncation` None splits plain text and cuts conversations at the right. `encoded` are the media of each Sample,
    made by `media`. Raises ConfigError for a tokenizer that lacks a chat template and is asked for one.
    """
    rendered = [
        _render(sample, tokenizer, rendering, loss, media, encoded[i] if encoded else ())
        for i, sample in enumerate(samples)
    ]
    results: list[list[Example] | RowError] = []
    for sample, texts in zip(samples, _tokenized(rendered, tokenizer), strict=True):
        if isinstance(texts, RowError):
            results.append(texts)
            continue
        how = truncation or ("split" if sample.text is not None else "right")
        wholes = [_join(text, tokens, tokenizer, media) for text, tokens in texts]
        results.append(_fit_all(wholes, max_length, how, media))
    return results


def _render(
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    loss: LossRule,
    media: MediaEncoder | None,
    encoded: tuple[Encoded, ...],
) -> list[Rendered] | RowError:
    try:
        with one_row():
            texts = render(sample, tokenizer, rendering, loss)
            if media is not None and sample.media:
                texts = media.filled(texts, sample, encoded)
            for text in texts:
                _check_unicode(text.text)
    except RowError as error:
        return error
    return texts


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # would fail the whole batch in the tokenizer
        raise RowError(f"holds half a surrogate pair at character {error.start + 1}") from error


def _tokenized(
    rendered: Sequence[list[Rendered] | RowError], tokenizer: PreTrainedTokenizerBase
) -> list[list[_Tokenized] | RowError]:
    """The texts of each row with their ids, from one call to the tokenizer where it refuses no row."""
    try:
        texts = [text for one in rendered if not isinstance(one, RowError) for text in one]
        tokens = iter(segment_tokens(texts, tokenizer))
    except Exception:  # a batch does not say which row it was: each by itself does
        return [one if isinstance(one, RowError) else _tokenized_alone(one, tokenizer) for one in rendered]
    return [one if isinstance(one, RowError) else [(text, next(tokens)) for text in one] for one in rendered]


def _tokenized_alone(texts: list[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[_Tokenized] | RowError:
    try:
        with one_row():
            return list(zip(texts, segment_tokens(texts, tokenizer), strict=True))
    except RowError as error:
        return error


def _join(
    text: Rendered, tokens: list[Tokens], tokenizer: PreTrainedTokenizerBase, media: MediaEncoder | None
) -> Example:
    """The segments as one Example, untruncated. The first token is never trained: nothing predicts it."""
    input_ids: list[int] = []
    mask: list[float] = []
    for segment, found in zip(text.segments, tokens, strict=True):
        input_ids += found.ids
        mask += _weights(segment, found)
    if text.add_special_tokens and tokenizer.eos_token_id is not None and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        mask.append(1)
    mask[:1] = [0] * len(mask[:1])
    if text.media and media is not None:
        mask = media.unweighted(input_ids, mask)
    return Example(input_ids, mask, tuple(one.features for one in text.media))


def _weights(segment: Segment, tokens: Tokens) -> list[float]:
    """What each token counts: as its last character does, since it may begin with the white space before a word."""
    if segment.factors is None:
        return [segment.weight] * len(tokens.ids)
    return [float(segment.weight * segment.factors[max(end, 1) - 1]) for end in tokens.ends]


def _fit_all(
    wholes: Sequence[Example], max_length: int, how: Truncation, media: MediaEncoder | None
) -> list[Example] | RowError:
    """The pieces of all texts of a row. A row is bad only if none of its texts leaves any: a template that rewrites
    the past gives a text per turn, and a last turn that is too long is no reason to lose the first."""
    pieces: list[Example] = []
    faults: list[RowError] = []
    for whole in wholes:
        try:
            pieces += _fit(whole, max_length, how, media)
        except RowError as error:
            faults.append(error)
    return pieces or faults[0]


def _fit(whole: Example, max_length: int, how: Truncation, media: MediaEncoder | None) -> list[Example]:
    """The Example cut to `max_length`. Raises RowError when it is to be deleted, or nothing trained is left."""
    length = len(whole.input_ids)
    if length > max_length and how == "delete":
        raise RowError(f"has {length} tokens, over data.max_length={max_length}")
    pieces = [piece for piece in _pieces(whole, max_length, how, media) if any(piece.loss_mask)]
    if not pieces:
        cut = f": its {length} tokens are over data.max_length={max_length}" if length > max_length else ""
        raise RowError(f"has no token left to train on{cut}")
    return pieces if media is None else [media.positioned(piece) for piece in pieces]


def _pieces(whole: Example, max_length: int, how: Truncation, media: MediaEncoder | None) -> Iterator[Example]:
    length = len(whole.input_ids)
    if length <= max_length:
        yield whole
        return
    starts = {"right": [0], "left": [length - max_length], "split": list(range(0, length, max_length))}[how]
    for start in starts:
        window = slice(start, start + max_length)
        kept = media.kept(whole, window) if media is not None and whole.media else ()
        yield Example(whole.input_ids[window], [0, *whole.loss_mask[window][1:]], kept, cut=how != "split")
