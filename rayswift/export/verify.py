"""Proves that a written folder is the model that was trained: log-probabilities, token ids, features and chats agree.

The reference is probed in memory before anything is written or rounded; the folder is then read back as a stranger
would. Both compute in float32 on the CPU, so that what differs is what was written, not how it is computed.

Shape legend: T positions of a prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.data.media.encoder import MediaEncoder
from rayswift.data.media.features import model_inputs
from rayswift.data.templates import chat_text
from rayswift.data.types import Example
from rayswift.errors import ExportError
from rayswift.export import served
from rayswift.export.greedy import agreement, greedy_of, regret
from rayswift.export.judge import Said, demands, judged, said_of
from rayswift.export.measured import Difference, VerifyResult
from rayswift.export.rows import Rows
from rayswift.export.served import Prover, Questions, prove
from rayswift.export.shown import encoder_of, same_shown, shown
from rayswift.export.terms import Bounds
from rayswift.models.adapters import load_base
from rayswift.models.config_sizes import num_positions
from rayswift.models.folder import packing_of
from rayswift.models.loading import load_tokenizer, local_folder
from rayswift.models.quantized import decompress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "What does str.upper do?",
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Grüße aus Zürich: 東京, привет, 🙂\t\n\n  end",
)
CONVERSATION = ({"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": "A model. 42!"})
_MAX_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Probe:
    """What a model, its tokenizer and its processor say: ids and float32 `logprobs_TV` per prompt, and rendered chats.

    `logprobs` are those of the text prompts, then those of `media`, prompts with a medium of each kind.
    """

    prompts: tuple[str, ...]
    ids: tuple[list[int], ...]
    logprobs: tuple[torch.Tensor, ...]
    chats: tuple[str | None, ...]
    media: dict[str, Example]
    held_out: Rows | None = None
    """Rows to be judged by."""
    said: Said | None = None
    """What the model makes of `held_out`."""
    greedy: tuple[list[int], ...] = ()
    """The greedy answers to the prompts, those with media last, where they were asked for."""

    @property
    def asked(self) -> tuple[list[int] | Example, ...]:
        """All prompts."""
        return (*self.ids, *self.media.values())


def probe(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    encoder: MediaEncoder | None = None,
    held_out: Rows | None = None,
    *,
    greedy: bool = False,
) -> Probe:
    """What `model` and `tokenizer` say to the prompts and, where there is a template, to a rendered conversation.

    With an `encoder` also to prompts with an image or a sound; with `held_out` rows also their loss; with `greedy` also
    greedy answers.
    """
    chats, media = render_chats(tokenizer), shown(encoder)
    texts = (*prompts, *(chat for chat in chats[:1] if chat))
    ids = tuple(encode(tokenizer, text) for text in texts)
    found = Probe(texts, ids, logprobs_of(model, (*ids, *media.values())), chats, media)
    if greedy:
        found = replace(found, greedy=greedy_of(model, found.asked))
    return found if held_out is None else replace(found, held_out=held_out, said=said_of(model, held_out.examples))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a prompt, as long as it is."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_chats(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, ...]:
    """A conversation rendered as trained, as asked, and with a system message; None where the template refuses."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return (None, None, None)
    system = ({"role": "system", "content": "Be brief."}, *CONVERSATION)
    rendered: list[str | None] = []
    for messages, ask in ((CONVERSATION, False), (CONVERSATION[:1], True), (system, False)):
        try:
            rendered.append(chat_text(tokenizer, messages, generation_prompt=ask))
        except TemplateError:  # some templates have no system turn: then both sides must refuse
            rendered.append(None)
    return tuple(rendered)


def logprobs_of(model: torch.nn.Module, prompts: Sequence[list[int] | Example]) -> tuple[torch.Tensor, ...]:
    """Float32 `logprobs_TV` on the CPU for each prompt. ExportError for ids the model lacks.

    Prompts of ids are cut to what the model takes; those with media are given whole.
    """
    import torch

    config: Any = model.config
    text_config = config.get_text_config()
    limit = min(_MAX_PROMPT_TOKENS, getattr(text_config, "max_position_embeddings", None) or _MAX_PROMPT_TOKENS)
    was_training = model.training
    model.eval()
    found = []
    for prompt in prompts:
        example = prompt if isinstance(prompt, Example) else Example(prompt[:limit], [0] * len(prompt[:limit]))
        _check_ids(prompt.input_ids if isinstance(prompt, Example) else prompt, text_config.vocab_size)
        with torch.no_grad():
            logits_TV = model(**model_inputs(example), use_cache=False).logits[0]
        found.append(torch.log_softmax(logits_TV.float(), dim=-1).cpu())
    model.train(was_training)
    return tuple(found)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        raise ExportError(
            f"is not a token of the model, which has {vocab_size}",
            path="tokenizer",
            value=max(ids),
            fix="use the tokenizer the model was trained with",
        )


def difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], bounds: Bounds) -> Difference:
    """The differences over all positions and tokens. A value that is not a number counts as infinitely far."""
    import torch

    gaps = torch.cat([(a - b).abs().flatten() for a, b in zip(one, other, strict=True)])
    gaps = gaps.nan_to_num(nan=float("inf"))
    return Difference(
        max_abs=float(gaps.max()),
        mean_abs=float(gaps.mean(dtype=torch.float64)),
        bound_max_abs=bounds.max_abs,
        bound_mean_abs=bounds.mean_abs,
    )


def load_in_float32(path: str) -> PreTrainedModel:
    """The model of a folder or hub id, all of it in float32."""
    import torch

    model: PreTrainedModel = load_base(path, dtype="float32")
    if packing_of(local_folder(path)) is not None:
        torch.nn.Module.float(model)  # transformers leaves beside packed layers, or of unpacked ones, some as they were
        decompress(model)
    return model


def _is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def compare(reference: Probe, folder: str | Path, bounds: Bounds, by: Prover | None = None) -> VerifyResult:
    """What a folder, read back from disk, has in common with the reference. Raises ExportError when it differs.

    `by` is the serving engine that has to say the same; the reference then needs greedy answers.
    """
    tokenizer = load_tokenizer(str(folder))
    model = load_in_float32(str(folder))
    ids = tuple(encode(tokenizer, text) for text in reference.prompts)
    encoder = encoder_of(folder) if reference.media else None
    logprobs = logprobs_of(model, reference.asked)
    questions = _questions(reference, tokenizer, model)

    def regret_of(answers: Sequence[list[int]]) -> float:
        return regret(model, reference.asked[: len(answers)], answers)

    said, why_not = (None, None) if by is None else prove(by, folder, questions, logprobs, reference.greedy, regret_of)
    agree = [bool(a == b) for x, y in zip(logprobs, reference.logprobs, strict=True)
            for a, b in zip(x.argmax(-1), y.argmax(-1), strict=True)]  # fmt: skip
    result = VerifyResult(
        num_prompts=len(logprobs),
        media=tuple(reference.media),
        num_positions=len(agree),
        logprobs=difference(logprobs, reference.logprobs, bounds),
        top1_agreement=sum(agree) / len(agree),
        greedy_agreement=agreement(reference.greedy, greedy_of(model, reference.asked)) if reference.greedy else None,
        held_out=judged(reference.said, reference.held_out, model, bounds)
        if reference.said and reference.held_out
        else None,
        served=said,
        not_served=why_not,
        tokenizer_equal=ids == reference.ids,
        chat_template_equal=render_chats(tokenizer) == reference.chats,
        processor_equal=same_shown(shown(encoder), reference.media),
    )
    _demand(result, is_quantized=_is_quantized(model))
    return result


def _questions(reference: Probe, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Questions:
    """What a server is asked, where there is a chat template also a conversation with the ids it has in training."""
    rendered = reference.chats[1]
    chat = None if rendered is None else (CONVERSATION[:1], encode(tokenizer, rendered))
    return Questions(reference.ids, chat, reference.media, num_positions(model.config.to_dict()))


def _demand(result: VerifyResult, *, is_quantized: bool) -> None:
    """Raises ExportError unless everything was proved."""
    found, held_out = result.logprobs, result.held_out
    bound = "none" if found.bound_max_abs is None else f"{found.bound_max_abs:.3g}"
    failed = [
        text
        for text, good in (
            ("the tokenizer gives other ids than the trained one", result.tokenizer_equal),
            ("the chat template renders another text than the trained one", result.chat_template_equal),
            ("the processor makes other features or placeholders than the trained one", result.processor_equal),
            (
                f"log-probabilities differ by up to {found.max_abs:.3g} (bound {bound}) and "
                f"{found.mean_abs:.3g} on average (bound {found.bound_mean_abs:.3g})",
                found.within,
            ),
            *demands(held_out),
            *served.demands(result.served),
        )
        if not good
    ]
    if failed:
        fix = (
            "use more bits or a smaller group, calibrate on more rows, or set wider bounds"
            if is_quantized
            else ("export with another dtype, or report this")
        )
        raise ExportError(f"did not verify: {'; '.join(failed)}", path="export", fix=fix)
