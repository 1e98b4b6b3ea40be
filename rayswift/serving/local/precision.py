"""The type that a model computes in on a CPU: that of its weights, or float32 where the processor has none for it.

torch multiplies half types that the processor does not know by plain loops, a row at a time: on a CPU with AVX2 alone a
prompt of 512 tokens took 6.5 times as long in bfloat16 as in float32, and eight answers together twice as long.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import psutil
import torch

from rayswift.models.loading import load_config, local_folder

_NEEDS = {torch.bfloat16: "avx512_bw", torch.float16: "avx512_fp16"}
"""What oneDNN must find in an x86 processor to multiply this type (torch 2.13: use_mkldnn_bf16_matmul, _fp16_)."""
MOST_OF_MEMORY = 0.5
_CGROUP = Path("/sys/fs/cgroup")
_log = logging.getLogger("rayswift.serving")


def dtype_for_cpu(path: str) -> torch.dtype | None:
    """float32 for a model whose stored type this CPU has no arithmetic for; None: as stored.

    So also where float32 would take more than half of the memory that is left, which is told (other replicas may load
    at the same time), and for quantized weights, of which the files do not say what they take unpacked.
    """
    folder = local_folder(path)
    config = load_config(str(folder))
    stored = config.get_text_config().dtype or config.dtype
    is_quantized = getattr(config, "quantization_config", None) is not None
    if not isinstance(stored, torch.dtype) or stored not in _NEEDS or is_quantized or is_known(stored):
        return None
    name = str(stored).removeprefix("torch.")
    size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
    needed, room = size * torch.float32.itemsize // stored.itemsize, memory_left()
    if needed > MOST_OF_MEMORY * room:
        _log.warning("%s computes in %s, which this CPU has no arithmetic for: its prompts are read several times more "
                     "slowly than in float32, which takes %.1f GiB (%.1f are left)", path, name, needed / 2**30,
                     room / 2**30)  # fmt: skip
        return None
    _log.info("%s computes in float32, since this CPU has no arithmetic for %s (%.1f GiB; dtype %s keeps it)", path,
              name, needed / 2**30, name)  # fmt: skip
    return torch.float32


def is_known(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies a half type by instructions of its own. Other than x86 is taken to do so."""
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or bool(found.get(_NEEDS[dtype], False))


def memory_left() -> int:
    """Bytes that may still be taken, as the machine and the limit of its container (control groups, version 2) say."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        found = re.search(r"^inactive_file (\d+)$", (_CGROUP / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no control groups, or "max"
        return available
    cached = int(found[1]) if found else 0  # files that are let go where memory is wanted
    return max(0, min(available, limit - used + cached))
