"""How a pipeline is cut: which blocks a stage has, and which stages a rank has. Pure arithmetic."""

from __future__ import annotations

STAGES_PER_RANK = {"1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2, "zbv": 2}


def stage_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """The blocks of each stage, in order and all of them, no two stages more than one apart.

    Stages in the middle get what does not divide: the first one has the embedding, too, and the last one the head.
    """
    assert num_layers >= num_stages >= 1, f"{num_layers} blocks for {num_stages} stages"
    sizes = [num_layers // num_stages] * num_stages
    middle_first = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0, stage))
    for stage in middle_first[: num_layers % num_stages]:
        sizes[stage] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
    return tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))


def num_stages(schedule: str, pp: int) -> int:
    """Stages of the whole pipeline."""
    return pp * STAGES_PER_RANK[schedule]


def stage_owner(schedule: str, pp: int, stage: int) -> int:
    """The pipeline rank that has a stage: dealt out in turn, or there and back again in a V."""
    return 2 * pp - 1 - stage if schedule == "zbv" and stage >= pp else stage % pp


def stages_of(schedule: str, pp: int, rank: int) -> tuple[int, ...]:
    """The stages of a pipeline rank, in order."""
    stages = range(num_stages(schedule, pp))
    return tuple(stage for stage in stages if stage_owner(schedule, pp, stage) == rank)
