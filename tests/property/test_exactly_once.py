"""Whatever the stream, the crashes and the numbers of ranks: the record of a run adds up."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from rayswift import api
from rayswift.config.job import DataSource
from tests.audit_cases import FakeRun
from tests.data_cases import make_tokenizer, pairs, plan_of, write_jsonl

TOKENIZER = make_tokenizer()


@settings(max_examples=25)
@given(data=st.data())
def test_every_row_is_accounted_for_after_crashes_and_changes_of_ranks(data: st.DataObject) -> None:
    draw = data.draw
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = []
        for number in range(draw(st.integers(1, 3), label="sources")):
            rows = [*pairs(draw(st.integers(1, 40))), *["{"] * draw(st.integers(0, 3))]
            rows += [{"question": "long?", "answer": "word " * 60}] * draw(st.integers(0, 2))
            path = write_jsonl(folder / f"{number}.jsonl", draw(st.permutations(rows)))
            sources.append(DataSource(path=str(path), weight=draw(st.sampled_from([0.5, 1.0, 1.7, 2.0]))))
        plan = plan_of(
            *sources, epochs=draw(st.integers(1, 3), label="epochs"), seed=draw(st.integers(0, 3)), max_length=48,
            chunk_rows=draw(st.sampled_from([4, 16, 64])), packing=draw(st.booleans(), label="packing"),
            shuffle=draw(st.booleans(), label="shuffle"),
            truncation=draw(st.sampled_from([None, "left", "delete", "split"])),
        )  # fmt: skip
        run = FakeRun(folder / "run", plan, TOKENIZER)
        for _ in range(draw(st.integers(0, 3), label="crashes")):
            ended = run.train(draw(st.integers(1, 7)), ranks=draw(st.sampled_from([1, 2, 3])), save_every=2)
            if run.saved[0]:
                api.audit(str(folder / "run")).check()
            if ended:
                break
            run.crash()
        else:
            assert run.train(10_000, ranks=draw(st.sampled_from([1, 2, 3, 4])), save_every=5)
        report = api.audit(str(folder / "run"))
        report.check()
        assert (report.total.remaining, report.total.read) == (0, plan.num_rows_total)
