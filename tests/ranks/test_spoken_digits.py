"""A small model with a Whisper encoder learns to hear: real spoken digits, by the same path as images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.whisper.modeling_whisper import sinusoids

from rayswift.config.job import ModelSpec
from rayswift.data.blocks import packed_sequences
from rayswift.data.collate import collate
from rayswift.data.prepare import prepare_chunk
from rayswift.models.loading import load_model, load_tokenizer
from rayswift.training import checkpoint
from rayswift.training.media import media_encoder
from rayswift.training.order import WorkOrder
from tests.multimodal_models import TEXT, token_id, tokenizer_with, write_model
from tests.ranks.test_run import figures, order_of, train

HIDDEN, MEL_BINS = 64, 40


def make_listener(folder: Path) -> Path:
    """A Qwen2-Audio whose tower starts as Whisper's does: sinusoids for positions, convolutions as torch makes them."""
    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = tokenizer_with(folder, special, audio="'<|audio_bos|><|AUDIO|><|audio_eos|>'")
    text = {**TEXT, "hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": 1}
    config = tf.Qwen2AudioConfig(
        text_config={"model_type": "qwen2", **text},
        audio_config={
            "model_type": "qwen2_audio_encoder", "max_source_positions": 150, "num_mel_bins": MEL_BINS,
            "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 4 * HIDDEN, "d_model": HIDDEN,
        },
        audio_token_index=token_id(tokenizer, "<|AUDIO|>"),
    )  # fmt: skip
    audio = tf.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=3, n_fft=400)
    write_model(folder, config, tokenizer, 0, {"audio": audio}, {"processor_class": "Qwen2AudioProcessor"})
    model = load_model(ModelSpec(path=str(folder)))
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.reset_parameters()
            module.weight.data *= 3
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    positions = model.model.audio_tower.embed_positions.weight
    positions.data.copy_(sinusoids(*positions.shape) * 0.3)
    model.save_pretrained(folder)
    return folder


def write_rows(folder: Path, recordings: Path) -> tuple[Path, Path]:
    """What is trained on and what is held out: by the set's own convention recordings 0 to 4 of each speaker."""
    rows: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(recordings.glob("*.wav")):
        digit, _, index = path.stem.split("_")
        messages = [{"role": "user", "content": "<audio>Which digit?"}, {"role": "assistant", "content": digit}]
        rows[int(index) < 5].append(json.dumps({"messages": messages, "audios": [path.name]}))
    for held_out, name in ((False, "train.jsonl"), (True, "held_out.jsonl")):
        (folder / name).write_text("\n".join(rows[held_out]) + "\n")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def accuracy(order: WorkOrder, state: dict[str, torch.Tensor]) -> float:
    """The share of held-out recordings whose greedy answer is right in every token."""
    stream = order.eval_stream
    assert stream is not None
    stream = replace(stream, settings=replace(stream.settings, packing=False))
    path = order.job.model.path
    model, tokenizer = load_model(ModelSpec(path=path)), load_tokenizer(path)
    model.load_state_dict(state)
    model.eval()
    encoder = media_encoder(path, stream.settings)
    right = []
    for number in range(stream.num_chunks):
        batch = collate(packed_sequences(prepare_chunk(stream, number, tokenizer, encoder)), 0)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False, **batch.media
            ).logits
        right.append(((logits.argmax(-1) == batch.targets_BT) | (batch.weights_BT == 0)).all(1))
    return float(torch.cat(right).float().mean())


@pytest.mark.long
def test_spoken_digits_are_learned(tmp_path: Path, shared_data: Path) -> None:
    """Measured: 72% of 300 held-out recordings after 25 epochs of 300 others; chance is 10%."""
    model = make_listener(tmp_path / "model")
    trained, held_out = write_rows(tmp_path, shared_data / "fsdd")
    order = order_of(
        "heard", tmp_path, model, trained, ranks=1,
        **{
            "data.eval": [{"path": str(held_out)}], "data.max_length": 256,
            "data.media.folder": str(shared_data / "fsdd"),
            "data.chunk_rows": 64, "train.global_batch_size": 2, "train.micro_batch_size": 2, "train.lr": 1.5e-3,
            "train.optimizer": "adamw", "train.betas": [0.9, 0.95], "train.weight_decay": 0.05,
            "train.warmup_steps": 20, "train.epochs": 25, "train.save_every": None, "train.eval_every": None,
        },
    )  # fmt: skip
    untrained = load_model(ModelSpec(path=str(model))).state_dict()
    assert accuracy(order, untrained) <= 0.2
    ended = train(order)
    assert ended.ledger.rows_trained == 25 * 300
    assert figures(order, "eval_loss")[-1] < 0.5 * figures(order, "eval_loss")[0]
    weights = dict(checkpoint.load_weights(checkpoint.newest(order.job.run_dir)))
    assert accuracy(order, untrained | weights) >= 0.6
