"""Every entry of LLaMA-Factory's demo data trains as it lies there: text, pairs, tools, images, sounds and videos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayswift.training.run_dir import RunDir
from tests.multimodal_models import make
from tests.ranks.test_run import order_of, train

UNUSED = {"kto_en_demo": "is labelled as an answer not to give"}
"""Entries with rows that are well made and of no use to sft, and why."""
PLAIN_TEXT = ("wiki_demo", "c4_demo")
pytestmark = pytest.mark.long
ENTRIES = (
    "identity", "alpaca_en_demo", "glaive_toolcall_en_demo", "dpo_en_demo", "kto_en_demo", "wiki_demo", "c4_demo",
    "mllm_demo", "mllm_audio_demo", "mllm_video_demo", "mllm_video_audio_demo",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes everything there is: a tiny Qwen2.5-Omni thinker, whose template also knows tools."""
    folder = make("qwen2_5_omni", tmp_path_factory.mktemp("omni") / "model")
    template = (folder / "chat_template.jinja").read_text()
    tools = "{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}\n"
    calls = (
        "{%- for call in message.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
        "{%- endfor %}{{- '<|im_end|>' + '\\n' }}{%- endfor %}"
    )
    changed = tools + template.replace("{{- '<|im_end|>' + '\\n' }}{%- endfor %}", calls)
    assert changed.count("tool_call>") == 2
    (folder / "chat_template.jinja").write_text(changed)
    return folder


def test_the_list_is_whole(shared_data: Path) -> None:
    info = json.loads((shared_data / "llamafactory_demo" / "dataset_info.json").read_text())
    here = {
        name
        for name, entry in info.items()
        if (shared_data / "llamafactory_demo" / str(entry.get("file_name"))).is_file()
    }
    assert here == set(ENTRIES)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_trains_as_it_lies_there(tmp_path: Path, model: Path, shared_data: Path, entry: str) -> None:
    info = str(shared_data / "llamafactory_demo" / "dataset_info.json")
    source = {"path": info, "dataset": entry, "limit": 1 if entry in PLAIN_TEXT else 10}
    changes = {
        "data.train": [source], "data.eval": [], "data.max_length": 512 if entry in PLAIN_TEXT else 6144,
        "data.max_bad_fraction": 0.0,
        "data.chunk_rows": 64, "data.media.max_frames": 4, "train.global_batch_size": 2, "train.micro_batch_size": 1,
        "train.epochs": 1, "train.save_every": None, "train.eval_every": None,
        "method.name": "pretrain" if entry in PLAIN_TEXT else "sft",
    }  # fmt: skip
    order = order_of("demo", tmp_path, model, tmp_path, ranks=1, **changes)
    ledger = train(order).ledger
    left_out = RunDir(order.job.run_dir).read_jsonl("quarantine.jsonl")
    assert all(UNUSED.get(entry, "nothing is bad") in row["reason"] for row in left_out), left_out[:2]
    assert ledger.rows_trained + len(left_out) == ledger.rows_visited == order.train_stream.num_rows_total > 0
