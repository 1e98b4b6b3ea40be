"""Packed documents with media are what each is alone, for every family: real rows, and one picture changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rayswift.data.blocks import packed_sequences
from rayswift.data.collate import PackedSequence, collate
from rayswift.parallel.forward import batch_logprobs
from rayswift.training.media import media_filler
from tests.data_cases import write_jsonl
from tests.media_cases import noise, sound, video
from tests.media_families import PAIRS, TAKES, Family, family, media_plan

DEMO = {"image": "mllm_demo", "audio": "mllm_audio_demo", "video": "mllm_video_demo"}


@pytest.fixture
def of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Family:
    return family(request.param, tmp_path_factory)


@pytest.mark.parametrize(
    ("of", "dataset"), [(name, DEMO[kind]) for name, kind in PAIRS] + [("qwen2_5_omni", "mllm_video_audio_demo")],
    indirect=["of"],
)  # fmt: skip
def test_real_rows_packed_are_what_each_is_alone(of: Family, dataset: str, shared_data: Path) -> None:
    info = shared_data / "llamafactory_demo" / "dataset_info.json"
    packed = of.sequences(media_plan(info, dataset))
    single = of.sequences(media_plan(info, dataset, packing=False, shuffle=False))
    assert len(packed) == 1
    assert len(single) == len(packed[0].lengths) == (6 if dataset == "mllm_demo" else 3)
    batch = collate(packed, 0, 8)
    with torch.no_grad():
        found = batch_logprobs(of.model, batch)[0]
    documents = {one.input_ids.tobytes(): of.alone(one) for one in single}
    start = 0
    for length in packed[0].lengths:
        document = documents.pop(packed[0].input_ids[start : start + length].tobytes())
        assert (found[start : start + length - 1] - document[:-1]).abs().max() < 2e-5
        start += length
    weights = [np.append(one.loss_mask[1:], 0) for one in single]
    alone = sum(float((of.alone(one) * torch.from_numpy(w)).sum()) for one, w in zip(single, weights, strict=True))
    total = float((found * batch.weights_BT[0]).sum())
    assert total == pytest.approx(alone, rel=1e-6)
    assert batch.weights_BT.sum() > 0


def _rows(folder: Path, kind: str, seed: int) -> Path:
    """Two documents with a medium of a kind; the seed is that of the first's."""
    folder.mkdir()
    tag = f"<{kind}>"
    contents = {"image": lambda n: noise(n), "audio": lambda n: sound(0.4 + n / 10, level=0.1 + n / 10)}
    for name, number in (("a", seed), ("b", 3)):
        path = folder / (name + (".mp4" if kind == "video" else ""))
        if kind == "video":
            video(path, green=60 * number)
        else:
            path.write_bytes(contents[kind](number))
    ending = ".mp4" if kind == "video" else ""
    return write_jsonl(folder / "rows.jsonl", [
        {"query": f"{tag}Who are they?", "response": "one", f"{kind}s": ["a" + ending]},
        {"query": f"What is {tag} in it?", "response": "two three", f"{kind}s": ["b" + ending]},
    ])  # fmt: skip


@pytest.mark.parametrize(("of", "kind"), PAIRS, indirect=["of"])
def test_another_picture_in_one_document_changes_nothing_in_the_next(of: Family, kind: str, tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        (sequence,) = of.sequences(media_plan(_rows(tmp_path / str(seed), kind, seed), shuffle=False))
        with torch.no_grad():
            logprobs = batch_logprobs(of.model, collate([sequence], 0, 1))[0]
        found.append([logprobs[: sequence.lengths[0] - 1], logprobs[sequence.lengths[0] :][:-1]])
    (first, second), (other, same) = found
    assert len(first) != len(other) or (first - other).abs().max() > 1e-4
    assert (second - same).abs().max() < 2e-5


@pytest.mark.parametrize("of", TAKES, indirect=True)
def test_documents_of_all_kinds_share_a_sequence(of: Family, tmp_path: Path) -> None:
    text = {"query": "Who?", "response": "four five"}
    rows: list[dict[str, Any]] = [text]
    for kind in TAKES[of.name]:
        given = _rows(tmp_path / kind, kind, 1).read_text().splitlines()
        rows += [json.loads(line) for line in given]
        for row in rows[-2:]:
            row[f"{kind}s"] = [f"{kind}/{name}" for name in row[f"{kind}s"]]
        rows.append(text)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    single = of.sequences(media_plan(path, packing=False, shuffle=False))
    (packed,) = of.sequences(media_plan(path, shuffle=False))
    assert len(single) == len(packed.lengths) == len(rows)
    with torch.no_grad():
        found = batch_logprobs(of.model, collate([packed], 0))[0]
        together = batch_logprobs(of.model, collate(single, 0))
    start = 0
    for row, one in enumerate(single):
        alone, length = of.alone(one)[:-1], len(one.input_ids)
        assert np.array_equal(packed.input_ids[start : start + length], one.input_ids)
        assert (found[start : start + length - 1] - alone).abs().max() < 2e-5
        assert (together[row, : length - 1] - alone).abs().max() < 2e-5
        start += length


def test_a_filler_gives_each_batch_every_kind_and_counts_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"query": "Who?", "response": "one two three"}] * 2)
    for name, kinds in TAKES.items():
        of = family(name, tmp_path_factory)
        plan = media_plan(text, media={"kinds": kinds, "max_frames": 4})
        filler = media_filler(of.encoder(plan), kinds)
        assert filler is not None
        plain = of.sequences(plan)
        rich = [
            one
            for kind in kinds
            for one in of.sequences(media_plan(_rows(tmp_path / f"{name}-{kind}", kind, 1), shuffle=False))
        ]
        names = set(collate(rich, 0).media)
        for sequences in ([], plain, rich[:1], rich):
            batch = collate(sequences, 0, filler=filler)
            bare = collate(sequences, 0)
            assert set(batch.media) == names
            assert batch.weights_BT.sum() == bare.weights_BT.sum()
            with torch.no_grad():
                filled, without = (batch_logprobs(of.model, one) * one.weights_BT for one in (batch, bare))
            assert torch.isfinite(filled).all()
            assert float(filled.sum()) == pytest.approx(float(without.sum()), rel=1e-6)
        assert len(collate(rich, 0, filler=filler).input_ids_BT) == len(rich), "nothing is missing"


def test_a_filled_row_that_counts_nothing_has_no_gradient(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    of = family("llava", tmp_path_factory)
    plan = media_plan(
        write_jsonl(tmp_path / "text.jsonl", [{"query": "Who?", "response": "one two"}]), media={"kinds": ("image",)}
    )
    filler = media_filler(of.encoder(plan), ("image",))
    batch = collate(of.sequences(plan), 0, filler=filler)
    (batch_logprobs(of.model, batch) * batch.weights_BT).sum().backward()
    tower = [p.grad for name, p in of.model.named_parameters() if "vision" in name and p.grad is not None]
    assert tower, "the tower took part, or other ranks would wait"
    assert all(float(grad.abs().max()) == 0 for grad in tower)
    of.model.zero_grad(set_to_none=True)


def test_what_prepare_writes_is_what_collate_reads(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    of = family("qwen2_5_vl", tmp_path_factory)
    plan = media_plan(_rows(tmp_path / "rows", "image", 1), shuffle=False)
    table = of.table(plan)
    assert packed_sequences(table)[0].media[0]["pixel_values"].dtype == np.float32
    again = of.table(plan)
    assert table.equals(again), "a chunk is a pure function of the plan"
    assert isinstance(packed_sequences(table)[0], PackedSequence)
