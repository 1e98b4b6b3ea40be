"""Evaluations of a tiny model: losses against plain transformers, answers against `generate`, every row told."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayswift import api, cli
from rayswift.config.job import AdapterSpec
from rayswift.errors import CheckpointError, ConfigError, DataError
from rayswift.evaluation import answers, pipeline, target
from rayswift.evaluation.report import EvalReport, RowCounts, RowFile, name_among, report_names
from rayswift.evaluation.rows import conversations, open_rows
from rayswift.export.adapter import export_adapter
from rayswift.models.adapters import add_lora, load_base
from rayswift.models.init import init_model
from tests.export_cases import shake, write_lora_run, write_run
from tests.multimodal_models import make
from tests.serving_media_cases import Served, asked, image_part, picture, png, text_part

torch.set_num_threads(1)
CHATS: list[list[tuple[str, str]]] = [
    [("user", "What does str.upper do?"), ("assistant", "It returns a copy in capitals.")],
    [("system", "Be brief."), ("user", "Two?"), ("assistant", "2"), ("user", "Three and four?"), ("assistant", "3, 4")],
    [("user", "Hello"), ("assistant", "Good day to you, whoever you are. " * 4)],
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Grüße aus Zürich: 東京", "x " * 300]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chat_rows() -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]


@pytest.fixture
def chats(tmp_path: Path) -> str:
    return write_rows(tmp_path / "held_out.jsonl", chat_rows())


def reference(model: torch.nn.Module, documents: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """(mean loss, trained tokens) by transformers' own loss, a document at a time."""
    total, count = 0.0, 0
    for ids, labels in documents:
        found = sum(label != -100 for label in labels[1:])
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss) * found
        count += found
    return total / count, count


def chat_documents(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels written down turn by turn, as the template of `model init` says them."""
    documents = []
    for chat in CHATS:
        ids: list[int] = []
        labels: list[int] = []
        for number, (role, _) in enumerate(chat):
            turns = [{"role": r, "content": t} for r, t in chat[: number + 1]]
            before = tokenizer.apply_chat_template(turns[:-1], tokenize=False) if number else ""
            whole = tokenizer.apply_chat_template(turns, tokenize=False)
            asked = (
                tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True) if number else ""
            )
            answers_here = role == "assistant"
            said = whole[len(asked if answers_here else before) :]
            pieces = (
                [(asked[len(before) :], False), (said.rstrip("\n"), True), ("\n", False)]
                if answers_here
                else [(said, False)]
            )
            for piece, trained in pieces:
                found = tokenizer(piece, add_special_tokens=False)["input_ids"]
                ids += found
                labels += found if trained else [-100] * len(found)
        documents.append((ids, labels))
    return documents


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_loss_of_conversations_is_that_of_transformers(tiny_model_dir: Path, chats: str) -> None:
    report = api.evaluate(str(tiny_model_dir), chats, max_new_tokens=0)
    loss, count = reference(plain(tiny_model_dir), chat_documents(AutoTokenizer.from_pretrained(tiny_model_dir)))
    assert report.loss == pytest.approx(loss, abs=1e-5)
    assert report.perplexity == math.exp(report.loss)
    assert report.trained_tokens == count
    assert (report.target.kind, report.target.step, report.loss_reason) == ("model", None, None)
    assert (report.answers, report.answers_reason) == (None, "--max-new-tokens is 0")
    assert (report.rows.read, report.rows.used, report.rows.refused, report.rows.cut) == (3, 3, 0, 0)
    (file,) = report.rows.files
    assert (file.path, file.num_rows) == (chats, 3)
    assert file.sha256 == hashlib.sha256(Path(chats).read_bytes()).hexdigest()


def test_the_loss_of_texts_is_that_of_transformers(tiny_model_dir: Path, tmp_path: Path) -> None:
    """A text over the longest length is split, and its pieces are documents."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    documents = []
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        documents += [(ids[start : start + 64], ids[start : start + 64]) for start in range(0, len(ids), 64)]
    rows = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    report = api.evaluate(str(tiny_model_dir), rows, max_length=64)
    loss, count = reference(plain(tiny_model_dir), documents)
    assert report.loss == pytest.approx(loss, abs=1e-5)
    assert (report.trained_tokens, report.tokens) == (count, sum(len(ids) for ids, _ in documents))
    assert report.answers is None
    assert report.answers_reason == "the rows have no question with an answer"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "lora"])
