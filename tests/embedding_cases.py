"""Tiny folders of embedding models, made from config as sentence-transformers writes them; vectors by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rayswift.models.tokenizer import train_tokenizer

TEXTS = ("import os", "What is a module?", "The quick brown fox jumps over the lazy dog, and is not seen again.", "a")
_PARTS = "sentence_transformers.models"
_SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Heads of 32 numbers, for which vLLM's attention on a CPU has a kernel."""
MAX_TOKENS = 48


def make_bert(folder: Path, text: Path, *, mode: str = "mean_tokens", normalize: bool = True, **config: Any) -> Path:
    """A BERT as of the MiniLM family: reads both ways, without the pooler that its class would have."""
    tokenizer = _word_pieces(text)
    made = tf.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **_SIZES, **config)
    torch.manual_seed(0)
    model = tf.BertModel(made, add_pooling_layer=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_modules(folder, {f"pooling_mode_{mode}": True, "word_embedding_dimension": 64}, normalize=normalize)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": MAX_TOKENS}))
    return folder


def make_qwen3(folder: Path, text: Path, **config: Any) -> Path:
    """A Qwen3 as of Qwen3-Embedding: a causal model, whose last token's state is the vector."""
    tokenizer = train_tokenizer([text], vocab_size=512, max_length=MAX_TOKENS)
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))]
    )
    made = tf.Qwen3Config(
        vocab_size=512, num_key_value_heads=1, head_dim=32, max_position_embeddings=MAX_TOKENS,
        pad_token_id=0, bos_token_id=None, eos_token_id=2, **_SIZES, **config,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.Qwen3ForCausalLM(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_modules(folder, {"pooling_mode": "lasttoken"}, normalize=True)
    return folder


def write_modules(folder: Path, pooling: dict[str, Any], *, normalize: bool) -> None:
    named = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_PARTS}.{part}"}
        for number, (path, part) in enumerate(named)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))


def expected(
    folder: Path, texts: Sequence[str], mode: str, *, normalize: bool = True, num_dims: int | None = None
) -> np.ndarray:
    """Vectors by transformers alone, a text at a time."""
    tokenizer, model = tf.AutoTokenizer.from_pretrained(folder), tf.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        with torch.no_grad():
            states_TD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector_D = {"cls": states_TD[0], "mean": states_TD.mean(0), "last": states_TD[-1]}[mode][:num_dims]
        found.append((vector_D / vector_D.norm() if normalize else vector_D).numpy())
    return np.stack(found)


def _word_pieces(text: Path) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train([str(text)], trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
