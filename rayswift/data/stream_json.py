"""The plan of a stream as JSON: written into the run directory, so that an audit knows which rows should have come."""

from __future__ import annotations

from functools import cache

from pydantic import TypeAdapter

from rayswift.data.stream import StreamPlan


def stream_json(plan: StreamPlan) -> str:
    """The plan as one line of JSON: about 110 bytes for every 256 rows of the data files."""
    return _adapter().dump_json(plan).decode() + "\n"


def parse_stream(text: str) -> StreamPlan:
    """The plan that `stream_json` wrote. Raises ValueError for anything else."""
    return _adapter().validate_json(text)


@cache
def _adapter() -> TypeAdapter[StreamPlan]:
    return TypeAdapter(StreamPlan)
