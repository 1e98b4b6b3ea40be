"""The ServeSpec, API keys, and the module for `serve run`: all without Ray running."""

from __future__ import annotations

import socket
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import ConfigError, ServeError
from rayswift.serving import auth, spec
from rayswift.serving.spec import ServeSpec

_KEY = "sk-unit-test-0123456789"


def test_a_spec_from_a_folder_and_from_yaml(tmp_path: Path) -> None:
    folder = tmp_path / "my-export"
    folder.mkdir()
    assert spec.load(str(folder)).models == {"my-export": str(folder)}
    file = tmp_path / "serve.yaml"
    file.write_text(f"models: {{a: '{folder}'}}\nport: 9001\nrequest_timeout_s: 1e2\n")
    loaded = spec.load(str(file))
    assert (loaded.url, loaded.request_timeout_s) == ("http://127.0.0.1:9001/v1", 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {}", "serve.models"),
        ("models: {a: x}\nport: 0", "serve.port=0 is less than 1"),
        ("models: {a: x}\nprot: 1", "serve.prot"),
        ("models: {'a b': x}", "serve.models=a b does not match"),
        ("- a", "is not a mapping"),
        ("models: [", "serve.yaml"),
    ],
)
def test_a_wrong_spec_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        spec.load(str(file))
    assert message in str(caught.value)


def test_a_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither an export folder nor a YAML file"):
        spec.load(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("h.x", "h.x")])
def test_the_url_is_one_a_client_can_use(host: str, url: str) -> None:
    assert ServeSpec(models={"a": "x"}, host=host).url == f"http://{url}:8000/v1"


def _spec(**fields: object) -> ServeSpec:
    return spec.parse({"models": {"a": "x"}, **fields})


def _write(file: Path, text: str) -> None:
    """A file that nobody else may read."""
    file.touch(mode=0o600)
    file.write_text(text)


