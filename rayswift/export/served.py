"""Proves that the serving engine gives the answers of a written folder: it loads it and is asked what we asked.

vLLM runs in a process of the serving environment, `local` in this one. Knows what is compared, and which engine `auto`
is; how they are asked is known by `serving/vllm/probe.py` and `serving/local/probe.py`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift import plugins
from rayswift.data.types import Example
from rayswift.errors import ConfigError, ExportError
from rayswift.export.greedy import GREEDY_TOKENS, agreement, prompt_room
from rayswift.export.measured import Served
from rayswift.models.processor import has_processor
from rayswift.serving.environment import has_gpu, interpreter_of, is_for_cpus, lacks_for_images
from rayswift.serving.vllm import cpu, media
from rayswift.serving.vllm.room import is_lack

if TYPE_CHECKING:
    import torch

    from rayswift.data.media.encoder import MediaEncoder

ENGINE_BOUNDS = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""Mean difference of log-probabilities between it and transformers in float32, from the same files, per dtype of what
is computed in. Quantizers that round activations too have a bound of their own."""
_ERROR = re.compile(
    r"^(\((?:EngineCore|Worker)[^)]*\) ERROR .*\] )?(?:[a-z_.]*\.)?(\w*(?:Error|Exception): .+)$", re.MULTILINE
)
_TIMEOUT_S = 900
_OTHERWISE = "use another quantizer or dtype, or --engine none"


@dataclass(frozen=True)
class Prover:
    """A serving engine to prove in: its name, the interpreter of its environment, and its bound."""

    engine: str
    python: str
    bound: float
    """Most by which its log-probabilities may be off transformers' on average."""
    is_asked: bool = True
    """By name: then it has to serve the model. Else it is what `auto` would serve with, where it does and has room."""


@dataclass(frozen=True)
class Questions:
    """What a serving engine is asked beside transformers: prompts of ids, and prompts with a medium of each kind.

    `chat` is a conversation with the ids that training has for it.
    """

    prompts: Sequence[list[int]]
    chat: tuple[Sequence[dict[str, Any]], list[int]] | None = None
    media: Mapping[str, Example] = field(default_factory=dict)
    positions: int | None = None
    """The longest sequence the model can take at all; None where there is no end."""

    @property
    def ids(self) -> list[list[int]]:
        """The ids of each prompt, those of media last. Texts are cut as `greedy_of` cuts them."""
        return [
            *(ids[: prompt_room(self.positions)] for ids in self.prompts),
            *(one.input_ids for one in self.media.values()),
        ]


def prover(
    asked: str, folder: str | Path, bound: float, *, is_packed: bool = False, encoder: MediaEncoder | None = None
) -> tuple[Prover | None, str | None]:
    """The prover asked for, and for a person why it is not vLLM; None for `none`.

    `auto` is the engine that `auto` of an endpoint chooses on this machine: vLLM where it is there and runs such a
    model, else `local`. `is_packed` says that the export will have packed integer weights; `encoder` is that of a model
    of more than text.

    Raises ConfigError for an engine asked for by name that cannot run here.
    """
    check_engine(asked)
    if asked == "none":
        return None, None
    if asked == "local":
        return Prover("local", sys.executable, bound), None
    found = interpreter_of("vllm", None)
    reason = found.problem or _unseen(str(folder), found.path, encoder)
    if reason is None and not has_gpu() and not is_for_cpus(found.version):
        reason = f"there is no GPU here, and vllm {found.version} is a build for them"
    if not has_gpu() or is_for_cpus(found.version):
        reason = reason or cpu.lacks_heads(folder) or (cpu.lacks_packed() if is_packed else None)
    if reason is None:
        return Prover("vllm", found.path, bound, is_asked=asked != "auto"), None
    if asked != "auto":
        raise ConfigError(f"cannot prove this export: {reason}", path="--engine", value=asked, fix="use auto or local")
    return Prover("local", sys.executable, bound, is_asked=False), f"proved in engine local, not in vLLM: {reason}"


def check_engine(asked: str) -> None:
    """Raises ConfigError for an engine that nobody can ask for."""
    if asked not in ("auto", "vllm", "local", "none"):
        raise ConfigError("is none of auto, vllm, local and none", path="--engine", value=asked, fix="use auto")


def _unseen(folder: str, python: str, encoder: MediaEncoder | None) -> str | None:
    """Why vLLM of this interpreter's environment could not be shown images by this model; None for a model of text."""
    if not has_processor(folder):
        return None
    if encoder is None:
        return "its processor cannot be loaded"
    return media.refusal(folder) or lacks_for_images(python)


