"""Tasks of the lm-evaluation-harness on a tiny model: figures against plain transformers, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rayswift import api, cli
from rayswift.config.job import AdapterSpec
from rayswift.errors import ConfigError, RaySwiftError
from rayswift.evaluation import harness
from rayswift.evaluation.report import TaskResult
from rayswift.models.adapters import add_lora, load_base
from rayswift.serving.prompts import PromptBuilder
from tests.export_cases import export, shake, write_run
from tests.harness_cases import CHOICES, QUESTIONS, write_answer, write_choice, write_likely, write_task

pytest.importorskip("lm_eval", reason="needs the extra `harness`")
torch.set_num_threads(1)
GOLD = [number % 3 for number in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def loud(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, shaken: as it was made it says nothing but newlines."""
    folder = tmp_path_factory.mktemp("loud") / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = plain(folder)
    shake(dict(model.state_dict()), 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with `own_choice` and `own_likely`."""
    write_choice(tmp_path / "tasks", GOLD)
    write_likely(tmp_path / "tasks")
    return tmp_path / "tasks"


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def as_chat(tokenizer: Any, question: str) -> str:
    turns = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def logprob(model: Any, tokenizer: Any, context: str, text: str) -> tuple[float, bool]:
    """(log p of the text after the context, whether it is the greedy one). White space before it belongs to it."""
    before = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
    ids = tokenizer(context + text, add_special_tokens=False)["input_ids"]
    assert ids[: len(before)] == before
    with torch.no_grad():
        logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    places = range(len(before) - 1, len(ids) - 1)
    found = [float(logprobs_TV[place, ids[place + 1]]) for place in places]
    return math.fsum(found), all(int(logprobs_TV[place].argmax()) == ids[place + 1] for place in places)


def scores_of(result: TaskResult) -> dict[str, tuple[float | None, float | None]]:
    return {score.metric: (score.value, score.stderr) for score in result.scores}


def figure(values: list[bool]) -> tuple[Any, Any]:
    """Mean and standard error, written down."""
    return pytest.approx(mean(values)), pytest.approx(stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize("kind", ["chat", "plain", "lora run"])
def test_log_probabilities_are_those_of_transformers(tmp_path: Path, loud: Path, tasks: Path, kind: str) -> None:
    """Accuracy of choices, by sum and per character, and perplexity, from every token's log-probability."""
    tokenizer, model, target = AutoTokenizer.from_pretrained(loud), plain(loud), str(loud)
    if kind == "lora run":
        spec, target = AdapterSpec(rank=4), str(tmp_path / "runs" / "lora")
        model = add_lora(load_base(str(loud)), spec, seed=0)
        weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
        shake(weights, 0.1)
        write_run(Path(target), loud, weights, spec)
        model.eval()
    is_chat = kind != "plain"
    contexts = [as_chat(tokenizer, question) if is_chat else question for question in QUESTIONS]
    delimiter = "" if is_chat else " "
    sums = [[logprob(model, tokenizer, context, delimiter + choice)[0] for choice in CHOICES] for context in contexts]
    right = [max(range(3), key=lambda i: row[i]) == gold for row, gold in zip(sums, GOLD, strict=True)]
    lengths = [len(choice) for choice in CHOICES]
    normed = [max(range(3), key=lambda i: row[i] / lengths[i]) == gold for row, gold in zip(sums, GOLD, strict=True)]
    likely = [logprob(model, tokenizer, context, CHOICES[1])[0] for context in contexts]

    report = api.evaluate(
        target, tasks=("own_choice", "own_likely"), include_path=str(tasks), chat_template=None if is_chat else False
    )
    assert report.harness is not None
    assert report.harness.chat_template is is_chat
    choice, words = report.harness.tasks
    assert scores_of(choice) == {"acc": figure(right), "acc_norm": figure(normed)}
    assert scores_of(words)["perplexity"][0] == pytest.approx(math.exp(-mean(likely)), rel=1e-3)
    assert (choice.version, choice.output_type, choice.num_fewshot) == ("1.5", "multiple_choice", 0)
    assert (choice.num_samples, choice.num_available, len(choice.sha256 or "")) == (8, 8, 64)
    assert 0 < sum(right) < 8 or 0 < sum(normed) < 8  # neither a constant nor all of them
    if kind == "lora run":
        kept = json.loads((Path(target) / "eval-tasks-own_choice-own_likely.json").read_text())
        assert kept == report.model_dump(mode="json")
        assert kept["target"]["step"] == 7


def test_answers_are_those_of_generate(loud: Path, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(loud), plain(loud)
    said = []
    for question in QUESTIONS:
        ids = tokenizer(as_chat(tokenizer, question), add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=12)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append(text.split("\n\n")[0])
    assert all(text.strip() for text in said)
    write_answer(tmp_path / "tasks", [*said[:5], "wrong", said[6] + "!", "42"])
    report = api.evaluate(str(loud), tasks=("own_answer",), include_path=str(tmp_path / "tasks"), batch_size=3)
    assert report.harness is not None
    (found,) = report.harness.tasks
    assert scores_of(found) == {"exact_match": figure([True] * 5 + [False] * 3)}
    assert "task          own_answer (version 1.5, 0-shot, 8 samples): exact_match 0.625 ± 0.18" in report.summary()
    assert "asked as chats" in report.summary()
    assert "loss" not in report.summary()


def test_prompts_have_the_ids_that_are_served(loud: Path) -> None:
    """Also with a tokenizer that begins every text with a token of its own, which a template does not ask for."""
    from tokenizers.processors import TemplateProcessing

    from rayswift.evaluation import harness_models

    tokenizer: Any = AutoTokenizer.from_pretrained(loud)
    tokenizer.bos_token = tokenizer.eos_token
    first = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{first[0]} $A", special_tokens=[first])
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"}]
    served = PromptBuilder(tokenizer)
    options: dict[str, Any] = {"max_length": 64, "batch_size": 2}
    chats = harness_models.loaded(plain(loud), tokenizer, is_chat=True, **options)
    assert chats.tok_encode(chats.apply_chat_template(turns)) == served.turns(turns)
    texts = harness_models.loaded(plain(loud), tokenizer, is_chat=False, **options)
    assert texts.tok_encode("Two?") == list(served.text("Two?").ids)
    assert texts.tok_encode("Two?")[0] == first[1]
    batch, _ = chats.tok_batch_encode([chats.apply_chat_template(turns)])
    assert batch[0].tolist() == served.turns(turns)


def test_rows_and_tasks_make_one_report(loud: Path, tasks: Path, tmp_path: Path) -> None:
    rows = tmp_path / "held.jsonl"
    rows.write_text(json.dumps({"query": "Two?", "response": "2"}) + "\n")
    both = api.evaluate(str(loud), str(rows), tasks=("own_choice",), include_path=str(tasks), limit=1)
    alone = api.evaluate(str(loud), str(rows), limit=1)
    assert (both.loss, both.rows, both.answers) == (alone.loss, alone.rows, alone.answers)
    assert alone.harness is None
    assert both.harness is not None
    assert (both.harness.tasks[0].num_samples, both.harness.tasks[0].num_available) == (1, 8)
    assert all(score.stderr is None for score in both.harness.tasks[0].scores)
    assert both.settings["tasks"] == ["own_choice"]
    assert (both.settings["max_length"], both.settings["task_max_length"]) == (1024, 2048)
    assert "1 of 8 samples" in both.summary()


def test_examples_and_groups_are_recorded(loud: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_choice(folder, GOLD)
    write_answer(folder, ["a"] * 8)
    write_answer(folder, ["a"] * 8, name="own_fixed", num_fewshot=0)
    group = {
        "group": "own_group", "task": ["own_answer", "own_fixed"], "metadata": {"version": 3},
        "aggregate_metric_list": [{"metric": "exact_match", "aggregation": "mean", "weight_by_size": True}],
    }  # fmt: skip
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    options: dict[str, Any] = {"tasks": ("own_group", "own_choice"), "include_path": str(folder), "limit": 2}
    without = api.evaluate(str(loud), **options).harness
    assert without is not None
    found = api.evaluate(str(loud), num_fewshot=2, **options).harness
    assert found is not None
    by_name = {task.name: task for task in found.tasks}
    before = {task.name: task for task in without.tasks}
    assert by_name["own_group"].members == ("own_answer", "own_fixed")
    assert (by_name["own_group"].version, by_name["own_group"].sha256) == ("3", None)
    assert (by_name["own_group"].num_samples, scores_of(by_name["own_group"])["exact_match"][0]) == (4, 0.0)
    assert [by_name[name].num_fewshot for name in ("own_answer", "own_fixed", "own_choice")] == [2, 0, 2]
    assert "own_fixed sets num_fewshot 0 itself and keeps it" in found.notes
    changed = {name for name in by_name if by_name[name].sha256 != before[name].sha256}
    assert changed == {"own_answer", "own_choice"}  # the prompts are others, and so is what was asked


def test_an_export_tells_what_tasks_gave(tmp_path: Path, loud: Path, tasks: Path) -> None:
    run = tmp_path / "runs" / "full"
    write_run(run, loud, load_base(str(loud)).state_dict(), None)
    report = api.evaluate(str(run), tasks=("own_choice",), include_path=str(tasks))
    (run / "eval-broken.json").write_text('{"loss": 1}')
    made = export(str(run), str(tmp_path / "out"), verify=False)
    (kept,) = made.evaluations
    assert (kept.report, kept.rows, kept.loss) == ("eval-tasks-own_choice.json", {}, None)
    assert kept.harness == report.harness
    assert json.loads((tmp_path / "out" / "rayswift.json").read_text())["evaluations"][0]["harness"]["version"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert report.harness is not None
    (task,) = report.harness.tasks
    assert f"lm-evaluation-harness {report.harness.version}, asked as chats:" in card
    assert f"| `own_choice` | 1.5 | 0 | 8 | acc {scores_of(task)['acc'][0]:.4g} ± " in card
    assert f"| `{(task.sha256 or '')[:12]}` |" in card


def test_what_the_harness_warns_of_is_noted(loud: Path, tmp_path: Path) -> None:
    """A prompt that is cut is no longer the task's."""
    write_answer(tmp_path / "tasks", ["a"] * 8)
    report = api.evaluate(str(loud), tasks=("own_answer",), include_path=str(tmp_path / "tasks"), max_length=30)
    assert report.harness is not None
    assert any("Left truncation applied" in note for note in report.harness.notes)
    assert "note          Left truncation applied" in report.summary()


def test_a_task_that_fails_is_told_from_a_bug_of_ours(loud: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    write_answer(folder, ["a"], name="own_broken")
    (folder / "broken.py").write_text("def judge(doc, results):\n    return {'exact_match': doc['absent']}\n")
    file = folder / "own_broken.yaml"
    file.write_text(file.read_text() + "process_results: !function broken.judge\n")
    with pytest.raises(RaySwiftError, match="--tasks fail: KeyError: 'absent'; see with RAYSWIFT_DEBUG=1") as caught:
        api.evaluate(str(loud), tasks=("own_broken",), include_path=str(folder))
    assert caught.value.exit_code == 1


@pytest.fixture
def only_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness' own tasks are left out: indexing them takes a quarter of a minute."""
    from lm_eval import tasks as module

    class OnlyOwn(module.TaskManager):  # type: ignore[misc]
        def __init__(self, include_path: str | None = None, **_: Any) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(module, "TaskManager", OnlyOwn)


@pytest.mark.usefixtures("only_own")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--rows is needed, or --tasks; write --rows"),
        (["--tasks", ","], "--rows is needed, or --tasks"),
        (["--tasks", "own_chioce", "--include-path", "TASKS"], "own_chioce is no task of the lm-evaluation-harness or"),
        (["--tasks", "own_chioce", "--include-path", "TASKS"], "; did you mean own_choice"),
        (["--tasks", "zzz", "--include-path", "TASKS"], "`lm-eval ls tasks` lists them"),
        (["--tasks", "own_choice", "--include-path", "absent"], "--include-path=absent is not a folder"),
        (["--tasks", "own_choice,own_choice", "--include-path", "TASKS"], "has own_choice twice"),
        (["--tasks", "lost", "--include-path", "TASKS"], "--tasks=lost cannot be loaded: FileNotFoundError: "),
        (["--tasks", "remote", "--include-path", "TASKS"], "--tasks=remote cannot be loaded: "),
        (["--tasks", "remote", "--include-path", "TASKS"], "see that its data can be reached from here, or name"),
        (["--tasks", "unsafe", "--include-path", "TASKS"], "--tasks=unsafe runs code that the model writes"),
        (["--tasks", "long", "--include-path", "TASKS"], "--tasks=long asks for answers of 4096 tokens, and"),
        (["--rows", "r.jsonl", "--num-fewshot", "1"], "--num-fewshot=1 is about tasks, and there are none"),
        (["--rows", "r.jsonl", "--no-chat-template"], "--chat-template=False is about tasks"),
    ],
)  # fmt: skip
def test_a_wrong_command_ends_with_code_2(
    args: list[str], message: str, loud: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_answer(tasks, ["a"], name="unsafe", unsafe_code=True)
    write_answer(tasks, ["a"], name="long", generation_kwargs={"max_gen_toks": 4096})
    write_task(tasks, "remote", [], dataset_path="nobody/nothing", dataset_kwargs={})
    write_task(tasks, "lost", [])
    (tasks / "lost.jsonl").unlink()
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", str(loud), *(str(tasks) if arg == "TASKS" else arg for arg in args)])
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_without_the_extra_the_command_says_what_to_install(loud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tasks=gsm8k needs the .*; pip install 'rayswift\[harness\]'"):
        api.evaluate(str(loud), tasks=("gsm8k",))


def test_a_model_without_a_template_is_asked_as_plain_text(loud: Path, tasks: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(loud, bare)
    (bare / "chat_template.jinja").unlink()
    report = api.evaluate(str(bare), tasks=("own_choice",), include_path=str(tasks))
    assert report.harness is not None
    assert report.harness.chat_template is False
    assert "asked as plain text" in report.summary()
    with pytest.raises(ConfigError, match="has a tokenizer without a chat template"):
        api.evaluate(str(bare), tasks=("own_choice",), include_path=str(tasks), chat_template=True)


@pytest.mark.long
def test_the_harness_own_tasks_are_found(loud: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their data lie on a hub that is not asked here."""
    for name, message in (("gsm8k", "--tasks=gsm8k cannot be loaded: "), ("gsm8kk", "did you mean gsm8k")):
        with pytest.raises(SystemExit) as caught:
            cli.main(["eval", str(loud), "--tasks", name])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