def test_keys_become_fingerprints(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    _write(file, f"{_KEY}\n\nanother-key-0001\n")
    secured = auth.secured(_spec(api_key_file=str(file)), {})
    assert secured.api_key_sha256 == (auth.fingerprint(_KEY), auth.fingerprint("another-key-0001"))
    assert secured.api_key_file is None
    assert _KEY not in secured.model_dump_json()
    assert auth.secured(secured, {}) == secured
    assert auth.secured(_spec(), {auth.VARIABLE: _KEY}).api_key_sha256 == (auth.fingerprint(_KEY),)
    assert auth.secured(_spec(), {}).api_key_sha256 == ()


@pytest.mark.parametrize("content", ["", "\n\n", "short", "has a space in it", "schlüssel-123456"])
def test_an_unusable_key_file_is_refused_without_showing_the_key(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    _write(file, content)
    with pytest.raises(ConfigError, match="api_key_file") as caught:
        auth.secured(_spec(api_key_file=str(file)), {})
    assert not content.strip() or content not in str(caught.value)


def test_a_missing_key_file_and_an_empty_variable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        auth.secured(_spec(api_key_file=str(tmp_path / "absent")), {})
    with pytest.raises(ConfigError, match=auth.VARIABLE):
        auth.secured(_spec(), {auth.VARIABLE: ""})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_an_open_endpoint_stays_on_loopback(host: str) -> None:
    with pytest.raises(ServeError, match="without a key"):
        auth.secured(_spec(host=host), {})
    assert auth.secured(_spec(host=host), {auth.VARIABLE: _KEY}).host == host


def test_where_ray_serve_chooses_the_address_a_key_is_required_or_waived_in_words(tmp_path: Path) -> None:
    for environ in ({}, {auth.ALLOW_NO_KEY: "0"}, {auth.ALLOW_NO_KEY: ""}):
        with pytest.raises(ServeError, match=r"RAYSWIFT_API_KEY is not set.*RAYSWIFT_ALLOW_NO_KEY=1 serves without"):
            auth.secured_anywhere(_spec(), environ)
    assert auth.secured_anywhere(_spec(), {auth.ALLOW_NO_KEY: "1"}).api_key_sha256 == ()
    assert auth.secured_anywhere(_spec(), {auth.VARIABLE: _KEY}).api_key_sha256 == (auth.fingerprint(_KEY),)
    _write(tmp_path / "keys", _KEY)
    assert auth.secured_anywhere(_spec(api_key_file=str(tmp_path / "keys")), {}).api_key_sha256


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.53", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert auth.secured(_spec(host=host), {}).api_key_sha256 == ()


def test_is_allowed() -> None:
    hashes = (auth.fingerprint("other-key-000"), auth.fingerprint(_KEY))
    assert auth.is_allowed(f"Bearer {_KEY}", hashes)
    assert auth.is_allowed(f"bearer  {_KEY} ", hashes)
    for header in ("", _KEY, f"Basic {_KEY}", f"Bearer {_KEY}x", "Bearer ", f"Bearer {hashes[1]}"):
        assert not auth.is_allowed(header, hashes)


def test_a_port_in_use_is_named() -> None:
    from rayswift.serving.process import check_port

    with closing(socket.socket()) as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ServeError, match=rf"port={port} cannot be listened on .*--port") as caught:
            check_port("127.0.0.1", port)
        assert caught.value.exit_code == 1
    check_port("127.0.0.1", port)


def test_what_is_printed_when_ready_shows_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from rayswift.serving.process import ready_text

    monkeypatch.delenv(auth.VARIABLE, raising=False)
    assert "Authorization" not in ready_text(_spec())
    monkeypatch.setenv(auth.VARIABLE, _KEY)
    text = ready_text(_spec())
    assert "$RAYSWIFT_API_KEY" in text
    assert _KEY not in text
    assert "http://127.0.0.1:8000/v1/chat/completions" in text
    assert "a chat page at http://127.0.0.1:8000/  (" in text
    assert "export" not in text


def test_what_is_printed_when_ready_asks_an_embedding_model_for_vectors(tmp_path: Path) -> None:
    from rayswift.serving.process import ready_text

    (tmp_path / "modules.json").write_text("[]")
    text = ready_text(ServeSpec(models={"e": str(tmp_path)}))
    assert "curl http://127.0.0.1:8000/v1/embeddings" in text
    assert '-d \'{"model": "e", "input": ["Hello"]}\'' in text
    assert 'client.embeddings.create(model="e", input=["Hello"])' in text
    assert "client.chat" not in text


@pytest.mark.parametrize("set_before", [False, True])
def test_what_is_printed_when_ready_works_with_a_key_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_before: bool
) -> None:
    """The shell that runs the printed lines sends a key that is accepted, whatever RAYSWIFT_API_KEY was before."""
    from rayswift.serving.process import ready_text

    file = tmp_path / "my keys"
    _write(file, f"\n{_KEY}\nanother-key-0001\n")
    if set_before:
        monkeypatch.setenv(auth.VARIABLE, "not-of-this-endpoint")
    else:
        monkeypatch.delenv(auth.VARIABLE, raising=False)
    made = _spec(api_key_file=str(file))
    lines = ready_text(made).splitlines()
    end = next(at for at, line in enumerate(lines) if "from openai" in line)
    script = "curl() { printf '%s\\n' \"$@\"; }\n" + "\n".join(lines[1:end]) + f"\nprintenv {auth.VARIABLE}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert f"Authorization: Bearer {_KEY}" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == _KEY  # what the printed Python reads
    assert auth.is_allowed(f"Bearer {_KEY}", auth.secured(made, {}).api_key_sha256)
    assert _KEY not in "".join(lines)


def test_a_folder_whose_name_is_no_models_name_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    with pytest.raises(ConfigError, match=r"has a name that cannot be a model's .*; give it one: NAME='.*/my model'"):
        spec.load(str(tmp_path / "my model"))


