"""A quantized export is smaller, computes nearly what was trained, is read by strangers, or is none.

Every quantizer that there is goes through the same tests; a new module is found by itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from rayswift import plugins
from rayswift.config.job import DataSource, DataSpec
from rayswift.data.formats import RowError
from rayswift.data.tokenize import encode
from rayswift.data.types import Example, Message, Sample
from rayswift.errors import ConfigError, ExportError
from rayswift.export import quantize as module
from rayswift.export.judge import said_of
from rayswift.export.manifest import ExportManifest, read_valid
from rayswift.export.measured import RowsUsed
from rayswift.export.quantize import FAMILY, asked
from rayswift.export.rows import Rows, read_rows_of
from rayswift.export.source import Source, resolve
from rayswift.export.terms import Bounds, QuantizeSpec
from rayswift.export.verify import load_in_float32
from rayswift.models.adapters import load_base
from rayswift.models.folder import read_header
from rayswift.models.loading import load_tokenizer
from tests.architecture_cases import tiny_architecture
from tests.export_cases import export, shake, write_run
from tests.multimodal_models import make

torch.set_num_threads(1)
QUANTIZERS = plugins.names(FAMILY)
GROUPS: dict[str, dict[str, Any]] = {"gptq": {"group_size": 32}, "awq": {"group_size": 32}}
FEW = {"num_calibration": 12, "num_held_out": 6}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40)


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    lines = [{"query": f"what does {i} print?", "response": f"it prints {i * 7} and {i}"}
             for i in range(start, start + count)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def spec(name: str, rows: Path | None, **more: Any) -> QuantizeSpec:
    given = {"settings": GROUPS.get(name, {}), "calibration": rows and str(rows), **FEW, **more}
    return QuantizeSpec(name, **given)


def ids_of(found: list[Example] | RowError) -> list[list[int]]:
    assert not isinstance(found, RowError), found
    return [example.input_ids for example in found]


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the linear layers of the blocks compute with, seen from outside: what each makes of the unit vectors."""
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))  # what is packed is unpacked when the model first runs
        return {
            name: layer(torch.eye(layer.in_features)).T.float()
            for name, layer in model.named_modules()
            if name.endswith("_proj")
        }


