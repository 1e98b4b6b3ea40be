"""Run directories with one checkpoint, made without training, for what reads them."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from rayswift.config.job import AdapterSpec, Job
from rayswift.export import pipeline
from rayswift.models.adapters import add_lora, load_base
from rayswift.models.folder import rendering_sha256
from rayswift.training import checkpoint

export = partial(pipeline.export, engine="none")
"""Proved by what transformers reads back alone: engines are asked where that is what is tested."""


def shake(tensors: dict[str, torch.Tensor], size: float) -> None:
    """What training does, in one step and without data."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {t.data_ptr(): t for t in tensors.values()}.values():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))


def write_run(
    run: Path, base: Path, weights: dict[str, torch.Tensor], adapter: AdapterSpec | None, **model: str
) -> Job:
    """A run directory with one checkpoint, as a training run leaves it. `model` are keys of the job's."""
    job = Job.model_validate(
        {
            "name": run.name,
            "output": str(run.parent),
            "model": {"path": str(base), **model},
            "adapter": adapter and adapter.model_dump(),
            "data": {"train": [{"path": "rows.jsonl"}]},
        }
    )
    folder = run / checkpoint.folder_name(7)
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
        dcp.save({"model": weights}, storage_writer=checkpoint.storage_writer(str(folder)), no_dist=True)
    where = checkpoint.RunDir(str(folder))
    files = {
        path.name: checkpoint.FileEntry(size=path.stat().st_size, sha256=checkpoint.sha256(where, path.name))
        for path in folder.iterdir()
    }
    manifest = checkpoint.CheckpointManifest(
        step=7, finished=True, job_hash=job.job_hash(), job=job.model_dump(mode="json"), layout={}, engine="fsdp2",
        ledger={}, seed=0, versions={}, files=files, rendered_with=rendering_sha256(base),
    )  # fmt: skip
    (folder / checkpoint.MANIFEST).write_text(manifest.model_dump_json())
    return job


def write_lora_run(run: Path, base: Path, size: float) -> Job:
    """`write_run` of a LoRA on a base, shaken by `size`."""
    spec = AdapterSpec(rank=4)
    model = add_lora(load_base(str(base)), spec, seed=0)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    shake(weights, size)
    return write_run(run, base, weights, spec)
