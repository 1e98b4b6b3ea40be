"""Real text that every Python has: the language reference of `pydoc`, and the docstrings of the standard library.

Deterministic for one version of Python. Knows nothing of models.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_FACTS = 300
NUM_HELD_OUT = 64
NUM_REPHRASED = 64
MAX_ANSWER_WORDS = 12

_TYPES = (str, list, dict, set, bytes, int, float, tuple, frozenset, complex)
_MODULES = (
    "builtins", "math", "os.path", "itertools", "functools", "statistics", "operator", "string", "textwrap", "json",
    "re", "time", "heapq", "bisect", "random", "shutil", "os", "glob", "inspect", "fnmatch", "difflib", "base64",
    "calendar", "tempfile", "cmath", "socket", "threading", "zlib", "gzip", "locale", "platform",
)  # fmt: skip
_SIGNATURE = re.compile(r"^[\w.]+\([^)]*\)\s*(?:->\s*[\w.\[\], ]+?\s*(?:--|:|$))?(?:--)?\s*")
_RULE_LINE = re.compile(r"^\s*[^\w\s]{3,}\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Fact:
    """A name of the standard library and the first sentence of its docstring."""

    name: str
    answer: str

    @property
    def question(self) -> str:
        """The question every fact is trained with."""
        return f"What does {self.name} do?"

    @property
    def rephrased(self) -> str:
        """The same question in other words: trained for some facts, held out for others."""
        return f"Explain {self.name} to me."


@dataclass(frozen=True)
class Corpus:
    """The files of the quickstart: text to pretrain on, and question/answer rows to train on and to hold out."""

    text: Path
    train: Path
    held_out: Path
    facts: tuple[Fact, ...]
    num_documents: int
    num_train_rows: int
    num_held_out_rows: int


def write_corpus(folder: Path) -> Corpus:
    """The corpus, written below `folder` as JSON lines.

    Every fact is trained as `What does X do?`. A rephrased question is trained for 64 facts and held out for 64
    others: what the held-out rows ask was seen in training, but never in these words for this name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents, known = list(topic_documents()), facts()
    order = random.Random(0).sample(known, len(known))
    held_out, rephrased = order[:NUM_HELD_OUT], order[NUM_HELD_OUT : NUM_HELD_OUT + NUM_REPHRASED]
    train = [_row(fact.question, fact) for fact in known] + [_row(fact.rephrased, fact) for fact in rephrased]
    corpus = Corpus(
        text=folder / "topics.jsonl",
        train=folder / "questions.jsonl",
        held_out=folder / "held_out.jsonl",
        facts=tuple(known),
        num_documents=len(documents),
        num_train_rows=len(train),
        num_held_out_rows=len(held_out),
    )
    _write(corpus.text, ({"text": text} for text in documents))
    _write(corpus.train, train)
    _write(corpus.held_out, [_row(fact.rephrased, fact) for fact in held_out])
    return corpus


def topic_documents() -> Iterator[str]:
    """The texts of `pydoc_data.topics`, a document per topic, without rules of punctuation and broken lines."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = _RULE_LINE.sub("", topics[name]).replace('"', "").replace("**", "").replace("`", "")
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
        yield "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def facts(limit: int = NUM_FACTS) -> list[Fact]:
    """The first `limit` names with a short sentence of their own, in a fixed order. Answers are distinct."""
    found: dict[str, Fact] = {}
    for name, thing in _documented():
        answer = first_sentence(inspect.getdoc(thing) or "")
        if answer is not None and answer not in found and len(found) < limit:
            found[answer] = Fact(name, answer)
    return list(found.values())


def first_sentence(docstring: str) -> str | None:
    """The first sentence that is no signature, None when it is missing, long, or not plain ASCII."""
    for paragraph in docstring.split("\n\n"):
        text = _SIGNATURE.sub("", " ".join(paragraph.split()))
        if not text:
            continue
        sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)[0]
        plain = sentence.isascii() and sentence.endswith(".") and 3 <= len(sentence.split()) <= MAX_ANSWER_WORDS
        return sentence if plain else None
    return None


def _documented() -> Iterator[tuple[str, Any]]:
    """Methods of built-in types, then functions and classes of modules, by name."""
    for owner in _TYPES:
        yield from ((f"{owner.__name__}.{n}", getattr(owner, n)) for n in sorted(vars(owner)) if n[0] != "_")
    for name in _MODULES:
        module = importlib.import_module(name)
        prefix = "" if name == "builtins" else f"{name}."
        for n in sorted(getattr(module, "__all__", vars(module))):
            thing = getattr(module, n, None)
            if n[0] != "_" and callable(thing) and not _is_exception(thing):
                yield prefix + n, thing


def _is_exception(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, BaseException)


def _row(question: str, fact: Fact) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": fact.answer}]}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
