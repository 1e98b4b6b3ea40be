"""A run, its export and its adapter are evaluated as the run itself measures: by what its job says of its data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rayswift import api
from rayswift.cluster.preflight import prepare
from rayswift.config.job import AdapterSpec, Job
from rayswift.data.blocks import local_blocks, step_inputs
from rayswift.data.ledger import Ledger
from rayswift.data.types import PackedBatch, StepInput
from rayswift.export.manifest import MANIFEST
from rayswift.methods.sft import Sft
from rayswift.models.adapters import add_lora, load_base
from rayswift.parallel.forward import batch_logprobs
from rayswift.training import checkpoint
from rayswift.training.evaluate import Evaluator
from tests.export_cases import export, shake, write_run

torch.set_num_threads(1)
TURNS = ["What is 7 times 6?", "It is 42, or 6 times 7.", "And 7 times 7?", "49, which is 42 and 7 more."]


def chats(count: int, roles: Sequence[str], **keys: str) -> list[dict[str, Any]]:
    role, content = keys.get("role", "role"), keys.get("content", "content")
    return [{keys.get("column", "messages"): [{role: roles[i % 2], content: f"{text} {number}"}
             for i, text in enumerate(TURNS)]} for number in range(count)]  # fmt: skip


CHATS = chats(6, ("user", "assistant"))
TAGGED = chats(6, ("customer", "agent"), role="speaker", content="said", column="messages")
PAIRS = [{"asked": f"What is {i} times {i}?", "answered": f"{i * i}"} for i in range(6)]
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]] = {
    "the last answer": (CHATS, {"loss": "last_round"}, {}),
    "all tokens": (CHATS, {"loss": "all"}, {}),
    "figures count more": (CHATS, {"loss_weights": {r"\d+": 3.0}}, {}),
    "cut at the left": (CHATS, {"max_length": 40, "truncation": "left"}, {}),
    "a system message": (CHATS, {}, {"system": "Answer with numbers alone."}),
    "columns": (PAIRS, {}, {"columns": {"asked": "query", "answered": "response"}}),
    "tags": (TAGGED, {}, {"tags": {"role_tag": "speaker", "content_tag": "said", "user_tag": "customer",
                                   "assistant_tag": "agent"}}),
    "pretraining": (CHATS, {"method": "pretrain"}, {}),
}  # fmt: skip


class Engine:
    """What an Evaluator asks of one: the model in one process."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model.eval()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        with torch.no_grad():
            return batch_logprobs(self._model, batch)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        return list(values)


class Case:
    """A LoRA run whose job has such data, and its eval_loss."""

    def __init__(self, folder: Path, base: Path, name: str) -> None:
        rows, data, source = CASES[name]
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run = folder / "runs" / "lora"
        spec = AdapterSpec(rank=4)
        self.model: Any = add_lora(load_base(str(base)), spec, seed=0)
        weights = {key: tensor for key, tensor in self.model.state_dict().items() if "lora_" in key}
        shake(weights, 0.2)
        write_run(self.run, base, weights, spec)
        file = self.run / checkpoint.folder_name(7) / checkpoint.MANIFEST
        record = json.loads(file.read_text())
        record["job"]["method"] = {"name": data.get("method", "sft")}
        sources = [{"path": str(self.rows), **source}]
        record["job"]["data"] |= {"train": sources, "eval": sources} | {k: v for k, v in data.items() if k != "method"}
        file.write_text(json.dumps(record))
        self.job = Job.model_validate(record["job"])
        self.base = base

    def eval_loss(self) -> float:
        """By the stream and the Evaluator of a run, whose job is this one."""
        stream = prepare(self.job.model_copy(update={"name": "other"})).eval_stream
        assert stream is not None
        blocks = local_blocks(stream, AutoTokenizer.from_pretrained(self.base), data_rank=0, data_size=1,
                              global_batch_size=4, ledger=Ledger.start(stream.fingerprint))  # fmt: skip
        shares = step_inputs(blocks, sequences_per_step=4, micro_batch_size=2, pad_id=0)

        def read() -> Iterator[StepInput]:
            return takewhile(lambda share: share.num_sequences > 0, shares)

        engine: Any = Engine(self.model)
        return Evaluator(engine, Sft(Sft.Config()), read).loss()


def loss_of(target: Path, rows: Path, **settings: Any) -> float:
    found = api.evaluate(str(target), str(rows), max_new_tokens=0, **settings).loss
    assert found is not None
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_run_itself(tmp_path: Path, tiny_model_dir: Path, name: str) -> None:
    case = Case(tmp_path, tiny_model_dir, name)
    assert loss_of(case.run, case.rows) == pytest.approx(case.eval_loss(), abs=1e-4)


def test_an_export_and_an_adapter_alone_are_evaluated_as_their_run(tmp_path: Path, tiny_model_dir: Path) -> None:
    case = Case(tmp_path, tiny_model_dir, "the last answer")
    export(str(case.run), str(tmp_path / "out"))
    api.export_adapter(str(case.run), str(tmp_path / "adapter"))
    for made in ("out", "adapter"):
        assert loss_of(tmp_path / made, case.rows) == pytest.approx(case.eval_loss(), abs=1e-4)


def test_other_rows_are_read_like_those_of_the_job(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Unless their format is named: then their columns are what they are called."""
    case = Case(tmp_path, tiny_model_dir, "columns")
    other, plain = tmp_path / "other.jsonl", tmp_path / "plain.jsonl"
    other.write_text(case.rows.read_text())
    plain.write_text("".join(json.dumps({"query": row["asked"], "response": row["answered"]}) + "\n" for row in PAIRS))
    wanted = pytest.approx(case.eval_loss(), abs=1e-4)
    assert loss_of(case.run, other) == loss_of(case.run, plain, format="query_response") == wanted


def test_an_export_whose_job_cannot_be_read_here_is_evaluated_as_any_model(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, tiny_model_dir, "the last answer")
    out = tmp_path / "out"
    export(str(case.run), str(out))
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["lineage"]["job"]["data"]["of_another_version"] = 1
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert loss_of(out, case.rows) != pytest.approx(case.eval_loss(), abs=1e-3)
    assert "rows are read as for a model of no job" in capsys.readouterr().err
