"""Commands about the versions of a model that is served: promoted step by step, taken back, and listed."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from rayswift.cli.options import Json, print_result
from rayswift.errors import ConfigError

Exports = Annotated[str, typer.Argument(metavar="EXPORTS", help="Folder that the served exports lie in.")]
Home = Annotated[str | None, typer.Option("--exports", metavar="FOLDER", help="Folder of the served exports.")]
Model = Annotated[str | None, typer.Option(help="Which of the endpoint's models; needed where there are several.")]


def promote(
    export: Annotated[str, typer.Argument(help="The export that is to answer.")],
    model: Model = None,
    exports: Home = None,
    steps: Annotated[str, typer.Option(help="Its shares of the traffic, one after the other.")] = "0.05,0.25,0.5,1",
    step_seconds: Annotated[float, typer.Option(help="Shortest time of a step.")] = 60.0,
    min_requests: Annotated[int, typer.Option(help="Answers of its own that a step takes; 0: time is enough.")] = 20,
    max_wait: Annotated[float, typer.Option(help="Seconds to wait for those before it goes back.")] = 900.0,
    max_error_rate: Annotated[
        float, typer.Option(help="Most failed answers, where the live version fails no more.")
    ] = 0.01,
    max_latency_ratio: Annotated[float, typer.Option(help="Most p50 and p95, beside the live version's.")] = 1.5,
    max_token_wait: Annotated[float, typer.Option(help="Seconds without a token after which an answer failed.")] = 30.0,
    prompts: Annotated[str | None, typer.Option(help="Verification prompts: rows with the right answers.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Use the first so many.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to one, in tokens.")] = 128,
    max_answer_loss: Annotated[float, typer.Option(help="How many fewer may be right, as a fraction.")] = 0.02,
    min_agreement: Annotated[float, typer.Option(help="Least fraction answered as by the live version.")] = 0.0,
    min_token_agreement: Annotated[
        float, typer.Option(help="Least fraction of its answers' tokens chosen alike, without right answers.")
    ] = 0.1,
    min_similarity: Annotated[float, typer.Option(help="Least mean cosine to the live version's vectors.")] = 0.8,
    keep_old: Annotated[
        bool, typer.Option("--keep-old", help="Keep the old one running: `rollback` is instant.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Gives a new version of a served model the traffic, step by step; it goes back by itself when it is worse.

    The endpoint is one of `rayswift serve --promotable`, found by the folder that EXPORT lies in. The version starts
    beside the old one, answers the verification prompts, and is watched in every step: answers that fail or hang,
    latencies, the prompts again. Rolled back is exit code 5. Ctrl-C rolls back too; no request is lost either way.

    Example: rayswift serve promote exports/sft-v2 --steps 0.1,0.5,1 --prompts data/held_out.jsonl
    """
    from rayswift.serving import questions, registry, rollout
    from rayswift.serving.promotion import Policy

    policy = Policy(
        _shares(steps), step_seconds, min_requests, max_wait, max_error_rate, max_latency_ratio, max_answer_loss,
        min_agreement, max_token_wait, min_similarity, min_token_agreement,
    )  # fmt: skip
    with rollout.opened(exports or registry.home_of(export), model, _say) as running:
        kind = questions.kind_of(export, running.live_export)
        asked, place = (
            questions.of_export(export, num_prompts, max_new_tokens, kind) if prompts is None
            else (questions.of_rows(prompts, num_prompts, max_new_tokens, kind), prompts)
        )  # fmt: skip
        _say(f"{len(asked)} verification prompts: {place}")
        versions = running.promote(export, policy, asked, keep_old=keep_old)
    print_result(versions.model_dump(mode="json"), f"{export} is live as version {versions.live}", as_json)


def rollback(exports: Exports = "exports", model: Model = None, as_json: Json = False) -> None:
    """Gives the version before the live one all the traffic at once; it is started first if it has ended.

    Example: rayswift serve rollback exports
    """
    from rayswift.serving import rollout

    with rollout.opened(exports, model, _say) as running:
        versions = running.roll_back()
    print_result(versions.model_dump(mode="json"), f"version {versions.live} is live again", as_json)


def versions(exports: Exports = "exports", as_json: Json = False) -> None:
    """Lists the versions that were served from a folder: state, share of the traffic, and why.

    Example: rayswift serve versions exports
    """
    from rayswift.serving import boards, registry

    known, shares = registry.read(exports), boards.running_shares(exports)
    lines = [
        f"{name}  {one.id}  {_state(one.state, shares.get(name, {}).get(one.id)):<18}  {one.folder}"
        + (f"  ({one.reason})" if one.reason else "")
        for name, model in known.models.items()
        for one in model.versions
    ]
    plain: dict[str, Any] = {"registry": known.model_dump(mode="json"), "shares": shares}
    print_result(plain, "\n".join(lines) or f"{exports} has no version that was served with --promotable", as_json)


def _state(state: str, share: float | None) -> str:
    return state if share is None else f"{state} {share:.0%}"


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("is no list of numbers", path="--steps", value=text, fix="write 0.05,0.25,0.5,1") from None


def _say(text: str) -> None:
    print(f"-- {text}", file=sys.stderr, flush=True)