def test_json_on_standard_output_is_the_manifest_alone(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    """In a process of its own: llm-compressor has something to say as it is imported."""
    command = [sys.executable, "-m", "rayswift.cli", "export", str(tiny_model_dir), str(tmp_path / "out"), "--json",
               "--quantizer", "fp8", "--calibration", str(rows), "--held-out-rows", "6", "--max-length", "64",
               "--engine", "none"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["quantizer"] == "fp8"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_an_export_of_a_quantized_export_is_a_plain_model_of_what_its_weights_stand_for(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, name: str
) -> None:
    """Unpacked weights under the config of packed ones are read as other numbers by serving engines."""
    packed, plain, again = (str(tmp_path / one) for one in ("packed", "plain", "again"))
    export(str(tiny_model_dir), packed, quantize=spec(name, rows), bounds=Bounds(None, 2.0, perplexity=3.0))
    made = export(packed, plain)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert made.verify is not None
    assert not [key for key in read_header(tmp_path / "plain/model.safetensors") if key.endswith(("_scale", "_packed"))]
    meant = load_in_float32(packed)
    found = load_in_float32(plain)
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, meant.state_dict()[key].float().bfloat16().float()), key
    assert made.earlier is not None
    assert made.earlier.quantizer == name
    rule = rf"--quantizer=fp8 would round again what is quantized already in {packed}; quantize {tiny_model_dir}"
    with pytest.raises(ConfigError, match=rule):
        export(packed, again, quantize=spec("fp8", rows))


def test_bars_of_packing_and_unpacking_are_not_seen(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    """Of an export by int8 only those of the calibration, which tell how far it is; of an evaluation our own alone."""
    out = str(tmp_path / "out")
    command = [sys.executable, "-m", "rayswift.cli"]
    bounds = ["--min-agreement", "0.1", "--max-perplexity", "3", "--max-difference", "2"]
    exporting = ["export", str(tiny_model_dir), out, "--quantizer", "int8", "--calibration", str(rows), *bounds,
                 "--calibration-rows", "6", "--held-out-rows", "6", "--max-length", "64", "--engine", "local",
                 "--max-engine-difference", "2"]  # fmt: skip
    evaluating = ["eval", out, "--rows", str(rows), "--limit", "2", "--max-new-tokens", "2"]
    told = []
    for arguments in (exporting, evaluating):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        told.append(done.stderr)
    assert "Calibrating: 100%" in told[0]
    assert told[0].count("Applying quantization config: 100%") == 1, "that of the calibration"
    for bar in ("Compressing model", "Decompressing model", "Dispatching model"):
        assert f"{bar}:" not in told[0]
    assert torch.accelerator.is_available() or "No accelerator available!" in told[0], "a warning stays"
    assert [line.split()[0] for line in told[1].splitlines()] == ["--", "--", "--", "--", "note:"]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantized_export_is_small_near_and_read_by_strangers(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, name: str
) -> None:
    out = tmp_path / name
    made = export(str(tiny_model_dir), str(out), quantize=spec(name, rows))
    assert read_valid(out) == made
    assert made.quantization is not None
    assert made.verify is not None
    held_out = made.verify.held_out
    assert held_out is not None
    assert (made.quantizer, made.dtype, made.quantization.num_layers, made.quantization.fraction) == (
        name, "bfloat16", 14, 1.0,
    )  # fmt: skip
    assert held_out.rows.num_rows == 6
    assert held_out.perplexity_ratio <= held_out.bound_perplexity_ratio
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["ignore"]) == ("compressed-tensors", [r"re:(.*\.)?lm_head$"])

    stranger = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    plain = load_base(str(tiny_model_dir), dtype="float32")
    before, after = matrices(plain), matrices(stranger)
    size = sum(t.numel() * t.element_size() for n, t in load_file(out / "model.safetensors").items() if "_proj" in n)
    assert size < 0.75 * sum(2 * p.numel() for p in before.values())
    assert len(before) == len(after) == 14
    for layer, matrix in before.items():
        off = (after[layer] - matrix).norm() / matrix.norm()
        assert off > 0.003, layer  # more than rounding to bfloat16 does, else nothing was quantized
        assert off < 0.2 or name in ("awq", "int8")  # which move scales from one layer to another
    embeddings = plain.get_input_embeddings().weight
    assert torch.equal(stranger.get_input_embeddings().weight.float(), embeddings.bfloat16().float())


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_group_of_four_bit_weights_has_sixteen_values(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, name: str
) -> None:
    """Seen from outside: the steps between the values that are read back, and how many there are."""
    out = tmp_path / name
    export(str(tiny_model_dir), str(out), quantize=spec(name, rows))
    found = matrices(load_base(str(out), dtype="float32"))
    assert len(found) == 14
    for matrix in found.values():
        assert all(len(group.unique()) <= 16 for group in matrix.reshape(-1, 32))


def test_what_moves_too_far_leaves_nothing(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    with pytest.raises(ExportError, match=r"perplexity on \d+ held-out rows is [\d.]+ of the trained .*bound 0\.5"):
        export(str(tiny_model_dir), str(tmp_path / "out"), quantize=spec("fp8", rows, max_perplexity=0.5))
    with pytest.raises(ExportError, match=r"the most likely token is the same at .*bound 110\.0%"):
        export(str(tiny_model_dir), str(tmp_path / "out"), quantize=spec("fp8", rows, min_agreement=1.1))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_spoiled_does_not_verify(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._run

    def spoiled(model: Any, *rest: Any) -> None:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.add_(0.5)
        real(model, *rest)

    monkeypatch.setattr(module, "_run", spoiled)
    with pytest.raises(ExportError, match="did not verify"):
        export(str(tiny_model_dir), str(tmp_path / "out"), quantize=spec("fp8", rows))


def test_a_run_is_calibrated_on_its_own_data(tmp_path: Path, tiny_model_dir: Path) -> None:
    train, held = write_rows(tmp_path / "rows.jsonl", 30), write_rows(tmp_path / "held.jsonl", 5, start=100)
    weights = dict(load_base(str(tiny_model_dir)).state_dict())
    shake(weights, 0.05)
    job = write_run(tmp_path / "runs" / "full", tiny_model_dir, weights, None)
    what = resolve(str(tmp_path / "runs" / "full"))
    assert what.data is not None
    assert what.rendering == "chat"
    assert what.data.train[0].path == job.data.train[0].path == "rows.jsonl"
    data = what.data.model_copy(update={"train": (DataSource(path=str(train)),), "eval": (DataSource(path=str(held)),)})
    tokenizer = load_tokenizer(str(tiny_model_dir))
    found, judged = read_rows_of(
        Source(base=str(tiny_model_dir), data=data, rendering="chat"), tokenizer,
        path=None, num_calibration=20, num_held_out=64, max_length=None,
    )  # fmt: skip
    assert list(found.used.files) == [str(train)]
    assert list(judged.used.files) == [str(held)]
    assert (found.used.num_rows, judged.used.num_rows) == (20, 5)
    samples = [
        Sample((Message("user", row["query"]), Message("assistant", row["response"])))
        for row in map(json.loads, held.read_text().splitlines())
    ]
    wanted = [ids for found in encode(samples, tokenizer, max_length=1024, rendering="chat") for ids in ids_of(found)]
    assert sorted(one.input_ids for one in judged.examples) == sorted(wanted)
    assert all(sum(example.loss_mask) > 0 for example in judged.examples)


def test_what_is_kept_of_a_row_grows_with_its_length(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with its square: eager attention has a mask [T, T] of each row, and it would be kept for all blocks."""
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils._pytree import tree_leaves

    update, kept = IntermediatesCache.update, list[int]()

    def watched(self: Any, index: int, values: dict[str, Any]) -> None:
        kept.append(sum(one.numel() for one in tree_leaves(values) if isinstance(one, torch.Tensor)))
        update(self, index, values)

    monkeypatch.setattr(IntermediatesCache, "update", watched)
    for length in (40, 80):
        model = load_base(str(tiny_model_dir), dtype="bfloat16")
        calibrate(model, tiny_model_dir, length)
    half = len(kept) // 2
    assert half == model.config.num_hidden_layers
    assert kept[half:] == [2 * size for size in kept[:half]]


def calibrate(model: Any, tokenizer_of: Path, length: int) -> torch.Tensor:
    """Quantize a model by one row, whose ids [1, T] come back."""
    row = Example([1 + i * 7 % 50 for i in range(length)], [1.0] * length)
    used = RowsUsed(files={}, num_rows=1, num_tokens=length, sha256="")
    asked_for = spec("gptq", None, settings={"group_size": -1})
    quantizer = module.load_quantizer(asked_for)
    module.quantize(model, load_tokenizer(str(tokenizer_of)), asked_for, quantizer, Rows((row,), used))
    return torch.tensor([row.input_ids])


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "gemma2"])
def test_a_calibration_sees_what_the_model_computes(tmp_path: Path, tiny_model_dir: Path, name: str) -> None:
    """Not the tokens to come, and of those before no more than a window, here of 8; whatever makes the masks."""
    models = [tiny_architecture(name) for _ in range(2)]
    models[0].config.save_pretrained(tmp_path)
    models[0].config._name_or_path = str(tmp_path)
    seen = list[torch.Tensor]()
    for model in models:
        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids_BT = calibrate(models[0], tiny_model_dir, 20)
    with torch.no_grad():
        models[1].eval()(input_ids=ids_BT)
    torch.testing.assert_close(seen[0], seen[-1])


def test_rows_are_held_out_of_the_calibration(tiny_model_dir: Path, rows: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    for wanted, held, got in ((20, 10, (20, 10)), (64, 64, (32, 8)), (0, 64, (0, 40))):
        found, judged = read_rows_of(
            Source(base=str(tiny_model_dir)), tokenizer, path=str(rows), num_calibration=wanted, num_held_out=held,
            max_length=None,
        )  # fmt: skip
        assert (len(found.examples), len(judged.examples)) == got
        one, other = ({tuple(e.input_ids) for e in part.examples} for part in (found, judged))
        assert not one & other


def drawn(base: Path, data: dict[str, Any], num_calibration: int, num_held_out: int) -> list[list[tuple[int, ...]]]:
    """The ids of rows to calibrate on and of rows to judge by, of a job with such data."""
    what = Source(base=str(base), data=DataSpec.model_validate(data), rendering="chat")
    found = read_rows_of(what, load_tokenizer(str(base)), path=None, num_calibration=num_calibration,
                         num_held_out=num_held_out, max_length=None)  # fmt: skip
    return [[tuple(one.input_ids) for one in part.examples] for part in found]


@pytest.mark.parametrize(("wanted", "got"), [((20, 10), (20, 10)), ((64, 64), (37, 9))])
def test_a_row_that_a_job_repeats_is_on_one_side(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, wanted: tuple[int, int], got: tuple[int, int]
) -> None:
    """By its weight, because another source is longer, or because two files have it."""
    few, again = write_rows(tmp_path / "few.jsonl", 6, start=100), write_rows(tmp_path / "again.jsonl", 20)
    data = {"train": [{"path": str(rows), "weight": 2}, {"path": str(few)}, {"path": str(again)}],
            "mixing": {"stopping": "all_exhausted"}}  # fmt: skip
    found, judged = drawn(tiny_model_dir, data, *wanted)
    assert (len(found), len(judged)) == got
    assert len({*found, *judged}) == sum(got)


def test_a_row_that_a_job_holds_out_is_not_calibrated_on(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", 5, start=10)
    found, judged = drawn(tiny_model_dir, {"train": [{"path": str(rows)}], "eval": [{"path": str(held)}]}, 64, 64)
    assert (len(found), len(judged), len({*found, *judged})) == (35, 5, 40)


def test_a_row_by_itself_is_too_few_however_often_it_is_repeated(tmp_path: Path, tiny_model_dir: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", 1)
    with pytest.raises(ConfigError, match="too few rows"):
        drawn(tiny_model_dir, {"train": [{"path": str(one), "weight": 8}]}, 4, 2)


def test_the_loss_is_that_of_transformers(tiny_model_dir: Path, rows: Path) -> None:
    model = load_base(str(tiny_model_dir), dtype="float32")
    _, judged = read_rows_of(
        Source(base=str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir)), path=str(rows), num_calibration=0,
        num_held_out=7, max_length=None,
    )  # fmt: skip
    total = count = 0.0
    for example in judged.examples:
        labels = [token if weight else -100 for token, weight in zip(example.input_ids, example.loss_mask, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * sum(example.loss_mask), count + sum(example.loss_mask)
    assert said_of(model, judged.examples).loss == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_towers_stay_as_they_are(tmp_path: Path, rows: Path, name: str) -> None:
    base, out = make("llava", tmp_path / "base"), tmp_path / "out"
    settings = {"gptq": {"group_size": -1}, "awq": {"group_size": 32}}.get(name, {})
    made = export(str(base), str(out), quantize=spec(name, rows, settings=settings))
    assert made.quantization is not None
    assert made.verify is not None
    assert made.verify.media == ("image",)
    assert made.quantization.ignore == (
        r"re:(.*\.)?vision_tower\..*", r"re:(.*\.)?multi_modal_projector\..*", r"re:(.*\.)?lm_head$",
    )  # fmt: skip
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [key for key in before if "vision_tower" in key or "projector" in key]
    assert kept
    for key in kept:
        assert torch.equal(after[key], before[key].bfloat16()), key


def test_fused_experts_are_refused(tmp_path: Path, tiny_model_dir: Path, rows: Path) -> None:
    base = tmp_path / "moe"
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(base)
    for file in tiny_model_dir.glob("*token*"):
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_bytes((tiny_model_dir / "chat_template.jinja").read_bytes())
    with pytest.raises(ExportError, match=r"would leave \d+% of the weights .*fused experts") as refused:
        export(str(base), str(tmp_path / "out"), quantize=spec("fp8", rows))
    assert refused.value.exit_code == 5


def test_wrong_requests_are_told(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(tiny_model_dir), str(tmp_path / "out")

    def refused(match: str, quantize: QuantizeSpec, **more: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            export(source, out, quantize=quantize, **more)

    refused(r"--quantizer=gtpq is not one of .*did you mean gptq", spec("gtpq", rows))
    refused(r"fp8\.bits", spec("fp8", rows, settings={"bits": 4}))
    refused(r"gptq\.bits=5", spec("gptq", rows, settings={"bits": 5}))
    refused(r"--group-size=64 does not divide the 32 inputs of .*q_proj; use --group-size 32",
            spec("gptq", rows, settings={"group_size": 64}))  # fmt: skip
    refused(r"--calibration is needed: a model folder does not say", spec("fp8", None))
    refused(r"--calibration.*nothere", spec("fp8", tmp_path / "nothere.jsonl"))
    refused(r"--calibration=.*one.jsonl has too few rows", spec("gptq", write_rows(tmp_path / "one.jsonl", 1)))
    refused(r"--dtype=float32 is no type", spec("fp8", rows), dtype="float32")
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "llmcompressor" else find_spec(name))
    refused(r"--quantizer=fp8 needs llm-compressor.*rayswift\[quantize\]", spec("fp8", rows))
    assert not Path(out).exists()


def test_options_of_a_command() -> None:
    counts = {"num_calibration": 1, "num_held_out": 1}
    assert asked("none", {"bits": None}, {"calibration": None}, **counts) is None
    with pytest.raises(ConfigError, match=r"--group-size=64 says how to quantize.*--quantizer awq, fp8, gptq, int8"):
        asked("none", {"group_size": 64}, {}, **counts)
    made = asked("gptq", {"bits": 8, "group_size": None}, {"calibration": "a", "max_perplexity": 1.5}, **counts)
    assert made is not None
    assert (made.settings, made.calibration, made.max_perplexity, made.min_agreement) == ({"bits": 8}, "a", 1.5, None)


def test_a_manifest_of_before_can_be_read() -> None:
    """Version 0 of a manifest has no `quantization`."""
    old = {
        "base": "b", "base_sha256": "0", "method": None, "adapter": None, "quantizer": "none", "dtype": "float32",
        "job_hash": None, "checkpoint_step": None, "versions": {}, "merge": None, "verify": None, "files": {},
    }  # fmt: skip
    assert ExportManifest.model_validate(old).quantization is None
