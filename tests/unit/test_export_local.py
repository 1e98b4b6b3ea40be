"""Engine `local` as the judge of an export, and as the clock for a quantized model beside the unquantized one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rayswift import api, cli
from rayswift.errors import ConfigError, ExportError
from rayswift.export import served, speed
from rayswift.export.manifest import read_valid
from rayswift.export.measured import Served
from rayswift.export.pipeline import export
from rayswift.export.terms import QuantizeSpec
from rayswift.models.adapters import load_base
from rayswift.serving import environment
from rayswift.serving.environment import Interpreter, resolved
from rayswift.serving.local import precision, probe
from rayswift.serving.spec import ServeSpec
from tests.export_cases import shake, write_run
from tests.multimodal_models import make

torch.set_num_threads(1)
LACKS = "there is no environment for vllm"


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: what is tested is what `auto` does without it."""
    for module in (served, environment):
        monkeypatch.setattr(module, "interpreter_of", lambda engine, _: Interpreter("", LACKS))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"query": f"say {i}", "response": f"it is {i}"}) + "\n" for i in range(30)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A run whose weights are not those of its base."""
    weights = dict(load_base(str(tiny_model_dir)).state_dict())
    shake(weights, 0.1)
    folder = tmp_path_factory.mktemp("runs") / "full"
    write_run(folder, tiny_model_dir, weights, None)
    return folder


def said_of(folder: Path) -> Served:
    verify = read_valid(folder).verify
    assert verify is not None
    assert verify.served is not None
    return verify.served


def test_by_default_an_export_is_proved_in_what_an_endpoint_would_serve_it_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python function and the command do the same."""
    api.export(str(run), str(tmp_path / "one"))
    note = f"note: proved in engine local, not in vLLM: {LACKS}"
    assert note in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(run), str(tmp_path / "two")])
    told = capsys.readouterr()
    assert caught.value.code == 0, told.err
    assert note in told.err
    assert "\nlocal 5." in told.out
    assert "100% of greedy tokens are the unquantized model's, loaded in" in told.out
    chosen, _ = resolved(ServeSpec(models={"m": str(tmp_path / "one")}))
    for said in (said_of(tmp_path / "one"), said_of(tmp_path / "two")):
        assert said.engine == chosen.engine == "local"
        assert (said.dtype, said.device, said.template_equal, said.greedy_agreement) == ("float32", "cpu", True, 1.0)
        assert said.max_abs < 1e-4
        assert said.num_positions > 100
        assert 0 < (said.first_token_s or 0) < said.load_s + 10
        assert said.tokens_per_second > 0
    verify = read_valid(tmp_path / "one").verify
    assert verify is not None
    assert verify.speed is None  # there is one model, and `served` has its speed
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| speed in local | loaded in" in card


def test_a_quantized_export_is_proved_in_local_and_timed_beside_the_unquantized_model(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    """Of gptq this machine's vLLM may have no kernel: it is served by `local`, so `local` has to answer from it."""
    spec = QuantizeSpec("gptq", settings={"group_size": 32}, calibration=str(rows), num_calibration=8,
                        num_held_out=6, max_perplexity=2.0, min_agreement=0.1)  # fmt: skip
    made = api.export(str(run), str(tmp_path / "out"), quantize=spec)
    said = said_of(tmp_path / "out")
    assert (said.engine, said.dtype) == ("local", "bfloat16")
    assert said.mean_abs <= said.bound_mean_abs
    assert made.verify is not None
    assert made.quantization is not None
    both = made.verify.speed
    assert both is not None
    assert (both.engine, both.device, both.num_answers, both.num_tokens) == ("local", "cpu", 8, 64)
    assert both.before.dtype == ("bfloat16" if precision.is_known(torch.bfloat16) else "float32")
    assert both.before.size_bytes == made.quantization.bytes_before > both.after.size_bytes
    assert both.after.tokens_per_second == said.tokens_per_second  # the engine was not started for it again
    assert both.ratio == both.after.tokens_per_second / both.before.tokens_per_second
    assert both.first_token_ratio == both.after.first_token_s / both.before.first_token_s
    assert min(both.before.load_s, both.after.load_s) > 0
    card = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "## Size and speed", "| | unquantized | quantized |", f"| computed in | {both.before.dtype} | bfloat16 |",
        f"| loaded in | {both.before.load_s:.2f} s | {both.after.load_s:.2f} s |",
        f"| tokens/s | {both.before.tokens_per_second:.1f} | {both.after.tokens_per_second:.1f}, x{both.ratio:.2f} |",
    ):  # fmt: skip
        assert row in card, row


