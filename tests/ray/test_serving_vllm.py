"""The real vLLM in its own environment behind the endpoint: every quantizer's export, adapters, schemas, crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from rayswift.errors import ConfigError
from rayswift.export.manifest import read_valid
from rayswift.export.pipeline import export
from rayswift.export.terms import QuantizeSpec
from rayswift.models.init import init_model
from rayswift.models.loading import load_tokenizer
from rayswift.serving.app import RunningEndpoint, serve_in_background
from rayswift.serving.environment import interpreter_of, resolved
from rayswift.serving.spec import ServeSpec
from rayswift.serving.vllm import cpu
from tests.log_cases import files_with

_FOUND = interpreter_of("vllm", None)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.skipif(_FOUND.problem is not None, reason=f"no serving environment: {_FOUND.problem}"),
]
_MARKER, _LOGGED = "zanzibar-prompt-marker", "the-id-of-a-request-that-is-logged"
_QUANTIZERS = ("gptq", "awq", "int8", "fp8")
_SCHEMA = {
    "type": "object",
    "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}, "letter": {"enum": ["x", "y"]}},
    "required": ["digit", "letter"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """A Qwen3 of heads that vLLM's attention on a CPU has a kernel for."""
    folder = tmp_path_factory.mktemp("vllm") / "base"
    init_model(
        str(folder), arch="qwen3", layers=2, hidden_size=128, heads=4, kv_heads=2, vocab_size=512,
        train_tokenizer_files=[str(tiny_text)], seed=0,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = "{{ tools }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    """Texts to calibrate on and to be judged by."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [line for line in tiny_text.read_text().splitlines() if len(line) > 40][:120]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("quantizer", [*_QUANTIZERS, "none"])
def test_an_export_of_each_quantizer_is_proved_in_vllm(quantizer: str, base: Path, rows: Path, tmp_path: Path) -> None:
    spec = QuantizeSpec(
        name=quantizer, settings={"group_size": 32} if quantizer in ("gptq", "awq") else {}, calibration=str(rows),
        num_calibration=32, num_held_out=16, max_length=128, max_perplexity=2.0, min_agreement=0.1,
    )  # fmt: skip
    if quantizer in ("gptq", "awq") and (reason := cpu.lacks_packed()):
        _expect_a_refusal(base, tmp_path / "out", spec, reason)
        return
    export(str(base), str(tmp_path / "out"), quantize=None if quantizer == "none" else spec, engine="vllm")
    manifest = read_valid(tmp_path / "out")
    assert manifest.verify is not None
    said = manifest.verify.served
    assert said is not None
    assert said.mean_abs <= (1e-4 if quantizer == "none" else said.bound_mean_abs)
    assert said.template_equal
    assert said.tokens_per_second > 0


def _expect_a_refusal(base: Path, out: Path, spec: QuantizeSpec, reason: str) -> None:
    """On this machine: not proved in vLLM, which says why instead of dying, and served by `local`."""
    with pytest.raises(ConfigError, match="cannot prove this export: vLLM runs weights of gptq"):
        export(str(base), str(out), quantize=spec, engine="vllm")
    export(str(base), str(out), quantize=spec, engine="auto")
    verify = read_valid(out).verify
    assert verify is not None
    assert verify.served is not None
    assert verify.served.engine == "local"
    chosen, note = resolved(ServeSpec(models={"m": str(out)}))
    assert (chosen.engine, note) == ("local", f"engine local serves: m cannot run there: {reason}")
    code = (
        "import asyncio, sys; from rayswift.serving.engine import EngineOptions; "
        "from rayswift.serving.engines.vllm import Vllm; asyncio.run(Vllm(sys.argv[1], EngineOptions()).start())"
    )
    done = subprocess.run([_FOUND.path, "-c", code, str(out)], capture_output=True, text=True, timeout=300)
    assert f"engine=vllm cannot serve {out}: {reason}" in done.stderr


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the base, and one of another model."""
    import torch

    from rayswift.config.job import AdapterSpec
    from rayswift.models.adapters import add_lora, load_base, save_adapter

    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two"), start=1):
        model = add_lora(load_base(str(base)), AdapterSpec(name="lora", rank=8, alpha=64), seed=seed)
        torch.manual_seed(seed)
        for weight, values in model.named_parameters():
            if "lora_B" in weight:
                torch.nn.init.normal_(values, std=0.05)
        save_adapter(model, root / name, base=str(base))
    subprocess.run(["cp", "-r", str(root / "one"), str(root / "foreign")], check=True)
    (root / "foreign/rayswift_base.json").write_text(json.dumps({"base": "other", "base_sha256": "0" * 64}))
    return root


@pytest.fixture(scope="module")
def endpoint(
    base: Path, adapters: Path, serving_ray: Callable[[], AbstractContextManager[int]]
) -> Iterator[RunningEndpoint]:
    with serving_ray() as port:
        spec = ServeSpec(
            models={"base": str(base)}, adapters={"base": str(adapters)}, port=port, max_concurrency=8, max_queued=8,
            max_model_len=512, kv_cache_bytes=2**28,
        )  # fmt: skip
        with serve_in_background(spec) as running:
            yield running
            core = _core()
        _until(lambda: not Path(f"/proc/{core}").exists(), 20)


def _core() -> int:
    """The process of vLLM's core that this test started, by way of Ray."""
    (core,) = [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if _is_our_core(folder)]
    return core


def _is_our_core(folder: Path) -> bool:
    try:
        return b"VLLM::EngineCore" in (folder / "cmdline").read_bytes() and os.getpid() in _ancestors(int(folder.name))
    except OSError:  # it ended meanwhile
        return False


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


@pytest.fixture
def client(endpoint: RunningEndpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=endpoint.url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def _text(client: openai.OpenAI, model: str, prompt: str = "import os", **fields: Any) -> str:
    reply = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0, **fields)
    return reply.choices[0].text


def test_a_mixed_batch_gives_each_adapter_its_own_answer(client: openai.OpenAI) -> None:
    models = ["base", "base:one", "base:two"]
    alone = {model: _text(client, model) for model in models}
    assert len(set(alone.values())) == 3
    asked = [models[number % 3] for number in range(12)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda model: _text(client, model), asked))
    assert together == [alone[model] for model in asked]


