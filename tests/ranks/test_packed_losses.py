"""The loss of rows packed together is that of the same rows one by one, for every architecture that packs.

Compared with each document fed alone to the Hugging Face model, with Hugging Face's labels and `F.cross_entropy`: no
batch, mask, position or loss of RaySwift's. An architecture that cannot pack is refused, by the planner and by the
check that every run makes, and its packed loss is another: no refusal is idle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rayswift import plugins
from rayswift.errors import ConfigError
from rayswift.methods.sft import Sft
from rayswift.planning.layout import Layout, Seat
from rayswift.training.self_check import plain, refuse_leaking_packing, refuse_other_losses
from tests.architecture_cases import ARCHITECTURES, tiny_architecture
from tests.architecture_cells import Column, refused
from tests.engine_cases import Document, documents, share

PACKED = Column(Layout(), packing=True)
METHOD = Sft(Sft.Config())
BOUND, LEAK = 1e-6, 1e-3  # nats per trained token; measured: at most 7e-8, and 0.003 to 0.3


def loss_alone(model: Any, rows: list[Document]) -> float:
    """The mean loss of a trained token; a token that is not trained has the label -100."""
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids)
        labels = torch.where(torch.from_numpy(row.mask) > 0, ids, -100)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].double()
        total += float(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def loss_packed(engine: Any, rows: list[Document]) -> float:
    """The same from sequences that several documents share."""
    batches = share(rows, packing=True, micro_batches=2)
    assert sum(len(batch.input_ids_BT) for batch in batches) < len(rows), "several documents share a sequence"
    total = sum(float(METHOD.loss(engine.forward(batch).double(), batch)) for batch in batches)
    return total / sum(float(METHOD.count(batch)) for batch in batches)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_have_the_same_loss_packed_and_alone(architecture: str) -> None:
    rows = documents(11, seed=5)
    model = tiny_architecture(architecture).eval()
    wanted = loss_alone(model, rows)
    engine = plugins.load("parallel.engines", "fsdp2")(model, PACKED.job(), Seat(Layout()), torch.device("cpu"))
    known = refused(architecture, PACKED)
    difference = abs(loss_packed(engine, rows) - wanted)
    if known is None:
        refuse_leaking_packing(engine, PACKED.job())
        assert refuse_other_losses(engine, PACKED.job(), [plain(row.ids) for row in rows]) <= BOUND
        assert difference <= BOUND
        return
    assert known.reason.startswith("data.packing=True has no way to pack rows of")
    assert difference > LEAK, "it could be packed"
    with pytest.raises(ConfigError, match="gives rows other losses than they have alone"):
        refuse_other_losses(engine, PACKED.job(), [plain(row.ids) for row in rows])
    if architecture != "llama4_text":  # its chunks begin where they begin, whatever the tokens before
        with pytest.raises(ConfigError, match="lets packed documents see each other"):
            refuse_leaking_packing(engine, PACKED.job())
