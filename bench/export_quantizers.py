"""What each quantizer makes of a trained model: size, perplexity on rows held out, and speed in a serving engine.

    make quickstart && python bench/export_quantizers.py [--source quickstart/runs/sft] [--group-size 32]

Each export is the command a user would give, with its own bounds; one that does not keep to them is told as such. The
engine is the one that `--engine auto` takes: `local` for what vLLM has no kernel for (gptq and awq on a CPU without
AVX-512) and where there is no vLLM. Figures of two engines say nothing of two quantizers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QUANTIZERS = ("none", "gptq", "awq", "int8", "fp8")


def exported(source: str, out: Path, quantizer: str, group_size: int) -> dict[str, Any] | str:
    """The manifest of an export, or why there is none."""
    group = ["--group-size", str(group_size)] if quantizer in ("gptq", "awq") else []
    command = [
        sys.executable,
        "-m",
        "rayswift.cli",
        "export",
        source,
        str(out),
        "--quantizer",
        quantizer,
        *group,
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"exit {done.returncode}: {done.stderr.strip().splitlines()[-1]}"
    manifest: dict[str, Any] = json.loads(done.stdout)
    return manifest


def row(quantizer: str, manifest: dict[str, Any]) -> str:
    size = sum(entry["size"] for name, entry in manifest["files"].items() if name.endswith(".safetensors"))
    held_out, served = manifest["verify"]["held_out"], manifest["verify"]["served"]
    judged = (
        f"x{held_out['perplexity_ratio']:.4f}  {held_out['top1_agreement']:9.1%}" if held_out else f"{'-':>7}  {'-':>9}"
    )
    speed = (
        f"{served['mean_abs']:10.2g}  {served['greedy_regret']:6.2g}  {served['tokens_per_second']:8.0f}  "
        f"{served['engine']} {served['version']}"
        if served
        else f"{'-':>10}  {'-':>6}  {'-':>8}  -"
    )
    return f"{quantizer:9}  {size / 2**20:8.2f}  {judged}  {speed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="quickstart/runs/sft", help="a run, a checkpoint or a model folder")
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    if not Path(args.source).is_dir():
        sys.exit(f"{args.source} is no folder: make quickstart trains it, --source names another")
    print("engine off: its log-probabilities, on average, from transformers'; regret: how much less likely its greedy")
    print("tokens are than the likeliest; tokens/s at concurrency 8")
    print("quantizer       MiB   perplexity  same token  engine off  regret  tokens/s  engine")
    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as place:
        for quantizer in QUANTIZERS:
            found = exported(args.source, Path(place) / quantizer, quantizer, args.group_size)
            print(row(quantizer, found) if isinstance(found, dict) else f"{quantizer:9}  {found}", flush=True)


if __name__ == "__main__":
    main()
