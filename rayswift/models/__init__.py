"""Hugging Face models: loading them, adapters on them, random ones. Knows nothing of how they are trained."""

from __future__ import annotations

import logging

# transformers, peft and accelerate import these where they are installed, used or not, and they tell what nobody asked.
_UNASKED = ("Failed to load CPU gemm_4bit_forward", "Setting accelerator to CPU")
for _name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed"):
    logging.getLogger(_name).addFilter(lambda record: not str(record.msg).startswith(_UNASKED))