def test_a_run_is_evaluated_and_keeps_the_report(tmp_path: Path, tiny_model_dir: Path, chats: str, kind: str) -> None:
    run = tmp_path / "runs" / kind
    spec = AdapterSpec(rank=4) if kind == "lora" else None
    model: Any = load_base(str(tiny_model_dir))
    model = add_lora(model, spec, seed=0) if spec else model
    weights = {name: tensor for name, tensor in model.state_dict().items() if not spec or "lora_" in name}
    shake(weights, 0.1)
    write_run(run, tiny_model_dir, weights, spec)
    target = str(run / "checkpoints" / "step-00000007") if kind == "checkpoint" else str(run)
    report = api.evaluate(target, chats, max_new_tokens=0)
    loss, _ = reference(model.eval(), chat_documents(AutoTokenizer.from_pretrained(tiny_model_dir)))
    assert report.loss == pytest.approx(loss, abs=1e-4)
    assert (report.target.kind, report.target.step) == ("checkpoint" if kind == "checkpoint" else "run", 7)
    assert report.target.model == str(tiny_model_dir)
    kept = json.loads((run / "eval-held_out.json").read_text())
    assert kept == report.model_dump(mode="json")
    assert {"torch", "rayswift"} <= set(kept["versions"])
    assert kept["settings"]["max_length"] == 1024
    assert not list(run.glob("*.tmp"))


def test_other_rows_of_the_same_name_have_a_report_of_their_own(tmp_path: Path, tiny_model_dir: Path) -> None:
    run = tmp_path / "run"
    write_lora_run(run, tiny_model_dir, 0.1)
    rows = []
    for number, name in enumerate(("gsm8k", "mmlu")):
        (tmp_path / name).mkdir()
        rows.append(write_rows(tmp_path / name / "test.jsonl", chat_rows()[number:]))
    for path in (*rows, rows[0]):
        api.evaluate(str(run), path, max_new_tokens=0)
    api.evaluate(str(run), rows[1], max_new_tokens=0, limit=1)
    found = {path.name: json.loads(path.read_text())["rows"] for path in run.glob("eval-*.json")}
    assert {(one["files"][0]["path"], one["read"]) for one in found.values()} == {(rows[0], 3), (rows[1], 1)}
    assert found["eval-test.json"]["files"][0]["path"] == rows[0]


@pytest.mark.parametrize(
    ("old", "is_kept_apart"),
    [
        ('{"rows": {"files": [{"path": "b/t.jsonl", "sha256": "bb"}]}}', True),
        ('{"rows": {"files": [{"path": "a/t.jsonl", "sha256": "bb"}]}}', False),
        ('{"rows": {"files": [{"path": "b/t.jsonl", "sha256": "aa"}]}}', False),
        ('{"rows": null}', True),
        ('{"rows": 1}', False),
        ("no report", False),
    ],
    ids=["other", "edited", "moved", "tasks", "no rows", "no report"],
)
def test_which_report_is_of_other_rows(old: str, is_kept_apart: bool) -> None:
    files = (RowFile(path="a/t.jsonl", sha256="aa", num_rows=1),)
    rows = RowCounts(files=files, format="text", read=1, used=1, refused=0, cut=0, reasons=())
    names = report_names("a/t.jsonl")
    report = EvalReport.model_construct(rows=rows)
    assert name_among(report, names, {names[0]: old.encode()}.get) == names[is_kept_apart]
    assert name_among(report, names, {names[0]: old.encode(), names[1]: b""}.get) == names[1]
    assert name_among(report, names, {}.get) == names[0]


