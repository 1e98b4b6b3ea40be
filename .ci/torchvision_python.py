"""Makes torchvision's Python importable beside the CPU's torch; its operators, built for CUDA, do not load there.

vLLM's models of images import processors of transformers that import torchvision; nothing we run calls an operator.
torchvision 0.28 registers the shapes of some whether they are there or not: here only where they are.
"""

import importlib.util
from pathlib import Path

found = importlib.util.find_spec("torchvision")
assert found is not None, "torchvision is not installed"
assert found.origin is not None
file = Path(found.origin).parent / "_meta_registrations.py"
CALL, GUARDED = "@torch.library.register_fake(", "@_register_fake("
GUARD = """

def _register_fake(name):  # changed by .ci/torchvision_python.py
    return torch.library.register_fake(name) if torchvision.extension._has_ops() else lambda function: function

"""
text = file.read_text()
if CALL in text:
    head, first, rest = text.partition(CALL)
    file.write_text(head + GUARD.lstrip("\n") + "\n" + (first + rest).replace(CALL, GUARDED))
    print(f"{file}: operators that are not there are not registered")
