"""A model path becomes config, tokenizer and model, or one clear error before any cluster is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift.config.job import ModelSpec
from rayswift.errors import ConfigError
from rayswift.models.adapters import load_base
from rayswift.models.config_sizes import num_positions
from rayswift.models.init import init_model
from rayswift.models.loading import attention_of, check_folder, load_config, load_model, load_tokenizer, split_id


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_split_id(tmp_path: Path) -> None:
    assert split_id("org/name") == ("org/name", None)
    assert split_id("org/name@v1.0") == ("org/name", "v1.0")
    assert split_id("org/name@") == ("org/name", None)
    (tmp_path / "a@b").mkdir()
    assert split_id(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)


def test_model_loads_in_the_asked_dtype_without_cache(tiny_model_dir: Path) -> None:
    spec = ModelSpec(path=str(tiny_model_dir), attention="eager")
    model = load_model(spec, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache is False
    assert model.config._attn_implementation == "eager"
    assert load_model(spec).dtype == torch.float32
    assert load_config(str(tiny_model_dir)).model_type == "qwen3"
    assert load_tokenizer(str(tiny_model_dir)).eos_token == "<|im_end|>"


def test_check_folder_needs_no_torch(tiny_model_dir: Path) -> None:
    code = (
        "import sys; from rayswift.models.loading import check_folder;"
        f"assert check_folder({str(tiny_model_dir)!r}, chat_template=True)['model_type'] == 'qwen3';"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer: tokenizer.json is missing; copy the tokenizer files"),
        ("model.safetensors", "has no weights: model.safetensors is missing"),
        ("chat_template.jinja", "has a tokenizer without chat template"),
    ],
)
def test_missing_file_is_named(folder: Path, remove: str, message: str) -> None:
    (folder / remove).unlink()
    with pytest.raises(ConfigError, match=message) as caught:
        check_folder(str(folder), chat_template=True)
    assert f"model.path={folder}" in str(caught.value)


def test_loaders_refuse_what_check_folder_refuses(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer.json is missing"):
        load_tokenizer(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only as pickles"):
        load_model(ModelSpec(path=str(folder)))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json that cannot be read"):
        load_config(str(folder))
    (folder / "config.json").write_text('{"model_type": "martian"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_config(str(folder))


def test_plain_text_needs_no_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert check_folder(str(folder))["model_type"] == "qwen3"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    assert check_folder(str(folder), chat_template=True)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_cut_off_weights_are_seen_without_reading_them(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"has a broken model.safetensors"):
        check_folder(str(folder))


def test_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002.safetensors"):
        check_folder(str(folder))


def test_a_missing_weight_is_never_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 1 weights of Qwen3ForCausalLM, among them model.layers.1.mlp.up_proj"
    ):
        load_model(ModelSpec(path=str(folder)))


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in {**config, **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "abc"}, r"config.json whose hidden_size='abc' is not a whole number"),
        ({"hidden_size": 32.5}, r"config.json whose hidden_size=32.5 is not a whole number"),
        ({"num_attention_heads": 0}, r"config.json whose num_attention_heads=0 is not a positive number"),
        ({"vocab_size": True}, r"config.json whose vocab_size=True is not a whole number"),
        ({"num_hidden_layers": 3}, r"config.json whose layer_types has 2 entries for num_hidden_layers=3"),
    ],
)
def test_a_config_with_wrong_sizes_is_told_its_field(folder: Path, fields: dict[str, object], message: str) -> None:
    change_config(folder, **fields)
    for read in (check_folder, load_config, lambda path: load_model(ModelSpec(path=path))):
        with pytest.raises(ConfigError, match=message):
            read(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm_eps": "tiny"}, r"cannot be loaded: Validation error for field 'rms_norm_eps': TypeError: .*'tiny'"),
        ({"layer_types": ["full_attention", "fully"]}, r"cannot be loaded: .*layer_type.*fully"),
    ],
)
def test_what_only_transformers_refuses_is_a_config_error_with_the_field(
    folder: Path, fields: dict[str, object], message: str
) -> None:
    change_config(folder, **fields)
    with pytest.raises(ConfigError, match=message):
        load_config(str(folder))


def test_layers_that_the_config_has_not_are_never_left_out(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1, layer_types=None)
    with pytest.raises(ConfigError, match=r"more layers than its config.json says, among them model.layers.1.input"):
        load_model(ModelSpec(path=str(folder)))


def test_layers_that_predict_further_tokens_are_no_mistake(folder: Path) -> None:
    # DeepSeek and GLM store them behind the last layer, and transformers never builds them
    change_config(folder, num_hidden_layers=1, layer_types=None, num_nextn_predict_layers=1)
    assert load_model(ModelSpec(path=str(folder)))


def test_weights_without_a_place_in_any_layer_are_left_out(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights |= {
        "model.layers.0.attn.bias": torch.ones(2),
        "score.weight": torch.ones(2),
        "mtp.layers.0.w": torch.ones(2),
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(ModelSpec(path=str(folder)))


def test_weights_of_another_size_are_named(folder: Path) -> None:
    change_config(folder, vocab_size=100)
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight is \[512, 32\], not \[100, 32\]"):
        load_model(ModelSpec(path=str(folder)))


@pytest.fixture(scope="module")
def gpt_neo(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> str:
    """A model whose architecture has no sdpa."""
    folder = str(tmp_path_factory.mktemp("neo") / "base")
    init_model(folder, arch="gpt_neo", layers=2, hidden_size=32, heads=2, vocab_size=512,
               train_tokenizer_files=[tiny_text])  # fmt: skip
    return folder


def test_an_architecture_without_sdpa_loads_by_default(gpt_neo: str) -> None:
    # load_base is what export and its verification call, load_model with the defaults what serving calls
    assert load_base(gpt_neo).config._attn_implementation == "eager"
    assert load_model(ModelSpec(path=gpt_neo)).config._attn_implementation == "eager"


def test_a_choice_of_attention_is_never_replaced(gpt_neo: str, tiny_model_dir: Path) -> None:
    config, with_sdpa = load_config(gpt_neo), load_config(str(tiny_model_dir))
    for asked in ("eager", "flash_attention_2", "flash_attention_3"):
        assert attention_of(asked, config) == attention_of(asked, with_sdpa) == asked
    assert attention_of("sdpa", with_sdpa) == "sdpa"


def test_wrong_paths_are_config_errors(tmp_path: Path, tiny_text: Path) -> None:
    with pytest.raises(ConfigError, match="is a file, not a Hugging Face folder"):
        check_folder(str(tiny_text))
    with pytest.raises(ConfigError, match="is not a folder; check the path"):
        check_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"model.path=no-org/no-name@v1 .*hub cannot be reached"):
        check_folder("no-org/no-name@v1")


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses: a listing by revision, and files by commit."""

    folder: Path
    commit = "c0ffee" + "0" * 34
    requests: list[str]

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        self.requests.append(self.path)
        names = sorted(path.name for path in self.folder.iterdir())
        path = self.path.partition("?")[0]
        if path == "/api/models/org/tiny/revision/v1":
            listing = {"id": "org/tiny", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            self._send(json.dumps(listing).encode(), body=body)
        elif path.startswith(f"/api/models/org/tiny/tree/{self.commit}"):
            entries = [self._entry(name) for name in names]
            self._send(json.dumps(entries).encode(), body=body)
        elif path.startswith(f"/org/tiny/resolve/{self.commit}/") and path.rpartition("/")[2] in names:
            self._send((self.folder / path.rpartition("/")[2]).read_bytes(), body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound" if "/org/tiny/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _entry(self, name: str) -> dict[str, object]:
        content = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": sha256(content).hexdigest()[:40]}

    def _send(self, content: bytes, *, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{sha256(content).hexdigest()[:40]}"')
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the answers are asserted on."""


@pytest.fixture
def hub(tiny_model_dir: Path) -> Iterator[str]:
    """The address of a stand-in for the model hub that has `org/tiny@v1`."""
    handler = type("Hub", (_Hub,), {"folder": tiny_model_dir, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _resolve(path: str, endpoint: str, cache: Path) -> str:
    """What `check_folder` and `local_folder` say of a hub id in a process of its own, which reads HF_ENDPOINT."""
    code = (
        "import sys; from rayswift.models.loading import check_folder, local_folder; from rayswift.errors import *\n"
        "try: check_folder(sys.argv[1]); print(local_folder(sys.argv[1]))\n"
        "except ConfigError as error: print(error)\n"
    )
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    env = {name: value for name, value in env.items() if name.lower() != "http_proxy"}
    done = subprocess.run(
        [sys.executable, "-c", code, path], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_hub_id_is_downloaded_once(hub: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    folder = _resolve("org/tiny@v1", hub, tmp_path)
    check_folder(folder, chat_template=True)
    assert (Path(folder) / "model.safetensors").read_bytes() == (tiny_model_dir / "model.safetensors").read_bytes()
    nobody = "http://127.0.0.1:9"
    assert _resolve("org/tiny@v1", nobody, tmp_path) == folder
    assert "hub cannot be reached" in _resolve("org/other@v1", nobody, tmp_path)


def test_unknown_hub_id_and_revision_are_told_apart(hub: str, tmp_path: Path) -> None:
    assert "has no revision v9 on the hub" in _resolve("org/tiny@v9", hub, tmp_path)
    assert "is neither a folder nor a model on the hub" in _resolve("org/nothing", hub, tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 64}, 64),
        ({"model_type": "opt", "max_position_embeddings": 2048}, 2048),
        ({"model_type": "mpt", "max_seq_len": 32}, 32),
        ({"model_type": "gpt2"}, None),
        ({"model_type": "llama", "max_position_embeddings": 64}, None),
        ({"model_type": "bloom"}, None),
    ],
)
def test_only_a_table_of_positions_ends(config: dict[str, object], expected: int | None) -> None:
    assert num_positions(config) == expected