def test_adapters_that_do_not_fit_are_refused_and_others_still_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="trained on other weights"):
        _text(client, "base:foreign")
    with pytest.raises(openai.NotFoundError):
        _text(client, "base:absent")
    assert _text(client, "base:one")
    assert {model.id for model in client.models.list()} >= {"base", "base:one", "base:two"}


def test_text_and_logprobs_are_those_of_transformers(client: openai.OpenAI, base: Path) -> None:
    import torch

    from rayswift.models.adapters import load_base

    tokenizer, model = load_tokenizer(str(base)), load_base(str(base)).eval()
    ids = tokenizer("import os")["input_ids"]
    made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0][len(ids) :].tolist()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
    reply = client.completions.create(model="base", prompt="import os", max_tokens=8, temperature=0, logprobs=3)
    assert reply.choices[0].text == tokenizer.decode(made, skip_special_tokens=True)
    scored = reply.choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs is not None
    assert abs((scored.token_logprobs[0] or 0) - float(logprobs[made[0]])) < 1e-4


def test_a_json_schema_is_kept_to(client: openai.OpenAI) -> None:
    for seed in range(4):
        reply = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], temperature=1, seed=seed, max_tokens=40,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": _SCHEMA}},
        )  # fmt: skip
        found = json.loads(reply.choices[0].message.content or "")
        assert set(found) == {"digit", "letter"}
        assert 0 <= found["digit"] <= 9
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}],
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "nope"}}},
        )  # fmt: skip
    assert _text(client, "base")


def test_a_demanded_call_keeps_to_the_tools_schema(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "pick", "parameters": _SCHEMA}}
    named: Any = {"type": "function", "function": {"name": "pick"}}
    for choice in ("required", named):
        reply = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], tools=[tool], tool_choice=choice, max_tokens=80,
            seed=1,
        )  # fmt: skip
        said = (reply.choices[0].message.content or "").replace(" ", "")
        if choice == "required" and reply.choices[0].finish_reason == "length":  # it has no reason to stop calling
            assert said.startswith('[{"name":"pick","arguments":{"digit":')
            continue
        # OpenAI's API says `stop` of a call that was demanded by its name
        assert reply.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")
        call: Any = (reply.choices[0].message.tool_calls or [])[0]
        assert call.function.name == "pick"
        assert set(json.loads(call.function.arguments)) == {"digit", "letter"}


def test_streams_stops_seeds_and_choices(client: openai.OpenAI) -> None:
    whole = _text(client, "base")
    stream = client.completions.create(model="base", prompt="import os", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole
    stop = whole[-2:]
    stopped = client.completions.create(model="base", prompt="import os", max_tokens=8, temperature=0, stop=stop)
    assert stopped.choices[0].text == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    drawn = [client.completions.create(model="base", prompt="a", n=3, seed=5, max_tokens=6) for _ in range(2)]
    assert [choice.text for choice in drawn[0].choices] == [choice.text for choice in drawn[1].choices]
    assert len({choice.text for choice in drawn[0].choices}) > 1


def test_a_killed_replica_takes_its_core_along_and_the_endpoint_heals(
    endpoint: RunningEndpoint, client: openai.OpenAI
) -> None:
    before = _text(client, "base")
    core = _core()
    os.kill(next(_ancestors(core)), signal.SIGKILL)
    _until(lambda: not Path(f"/proc/{core}").exists(), 20)

    def healed() -> bool:
        try:
            return _text(client, "base") == before
        except openai.APIError:
            return False

    _until(healed, 180)


def test_no_file_of_the_session_holds_what_a_client_has_asked(
    endpoint: RunningEndpoint, client: openai.OpenAI, ray_temp_dir: str
) -> None:
    """Nor what was refused, by us or by vLLM; whatever vLLM's processes print is there too."""
    asked = f"What is {_MARKER}?"
    chat: Any = [{"role": "user", "content": asked}]
    schema: Any = {"type": "json_schema", "json_schema": {"name": _MARKER, "schema": {"type": _MARKER}}}
    assert _text(client, "base:one", asked)
    list(client.completions.create(model="base", prompt=asked, max_tokens=4, stream=True))
    client.chat.completions.create(model="base", messages=chat, max_tokens=4, extra_query={"prompt": _MARKER})
    for refused in (
        lambda: _text(client, "base:foreign", asked),
        lambda: _text(client, f"base:{_MARKER}"),
        lambda: _text(client, "base", f"{asked} " * 200),
        lambda: _text(client, "base", asked, extra_body={_MARKER: _MARKER}),
        lambda: client.chat.completions.create(model="base", messages=chat, response_format=schema),
        lambda: client.get("/nothing", cast_to=object, options={"params": {"prompt": _MARKER}}),
    ):
        with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
            refused()
    _text(client, "base", asked, extra_headers={"X-Request-Id": _LOGGED})
    _until(lambda: files_with(Path(ray_temp_dir), _LOGGED), 20)  # the requests are in a log
    assert files_with(Path(ray_temp_dir), _MARKER) == []
    assert any("replica_" in path.name for path in files_with(Path(ray_temp_dir), "rayswift"))


def _until(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
