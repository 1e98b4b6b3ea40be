"""Memory of calibrating a quantizer: peak of the whole export over the weights, by blocks, rows and their length.

Layer by layer means that activations are kept of one block at a time: four times the blocks must cost no more than
their own weights (the model, its copy in the dtype of the export, what is written), more tokens only their hidden
states, two bytes for each of `hidden` and each token, and the tables of rotary positions, four for each of a head's 64.
No more for longer rows: a mask of each row would be two bytes for the square of its length. Of the seconds, which grow
with the tokens, half a minute are imports; a CPU without AVX-512 multiplies bfloat16 at a tenth of float32's speed.

    python bench/export_memory.py [--hidden 128] [--quantizer gptq] [--cases 4x64x256 16x64x256 4x256x256 4x64x1024]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

# Blocks, rows, tokens of a row.
CASES = ["4x64x256", "16x64x256", "4x256x256", "4x64x1024"]


def make_model(folder: Path, hidden: int, layers: int, text: Path) -> None:
    from rayswift.models.init import init_model

    init_model(
        str(folder), arch="qwen3", layers=layers, hidden_size=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        vocab_size=4096, train_tokenizer_files=[str(text)], seed=0,
    )  # fmt: skip


def peak_mib(base: Path, out: Path, rows: Path, quantizer: str, num_rows: int, length: int) -> float:
    """MiB of the largest process of one export."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    group = ["--group-size", "32"] if quantizer in ("gptq", "awq") else []
    command = [sys.executable, "-m", "rayswift.cli", "export", str(base), str(out), "--quantizer", quantizer, *group,
               "--calibration", str(rows), "--calibration-rows", str(num_rows), "--held-out-rows", "16",
               "--max-length", str(length), "--max-perplexity", "100", "--min-agreement", "0", "--engine", "none",
               "--force"]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True,
                          env=os.environ | variables)  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return int(done.stdout.split()[-1]) / 1024


def num_tokens(out: Path) -> int:
    """Of the rows that an export was calibrated on."""
    from rayswift.export import manifest

    quantization = manifest.read(str(out)).quantization
    assert quantization is not None
    assert quantization.calibration is not None
    return quantization.calibration.num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--quantizer", default="gptq", choices=("gptq", "awq", "int8"))  # fp8 reads no rows
    parser.add_argument("--cases", nargs="+", default=CASES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as name:
        place = Path(name)
        (text := place / "text.txt").write_text("\n".join(topics[one] for one in sorted(topics)))
        words = text.read_text().split()
        rows = place / "rows.jsonl"
        cut = [" ".join(words[i * 150 % len(words) :][:1200]) for i in range(600)]
        rows.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(cut)))
        print(f"{args.quantizer}, hidden {args.hidden}, float32 before and bfloat16 after; MiB")
        print(f"{'blocks':>6} {'rows':>5} {'tokens':>7} {'weights':>8} {'states':>7} {'peak':>6} {'peak - weights':>15}"
              f" {'s':>5}")  # fmt: skip
        for case in args.cases:
            layers, num_rows, length = map(int, case.split("x"))
            base, out = place / f"base-{layers}", place / "out"
            if not base.exists():
                make_model(base, args.hidden, layers, text)
            began = time.perf_counter()
            peak = peak_mib(base, out, rows, args.quantizer, num_rows, length)
            seconds = time.perf_counter() - began
            tokens = num_tokens(out)
            weights = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20
            states = tokens * args.hidden * 2 / 2**20
            print(f"{layers:6} {num_rows:5} {tokens:7} {weights:8.0f} {states:7.0f} {peak:6.0f} {peak - weights:15.0f}"
                  f" {seconds:5.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
