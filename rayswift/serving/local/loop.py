"""The decode loop: one thread that owns the model and runs whatever answers there are, a token per step each.

A step admits waiting answers, moves one prompt a chunk further, and decodes one token of every running answer; so
answers join and leave between steps. Knows nothing of asyncio: what it generates goes to a callback.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from rayswift.errors import RaySwiftError, ServeError
from rayswift.serving.engine import Delta, FinishReason, Request, TokenLogprob
from rayswift.serving.local.batch import Batch, Prefill, SoloBatch, open_batch
from rayswift.serving.local.sampling import Sampler, likeliest
from rayswift.serving.local.text import Decode, TextStream

PREFILL_CHUNK_TOKENS = 512
"""How much of a prompt is read between two tokens of the running answers."""
_log = logging.getLogger("rayswift.serving")


class Ticket:
    """One answer on its way through the loop. Its thread calls `emit` with deltas; an error is the last call."""

    def __init__(self, request: Request, emit: Callable[[Delta | RaySwiftError], None], decode: Decode) -> None:
        self.request, self.emit = request, emit
        self.sampler = Sampler(request.sampling, request.prompt.ids)
        self.text = TextStream(decode, request.sampling.stop, request.prompt.ids)
        self.num_tokens, self.last_token = 0, -1
        self.aborted = False  # written by the asking side, read by the loop; a step late is early enough


@dataclass(frozen=True)
class Vocabulary:
    """What the loop must know of the tokenizer."""

    decode: Decode
    eos_ids: frozenset[int]
    special: Mapping[int, str] = field(default_factory=dict)
    """Names of the tokens that `decode` leaves out."""


class DecodeLoop:
    """Generates answers until closed. What fails ends the answers it belongs to, and the loop goes on without them.

    That is one answer where its prompt is read or its token chosen, and all running ones where they share a forward
    pass. `num_failures` counts failures since the last decode step, or whole answer, that went well.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary, max_concurrency: int, num_axes: int = 0) -> None:
        self._model, self._vocabulary, self._max_concurrency = model, vocabulary, max_concurrency
        self._num_axes = num_axes
        self._batch: Batch = open_batch(model, num_axes)
        self._waiting: deque[Ticket] = deque()
        self._prefilling: deque[tuple[Ticket, Prefill]] = deque()
        self._running: list[Ticket] = []
        self._wake = threading.Condition()
        self._closed = False
        self.num_failures = 0
        self._thread = threading.Thread(target=self._run, name="rayswift-decode", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request, emit: Callable[[Delta | RaySwiftError], None]) -> Ticket:
        """The ticket of an answer that will start when there is a place. Raises ServeError once closed."""
        ticket = Ticket(request, emit, self._vocabulary.decode)
        with self._wake:
            if not self.is_alive:
                raise ServeError("the engine has stopped")
            self._waiting.append(ticket)
            self._wake.notify()
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Drop an answer nobody waits for any more; nothing happens to one that has ended."""
        with self._wake:
            ticket.aborted = True
            self._wake.notify()

    @property
    def is_alive(self) -> bool:
        """Whether answers can be generated."""
        return self._thread.is_alive() and not self._closed

    def close(self, timeout_s: float = 10) -> None:
        """Stop after the current step; answers that were not finished get an error."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait_for_work():
                try:
                    self._step()
                except Exception as error:
                    # Whatever a model can raise, out of memory included, ends these answers and not the thread.
                    self.num_failures += 1
                    self._fail_running(_logged("a decode step failed", error))
        self._fail_running(ServeError("the engine was stopped"))
        with self._wake:
            unstarted = [*(ticket for ticket, _ in self._prefilling), *self._waiting]
            self._prefilling.clear()
            self._waiting.clear()
        for ticket in unstarted:
            ticket.emit(ServeError("the engine was stopped"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._prefilling or self._running)
            return not self._closed

    def _step(self) -> None:
        self._drop_aborted()
        self._admit()
        self._prefill_one()
        self._decode_all()

    def _drop_aborted(self) -> None:
        with self._wake:
            self._waiting = deque(ticket for ticket in self._waiting if not ticket.aborted)
        self._prefilling = deque(item for item in self._prefilling if not item[0].aborted)
        for row in reversed(range(len(self._running))):
            if self._running[row].aborted:
                self._leave(row)

    def _admit(self) -> None:
        # A recurrent model may not be able to continue a prompt in a second chunk, so it gets it whole.
        chunk_tokens = None if isinstance(self._batch, SoloBatch) else PREFILL_CHUNK_TOKENS
        with self._wake:
            while self._waiting and len(self._running) + len(self._prefilling) < self._max_concurrency:
                ticket = self._waiting.popleft()
                prefill = Prefill(self._model, ticket.request.prompt, chunk_tokens, self._num_axes)
                self._prefilling.append((ticket, prefill))

    def _prefill_one(self) -> None:
        if not self._prefilling:
            return
        ticket, prefill = self._prefilling.popleft()
        try:
            logits_V = prefill.advance()
            if logits_V is None:
                self._prefilling.appendleft((ticket, prefill))
            elif not self._advance(ticket, logits_V):
                self._batch.join(prefill.cache, prefill.shift)
                self._running.append(ticket)
        except Exception as error:  # its cache is its own, so nobody else is touched
            self.num_failures += 1
            ticket.emit(_logged("a prompt could not be read", error))

    def _decode_all(self) -> None:
        if not self._running:
            return
        logits_BV = self._batch.decode([ticket.last_token for ticket in self._running])
        self.num_failures = 0
        for row in reversed(range(len(self._running))):  # from the end, so that a leaving row moves no unseen one
            if self._advance(self._running[row], logits_BV[row]):
                self._leave(row)

    def _leave(self, row: int) -> None:
        self._batch.leave(row)
        self._running[row] = self._running[-1]
        self._running.pop()

    def _advance(self, ticket: Ticket, logits_V: torch.Tensor) -> bool:
        """Choose the next token of an answer and tell it; True when the answer has ended, well or not."""
        try:
            return self._chosen(ticket, logits_V)
        except RaySwiftError as error:
            ticket.emit(error)
        except Exception as error:  # this answer's alone: the others in the batch have logits of their own
            ticket.emit(_logged("a token could not be chosen", error))
        return True

    def _chosen(self, ticket: Ticket, logits_V: torch.Tensor) -> bool:
        token = ticket.sampler(logits_V)
        ticket.num_tokens, ticket.last_token = ticket.num_tokens + 1, token
        logprobs = self._logprobs(ticket, token, logits_V)  # before the text goes on: they are of this place
        text, reason = self._text_of(ticket, token)
        ticket.emit(Delta(text, 1, reason, logprobs))
        if reason is not None:
            self.num_failures = 0
        return reason is not None

    def _text_of(self, ticket: Ticket, token: int) -> tuple[str, FinishReason | None]:
        if token in self._vocabulary.eos_ids:
            return ticket.text.finish()[0], "stop"
        text, stopped = ticket.text.push(token)
        if stopped:
            return text, "stop"
        if ticket.num_tokens < ticket.request.sampling.max_new_tokens:
            return text, None
        rest, stopped = ticket.text.finish()
        return text + rest, "stop" if stopped else "length"

    def _logprobs(self, ticket: Ticket, token: int, logits_V: torch.Tensor) -> tuple[TokenLogprob, ...]:
        wanted = ticket.request.sampling.logprobs
        if wanted is None or token in self._vocabulary.eos_ids:
            return ()
        logprob, top = likeliest(logits_V, token, wanted)
        special = self._vocabulary.special
        texts = {i: special[i] if i in special else ticket.text.text_of(i) for i in {token, *(i for i, _ in top)}}
        likely = tuple((texts[i], value) for i, value in top)
        return (TokenLogprob(texts[token], logprob, likely, token, token in special),)

    def _fail_running(self, error: ServeError) -> None:
        """End what runs and begin with an empty batch: after a failed forward pass its cache cannot be trusted."""
        failed, self._running = self._running, []
        self._batch = open_batch(self._model, self._num_axes)
        for ticket in failed:
            ticket.emit(error)


def _logged(what: str, error: Exception) -> ServeError:
    """What the asking side gets for an error of ours, whose traceback stays here."""
    _log.error(what, exc_info=error)
    return ServeError("the engine failed while generating")