def test_the_module_for_serve_run(root: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.delenv(auth.VARIABLE, raising=False)
    monkeypatch.setenv("RAYSWIFT_SERVE", str(tiny_model_dir))
    with pytest.raises(SystemExit, match="RAYSWIFT_API_KEY is not set: Ray Serve chooses the address"):
        runpy.run_path(str(root / "serve" / "app.py"))
    monkeypatch.setenv(auth.VARIABLE, _KEY)
    assert type(runpy.run_path(str(root / "serve" / "app.py"))["app"]).__name__ == "Application"
    for value in (str(tiny_model_dir / "absent"), None):
        monkeypatch.setenv("RAYSWIFT_SERVE", value) if value else monkeypatch.delenv("RAYSWIFT_SERVE")
        with pytest.raises(SystemExit, match=r"set it|is not a folder|check the path"):
            runpy.run_path(str(root / "serve" / "app.py"))


def test_the_config_for_serve_deploy_is_one() -> None:
    import yaml
    from ray.serve.schema import ServeDeploySchema

    root = Path(__file__).resolve().parents[2]
    made = ServeDeploySchema.model_validate(yaml.safe_load((root / "serve/config.yaml").read_text()))
    (application,) = made.applications
    assert application.import_path == "serve.app:app"
    assert set(application.runtime_env["env_vars"]) == {"PYTHONPATH", "RAYSWIFT_SERVE", "RAYSWIFT_API_KEY"}
    assert made.http_options.host == "127.0.0.1"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"adapters": {"b": "x"}}, "adapters names b"),
        ({"num_replicas": 3, "max_replicas": 2}, "max_replicas=2 is less"),
        ({"tensor_parallel": 4, "gpus_per_replica": 2}, "gpus_per_replica=2 is less"),
        ({"gpus_per_replica": 1.5}, "gpus_per_replica=1.5 is neither whole nor a part of one GPU"),
        ({"device": "cuda", "gpus_per_replica": 0}, "gpus_per_replica=0 hides the GPUs that device=cuda asks for"),
        ({"max_adapter_rank": 5}, "max_adapter_rank"),
    ],
)
def test_settings_that_do_not_agree_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        spec.parse({"models": {"a": "x"}, **fields})


def test_processes_get_what_the_spec_asks_for() -> None:
    from rayswift.serving.placement import actor_options, engine_options, replica_options

    made = ServeSpec(
        models={"a": "x", "b": "y"}, engine="vllm", engine_python="/opt/my env/python", adapters={"b": "z"},
        tensor_parallel=4, gpus_per_replica=8, accelerator_type="H100", max_replicas=3, max_concurrency=4,
    )  # fmt: skip
    options = actor_options(made)
    assert (options["num_gpus"], options["accelerator_type"]) == (8, "H100")
    assert options["runtime_env"]["py_executable"] == "'/opt/my env/python'"
    assert options["runtime_env"]["env_vars"]["VLLM_NO_USAGE_STATS"] == "1"
    assert replica_options(made)["autoscaling_config"] == {
        "min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 6.0,
    }  # fmt: skip
    assert [engine_options(made, folder).adapters for folder in ("x", "y")] == [False, True]
    assert engine_options(made, "x").gpu_memory_fraction == 0.9
    assert "py_executable" not in actor_options(ServeSpec(models={"a": "x"}, engine="local"))["runtime_env"]


def test_adapters_of_a_model_whose_versions_change_are_refused_for_what_binds_them() -> None:
    bound = "adapters are bound to their base by its sha256, and a newly trained version of it would refuse them"
    with pytest.raises(ValueError, match=bound):
        ServeSpec(models={"a": "exports/a"}, adapters={"a": "adapters"}, promotable=True)


def test_a_replica_of_a_promotable_endpoint_has_one_model() -> None:
    two = {"a": "exports/a", "b": "exports/b"}
    assert ServeSpec(models=two, promotable=True, tensor_parallel=2, gpus_per_replica=2).gpus_per_replica == 2
    with pytest.raises(ValueError, match="each of 2 models; set it to 4"):
        ServeSpec(models=two, tensor_parallel=2, gpus_per_replica=2)
