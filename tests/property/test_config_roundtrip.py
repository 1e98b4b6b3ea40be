"""Any job survives being written as YAML and read back, and so does any text inside it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from rayswift.config import yamlfile
from rayswift.config.job import Job
from rayswift.config.load import dump_job, validate

_TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(_PLAIN)
def test_any_plain_data_survives_yaml(data: Any) -> None:
    again, _ = yamlfile.parse(yamlfile.dump(data), "x")
    assert again == data
    assert type(again) is type(data)


@settings(max_examples=50)
@given(
    path=_TEXT,
    columns=st.dictionaries(_TEXT, _TEXT, max_size=3),
    lr=st.floats(min_value=1e-12, max_value=10, exclude_min=True),
    system=st.none() | _TEXT,
)
def test_any_job_survives_yaml(path: str, columns: dict[str, str], lr: float, system: str | None) -> None:
    source = {"path": path, "columns": columns, "system": system}
    job = validate({"name": "x", "model": {"path": path}, "data": {"train": [source]}, "train": {"lr": lr}})
    plain, _ = yamlfile.parse(dump_job(job), "x")
    assert Job.model_validate(plain) == job
    assert Job.model_validate(plain).job_hash() == job.job_hash()