def test_what_has_no_room_beside_the_export_is_told_and_not_tried(
    run: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Linux would end the process, and the export with it."""
    monkeypatch.setattr(probe, "memory_left", lambda: 50_000)
    spec = QuantizeSpec("fp8", calibration=str(rows), num_held_out=6, max_perplexity=2.0, min_agreement=0.1)
    verify = api.export(str(run), str(tmp_path / "out"), quantize=spec).verify
    assert verify is not None
    assert (verify.served, verify.speed) == (None, None)
    assert "beside the model that is exported, and 39.1 KiB may be taken" in str(verify.not_served)
    assert "note: speed is not compared: engine=local takes" in capsys.readouterr().err


def test_what_is_timed_as_unquantized_are_the_trained_weights(
    run: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = load_base(str(tiny_model_dir)), list[Any]()
    shake(dict(model.state_dict()), 0.3)
    timed = probe._speed
    monkeypatch.setattr(probe, "_speed", lambda opened, *more: [seen.append(opened), timed(opened, *more)][1])
    ids = [[5, 6, 7, 8]]
    found = speed.unquantized(model, tiny_model_dir, "float32", ids)
    assert found is not None
    with torch.no_grad():
        same = seen[0].model(input_ids=torch.tensor(ids)).logits
        assert torch.allclose(same, model.eval()(input_ids=torch.tensor(ids)).logits, atol=1e-4)


def test_a_slow_model_is_timed_until_the_bound(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_MOST_S", 0.0)
    counted = list[int]()
    answered = probe._answered
    monkeypatch.setattr(probe, "_answered", lambda *args: [found := answered(*args), counted.append(found[0])][0])
    assert probe.speed_of(str(tiny_model_dir), [[5, 6, 7]]).tokens_per_second > 0
    assert counted == [1, 1, 1]  # one token is waited for, and no second one


def test_the_decode_loop_says_what_transformers_says_of_images_too(tmp_path: Path) -> None:
    export(str(make("qwen2_5_vl", tmp_path / "eyes")), str(tmp_path / "out"), engine="local")
    verify = read_valid(tmp_path / "out").verify
    assert verify is not None
    assert verify.served is not None
    assert (verify.media, verify.served.media_equal, verify.served.greedy_agreement) == (("image",), True, 1.0)
    assert verify.served.num_positions == verify.num_positions - verify.num_prompts
    assert verify.served.max_abs < 1e-4


def test_an_engine_that_answers_otherwise_leaves_no_export(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = probe.score
    monkeypatch.setattr(probe, "score", lambda *args: [value + 0.01 for value in score(*args)])
    with pytest.raises(ExportError, match=r"local's log-probabilities differ by 0\.01 on average") as caught:
        api.export(str(tiny_model_dir), str(tmp_path / "out"))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out").exists()


def test_a_model_that_local_does_not_serve_is_told_or_refused_where_local_was_asked_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("is a model whose answers from a cache are not its own", path="model", value="tiny")

    monkeypatch.setattr(probe, "open_folder", refuse)
    made = api.export(str(tiny_model_dir), str(tmp_path / "out"))
    assert made.verify is not None
    assert made.verify.served is None
    assert made.verify.not_served == "model=tiny is a model whose answers from a cache are not its own"
    assert "note: not proved in a serving engine: model=tiny is a model whose" in capsys.readouterr().err
    assert "| serving engine | none: model=tiny is a model" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ExportError, match="local cannot serve it: model=tiny is a model whose"):
        api.export(str(tiny_model_dir), str(tmp_path / "other"), engine="local")
    assert not (tmp_path / "other").exists()