def prove(
    by: Prover,
    folder: str | Path,
    asked: Questions,
    logprobs: Sequence[torch.Tensor],
    greedy: Sequence[list[int]],
    regret_of: Callable[[Sequence[list[int]]], float],
) -> tuple[Served | None, str | None]:
    """What the engine says when it is `asked`, beside the `logprobs_TV` that transformers gives from the same folder.

    `greedy` are the answers of the unquantized model; `regret_of` is `greedy.regret` of that folder in transformers,
    for the answers to the first prompts. Raises ExportError when the engine cannot load the folder; of one that nobody
    asked for by name, and that does not serve such models or has no memory free for it here, the reason is returned.
    """
    import torch

    try:
        said = _ask(by, folder, asked)
    except ConfigError as error:
        if by.is_asked:
            raise ExportError(f"{by.engine} cannot serve it: {error}", path="export", fix=_OTHERWISE) from error
        print(f"note: not proved in a serving engine: {error}", file=sys.stderr)
        return None, str(error)
    same = said["shown"] == {kind: one.input_ids for kind, one in asked.media.items()}
    count = len(asked.ids) if same else len(asked.prompts)  # other prompts have nothing to be compared with
    pairs = zip(said["logprobs"][:count], logprobs[:count], asked.ids[:count], strict=True)
    gaps = torch.cat([(torch.tensor(theirs) - _chosen(ours, ids)).abs() for theirs, ours, ids in pairs if len(ids) > 1])
    gaps = gaps.nan_to_num(nan=float("inf"))
    found = Served(
        engine=by.engine,
        version=said["version"],
        num_positions=len(gaps),
        mean_abs=float(gaps.mean()),
        max_abs=float(gaps.max()),
        bound_mean_abs=by.bound,
        greedy_agreement=agreement(greedy[:count], said["greedy"][:count]),
        greedy_regret=regret_of(said["greedy"][:count]),
        template_equal=asked.chat is None or said["chat"] == asked.chat[1],
        media_equal=same,
        load_s=said["load_s"],
        first_token_s=said["first_token_s"],
        tokens_per_second=said["tokens_per_second"],
        dtype=said.get("dtype"),
        device=said.get("device"),
    )
    return found, None


def demands(served: Served | None) -> tuple[tuple[str, bool], ...]:
    """What is demanded of the serving engine."""
    if served is None:
        return ()
    regret, most = served.greedy_regret or 0.0, 2 * served.bound_mean_abs  # two logits that are off choose a token
    return (
        (
            f"{served.engine}'s greedy tokens are less likely than transformers' likeliest, by {regret:.3g} on average "
            f"of log-probabilities (bound {most:g})",
            regret <= most,
        ),
        (
            f"{served.engine}'s log-probabilities differ by {served.mean_abs:.3g} on average from transformers' "
            f"(bound {served.bound_mean_abs:g})",
            served.mean_abs <= served.bound_mean_abs,
        ),
        (f"{served.engine}'s server makes other token ids of a chat than training", served.template_equal),
        (f"{served.engine}'s server makes other token ids of a prompt with media than training", served.media_equal),
    )


def _chosen(logprobs_TV: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    import torch

    return logprobs_TV[: len(ids) - 1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def _ask(by: Prover, folder: str | Path, asked: Questions) -> Any:
    longest = max(map(len, asked.ids)) + GREEDY_TOKENS + 64
    questions = {
        "prompts": asked.ids[: len(asked.prompts)], "chat": list(asked.chat[0]) if asked.chat else None,
        "max_new_tokens": GREEDY_TOKENS, "max_model_len": min(longest, asked.positions or longest),
    }  # fmt: skip
    if by.engine == "local":
        from rayswift.serving.local import probe

        return probe.answers_of(str(folder), questions)
    with tempfile.TemporaryDirectory(prefix="rayswift-probe-") as place:
        out = Path(place) / "answers.json"
        try:
            done = subprocess.run(
                [by.python, "-m", "rayswift.serving.vllm.probe", str(folder), str(out)],
                input=json.dumps(questions), capture_output=True, text=True, timeout=_TIMEOUT_S, cwd=place,
                env=os.environ | _variables(by.engine),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"{by.engine} did not answer within {_TIMEOUT_S} s", path="export",
                              fix="see whether it serves, or export with --engine none") from error  # fmt: skip
        if done.returncode or not out.is_file():
            reason = _last_error(done.stderr)
            if is_lack(reason):
                raise ConfigError(reason, path="--engine", value=by.engine, fix="free memory, or use more GPUs")
            raise ExportError(f"{by.engine} cannot serve it: {reason}", path="export", fix=_OTHERWISE)
        return json.loads(out.read_text(encoding="utf-8"))


def _variables(engine: str) -> dict[str, str]:
    """The environment that replicas give the engine too."""
    made = plugins.load("serving.engines", engine)
    on_cpu = {} if has_gpu() else made.environment_on_cpu
    return {**made.environment, **on_cpu}


def _last_error(text: str) -> str:
    """What went wrong first: an error of vLLM's core, which tells its caller only to look there, or else of ours."""
    found = _ERROR.findall(text)
    core = [error for place, error in found if place and "see stack trace" not in error.lower()[:60]]
    reasons: list[str] = [*core[:1], *(error for place, error in found if not place), "no reason was given"]
    return reasons[0][:400]