def test_a_base_that_changed_is_refused(tmp_path: Path, tiny_model_dir: Path, tiny_text: Path, chats: str) -> None:
    from rayswift.models.adapters import save_adapter

    shape = {"arch": "qwen3", "layers": 1, "hidden_size": 32, "heads": 4, "vocab_size": 512}
    base = tmp_path / "base"
    init_model(str(base), **shape, train_tokenizer_files=[str(tiny_text)], seed=0)
    save_adapter(add_lora(load_base(str(base)), AdapterSpec(rank=2), seed=0), tmp_path / "adapter", base=str(base))
    assert api.evaluate(str(tmp_path / "adapter"), chats, max_new_tokens=0).target.kind == "adapter"
    other = load_base(str(base))
    shake(dict(other.state_dict()), 0.1)
    other.save_pretrained(base)
    with pytest.raises(CheckpointError, match="has changed since"):
        api.evaluate(str(tmp_path / "adapter"), chats, max_new_tokens=0)


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_a_base_that_renders_otherwise_than_in_training_is_refused(
    kind: str, tmp_path: Path, tiny_model_dir: Path, chats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exporting and resuming do: a loss on other ids than those trained on says nothing of the training."""
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    write_lora_run(tmp_path / "run", base, 0.1)
    export_adapter(str(tmp_path / "run"), str(tmp_path / "adapter"))
    template = base / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "helper\\n"))
    monkeypatch.setattr(target, "build", lambda *_: pytest.fail("it was built"))
    told = {"run": "step-00000007", "adapter": "adapter"}[kind]
    rule = rf"model\.path={base} has another chat_template\.jinja than \S+{told} was trained with; put the base back"
    with pytest.raises(CheckpointError, match=rule):
        api.evaluate(str(tmp_path / kind), chats, max_new_tokens=0)


def test_bad_rows_are_counted_and_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "Who?"}]
    bad = ["{broken", {"messages": "none"}, {"messages": ask}]
    path = write_rows(
        tmp_path / "some.jsonl",
        [*chat_rows(), *bad, {"messages": [*ask, {"role": "assistant", "content": "word " * 200}]}],
    )
    report = api.evaluate(str(tiny_model_dir), path, max_new_tokens=2, max_length=256)
    assert (report.rows.read, report.rows.used, report.rows.refused, report.rows.cut) == (7, 4, 3, 1)
    assert len(report.rows.reasons) == 3
    assert all(
        reason.startswith(f"{path}:{line}: ") for line, reason in zip((4, 5, 6), report.rows.reasons, strict=True)
    )
    assert report.answers is not None
    assert (report.answers.num_answered, report.answers.num_unanswered) == (4, 0)
    assert "7 read, 4 used, of which 1 were cut, 3 refused" in report.summary()
    assert api.evaluate(str(tiny_model_dir), path, max_new_tokens=0, limit=4).rows.read == 4


def test_answers_are_those_of_generate(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Seven questions in any company have the answers they have alone, and the expected ones count."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model_dir), plain(tiny_model_dir)
    shake(dict(model.state_dict()), 0.2)  # as it was made it says nothing but newlines
    shutil.copytree(tiny_model_dir, tmp_path / "loud")
    model.save_pretrained(tmp_path / "loud")
    questions = ["Two?", "What does str.upper do, and what does str.lower do?", "Hi", "x " * 40, "Who?", "A?", "B?"]
    said = []
    for question in questions:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        said.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).rstrip("\ufffd"))
    assert all(text.strip() for text in said)
    expected = [*said[:4], "something else", "42", "word " * 20]
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in zip(questions, expected, strict=True)
    ]
    report = api.evaluate(str(tmp_path / "loud"), write_rows(tmp_path / "asked.jsonl", rows), max_new_tokens=12)
    found = report.answers
    assert found is not None
    assert [one.answer for one in found.shown] == said[:5]
    assert (found.num_answered, found.num_exact, found.exact_match) == (7, 4, 4 / 7)
    assert (found.num_agreed, found.num_judged) == (4, 6)
    assert found.accuracy == 4 / 6
    assert "exact match   57.1%, 4 of 7" in report.summary()
    assert "accuracy      66.7%, 4 of 6 that can be judged" in report.summary()


def test_what_cannot_be_asked_is_told(tiny_model_dir: Path, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "a " * 2200}
    rows = [{"messages": [asked, {"role": "assistant", "content": "b"}]}, chat_rows()[0]]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    report = api.evaluate(str(tiny_model_dir), path, max_new_tokens=2, max_length=8192)
    assert report.answers is not None
    assert (report.answers.num_answered, report.answers.num_unanswered) == (1, 1)
    (reason,) = report.answers.unanswered
    assert reason.startswith(f"{path}:1: its prompt has ")
    assert "1, 1 cut off, 1 not asked or not answered" in report.summary()


def test_the_question_is_what_stands_before_the_last_answer(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    media = {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": "I"}]}
    rows = [
        {"messages": [{"role": "user", "content": "Do it"}, {"role": "assistant", "tool_calls": [call]}]},
        {**media, "images": ["a.png"]},
        chat_rows()[1],
    ]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    found = conversations(open_rows(path))
    seen, question = found.questions
    assert (seen.num_media, seen.file, question.num_media) == (1, path, 0)
    assert ([turn["role"] for turn in question.chat], question.expected) == (
        ["system", "user", "assistant", "user"],
        "3, 4",
    )
    assert question.place == f"{path}:3"
    assert found.refused == []
    assert [reason.removeprefix(path) for reason in found.not_asked] == [
        ":1: ends in a tool call, which is no text to compare with",
    ]


def test_a_question_about_a_picture_is_answered_as_it_is_served(tmp_path: Path) -> None:
    with closing(Served(make("smolvlm", tmp_path / "eyes"))) as served:
        shown = png(picture(1))
        asked_for = served.prompts.chat(asked(image_part(shown), text_part("What is this?")))
        answer = served.run(served.answer(asked_for, num_tokens=6)).text
    (tmp_path / "1.png").write_bytes(shown)
    turns = [{"role": "user", "content": "<image>What is this?"}, {"role": "assistant", "content": "noise"}]
    path = write_rows(tmp_path / "seen.jsonl", [{"messages": turns, "images": ["1.png"]}])
    report = api.evaluate(str(served.folder), path, max_new_tokens=6)
    assert report.answers is not None
    assert [one.answer for one in report.answers.shown] == [answer]
    assert (report.rows.used, report.answers.num_unanswered) == (1, 0)
    assert report.loss is not None


def test_a_model_that_cannot_be_decoded_keeps_its_loss(
    tiny_model_dir: Path, chats: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("answers from a cache are not its own")

    monkeypatch.setattr(answers, "answer", refuse)
    report = api.evaluate(str(tiny_model_dir), chats)
    assert report.loss is not None
    assert (report.answers, report.answers_reason) == (None, "answers from a cache are not its own")
    assert "answers       not measured: answers from a cache" in report.summary()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "--rows", "ROWS"], "TARGET=nowhere does not exist; give a run directory"),
        (["ROWS", "--rows", "ROWS"], "is neither a run, a checkpoint"),
        (["MODEL", "--rows", "absent.jsonl"], "--rows=absent.jsonl does not exist"),
        (["MODEL", "--rows", "EMPTY"], "has no rows"),
        (["MODEL", "--rows", "ROWS", "--format", "alpacca"], "did you mean alpaca?"),
        (["MODEL", "--rows", "ROWS", "--model", "x"], "--model=x names a model of an endpoint"),
        (["MODEL", "--rows", "ROWS", "--output", "."], "--output=. is a folder; name a file in it"),
        (["MODEL", "--rows", "ROWS", "--limit", "0"], "--limit"),
        (["MODEL"], "--rows"),
        (["MODEL", "--rows", "folder"], "--rows=folder is a folder without data; data ends with .csv, "),
        (["folder", "--rows", "ROWS"], "TARGET=folder is neither a run"),
        (["MODEL", "--rows", "ROWS", "--output", "empty.jsonl/r.json"], "--output=empty.jsonl cannot be made: "),
        (["http://127.0.0.1:1/v1", "--rows", "ROWS", "--max-new-tokens", "0"], "nothing to measure of an endpoint"),
        (["http://127.0.0.1:1/v1", "--rows", "TEXTS"], "no conversation to ask an endpoint, and texts have no answer"),
        (["http://me:secret@h/v1", "--rows", "ROWS"], "TARGET carries a user name or password"),
    ],
)
def test_a_wrong_command_ends_with_code_2(
    args: list[str],
    message: str,
    chats: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    names = {
        "ROWS": chats, "MODEL": str(tiny_model_dir), "EMPTY": "empty.jsonl",
        "TEXTS": write_rows(tmp_path / "texts.jsonl", [{"text": "a text"}]),
    }  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", *(names.get(arg, arg) for arg in args)])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message in err
    assert "secret" not in err
    assert "Traceback" not in err


def test_a_report_that_cannot_be_written_is_not_lost(
    chats: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(report: EvalReport, path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "write", full)
    out = str(tmp_path / "report.json")
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", str(tiny_model_dir), "--rows", chats, "--max-new-tokens", "0", "--output", out])
    assert caught.value.code == 1
    told = capsys.readouterr().err
    report, _, error = told[told.index("{") :].partition("error: ")
    assert json.loads(report)["rows"]["read"] == 3
    assert error == f"--output={out} cannot be written: No space left on device; the report stands above this line: " \
                    "copy it\n"  # fmt: skip


def test_rows_of_which_none_can_be_used_are_a_data_error(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bad.jsonl", [{"messages": [{"role": "user", "content": "only asked"}]}])
    with pytest.raises(DataError, match=r"none of the first 1 rows can be used: .*bad\.jsonl:1: "):
        api.evaluate(str(tiny_model_dir), path)
    path = write_rows(tmp_path / "long.jsonl", [{"messages": [
        {"role": "user", "content": "long " * 99}, {"role": "assistant", "content": "answer"}]}])  # fmt: skip
    with pytest.raises(DataError, match=r"has no row that can be used: .*long\.jsonl:1: has no token left"):
        api.evaluate(str(tiny_model_dir), path, max_length=32)


def test_the_command_prints_and_writes_one_report(
    tiny_model_dir: Path, chats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "reports" / "a.json"
    with pytest.raises(SystemExit) as caught:
        cli.main(
            ["eval", str(tiny_model_dir), "--rows", chats, "--max-new-tokens", "1", "--output", str(out), "--json"]
        )
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert json.loads(out.read_text())["answers"]["num_cut"] == 3
