"""Promotions of models that know no conversations: texts are continued, and vectors compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayswift.export.pipeline import export
from rayswift.serving.versions import VERSION_HEADER, version_of
from tests.embedding_cases import write_modules
from tests.promotion_cases import run, serving, write_spec

pytestmark = [pytest.mark.ray, pytest.mark.long]
_QUICK = ("--steps", "1", "--step-seconds", "0.5", "--min-requests", "0")


def _without_template(model: Path, folder: Path, *, noisy: bool = False) -> Path:
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if noisy:
        torch.manual_seed(1)
        weights = {name: torch.randn_like(one) for name, one in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _embedding(model: Path, folder: Path) -> Path:
    """The same model as one of embeddings."""
    shutil.copytree(model, folder)
    write_modules(folder, {"pooling_mode": "lasttoken"}, normalize=True)
    return folder


@dataclass
class _Served:
    url: str
    exports: Path
    rows: Path

    def live(self, model: str) -> str:
        body, path = {"model": model}, "embeddings" if model == "e" else "completions"
        body |= {"input": "hello"} if model == "e" else {"prompt": "hello"}
        return httpx.post(f"{self.url}/{path}", json=body, timeout=60).headers[VERSION_HEADER]


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, free_port: Callable[[], int]
) -> Iterator[_Served]:
    folder = tmp_path_factory.mktemp("kinds")
    (exports := folder / "exports").mkdir()
    plain = _without_template(tiny_model_dir, folder / "plain")
    noisy = _without_template(tiny_model_dir, folder / "noisy", noisy=True)
    embeds, noisy_embeds = (_embedding(model, folder / f"{model.name}-vectors") for model in (plain, noisy))
    for kind, one, other in (("text", plain, noisy), ("vector", embeds, noisy_embeds)):
        for name, source in (("one", one), ("two", exports / f"{kind}-one"), ("noisy", other)):
            export(str(source), str(exports / f"{kind}-{name}"))
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"hello world number {i}, and so on"}) + "\n" for i in range(3)))
    port = free_port()
    models = {"t": exports / "text-one", "e": exports / "vector-one"}
    with serving(folder, write_spec(folder, models, port)):
        yield _Served(f"http://127.0.0.1:{port}/v1", exports, rows)


@pytest.mark.parametrize(
    ("model", "kind", "told", "refused"),
    [("t", "text", "100% as the live version does", "of its greedy answers are the live version's"),
     ("e", "vector", "with a mean cosine of 1.000", "a mean cosine of")],
)  # fmt: skip
def test_a_version_that_says_the_same_is_promoted_and_another_one_is_not(
    served: _Served, tmp_path: Path, model: str, kind: str, told: str, refused: str
) -> None:
    old, new = (str(version_of(served.exports / f"{kind}-{name}")) for name in ("one", "two"))
    options = ["--model", model, "--prompts", str(served.rows), "--min-agreement", "0.9", *_QUICK]
    assert served.live(model) == old
    code, said = run(tmp_path, "promote", str(served.exports / f"{kind}-noisy"), *options)
    assert code == 5, said
    assert refused in said
    assert served.live(model) == old
    code, said = run(tmp_path, "promote", str(served.exports / f"{kind}-two"), *options)
    assert code == 0, said
    assert f"3 prompts answered, {told}" in said
    assert served.live(model) == new
