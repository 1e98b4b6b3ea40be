"""The ground layer: errors that say what to do, numbers people read, and names that are modules."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayswift import errors, plugins
from rayswift.errors import ConfigError, RaySwiftError
from rayswift.units import format_bytes, format_count, format_seconds, parse_bytes

TREE = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, RaySwiftError)]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ConfigError("does not divide num_kv_heads=8", path="parallel.tp", value=6, fix="use 1, 2, 4 or 8"),
            "parallel.tp=6 does not divide num_kv_heads=8; use 1, 2, 4 or 8",
        ),
        (ConfigError("is missing", path="model.path"), "model.path is missing"),
        (ConfigError("is empty", path="name", value=None), "name=None is empty"),
        (ConfigError("no rows"), "no rows"),
    ],
)
def test_an_error_reads_path_value_rule_fix(error: ConfigError, text: str) -> None:
    assert str(error) == text


def test_a_long_value_is_cut() -> None:
    text = str(ConfigError("is wrong", path="x", value="y" * 1000))
    assert len(text) < 150
    assert text.endswith("… is wrong")


@pytest.mark.parametrize("kind", TREE)
def test_an_error_survives_pickling_between_processes(kind: type[RaySwiftError]) -> None:
    error = kind("is wrong", path="a", value=1, fix="b")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error) == "a=1 is wrong; b"


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {kind.__name__: kind.exit_code for kind in TREE} == {
        "RaySwiftError": 1, "ConfigError": 2, "PlanError": 3, "DataError": 4, "CheckpointError": 1, "WorkerError": 1,
        "ExportError": 5, "PromotionError": 5, "ServeError": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 * 2**20), ("80 GB", 80 * 10**9), ("1.5kib", 1536), ("7", 7), (7, 7), (" 2 TB ", 2 * 10**12)],
)
def test_sizes_people_write(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "12 parsecs", "-1GB", "1e3", "1,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@given(st.integers(0, 2**60))
def test_formatted_bytes_parse_back_to_nearly_the_same(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (format_bytes, 0, "0 B"), (format_bytes, 1536, "1.5 KiB"), (format_bytes, 3 * 2**40, "3.0 TiB"),
        (format_count, 999, "999"), (format_count, 1_234_567, "1.23M"), (format_count, 8.19e9, "8.19B"),
        (format_count, 2e15, "2000.00T"), (format_seconds, 4.21, "4.2s"), (format_seconds, 61, "1:01"),
        (format_seconds, 3723, "1:02:03"), (format_seconds, 3599.9, "1:00:00"),
    ],
)  # fmt: skip
def test_numbers_people_read(function: object, value: float, text: str) -> None:
    assert function(value) == text  # type: ignore[operator]


def test_a_name_is_a_module_and_its_class() -> None:
    assert {"pretrain", "sft"} <= set(plugins.names("methods"))
    assert plugins.load("methods", "sft").__module__ == "rayswift.methods.sft"
    assert plugins.load("data.formats", "query_response").__name__ == "QueryResponse"


@pytest.mark.parametrize(
    ("name", "hint"), [("sfft", r"did you mean sft\?"), ("zzz", "use one of .*pretrain.*sft"), ("", "use one of")]
)
def test_an_unknown_name_gets_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"method\.name={name} is not one of the methods; {hint}"):
        plugins.load("methods", name, path="method.name")


def test_a_third_party_name_comes_from_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint, EntryPoints

    found = EntryPoints([EntryPoint("fractions", "fractions", "rayswift.methods")])
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))
    assert "fractions" in plugins.names("methods")
    assert plugins.load_module("methods", "fractions").__name__ == "fractions"
    assert plugins.load_module("methods", "sft").__name__ == "rayswift.methods.sft"
