"""Memory of calibrating a quantizer: peak of the whole export over the weights, by number of blocks and of rows.

Layer by layer means that activations are kept of one block at a time: four times the blocks must cost no more than
their own weights (the model, its copy in the dtype of the export, what is written), more rows only their hidden states.

    python bench/export_memory.py [--hidden 512] [--quantizer gptq]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

_LENGTH = 256


def make_model(folder: Path, hidden: int, layers: int, text: Path) -> None:
    from rayswift.models.init import init_model

    init_model(
        str(folder), arch="qwen3", layers=layers, hidden_size=hidden, heads=hidden // 64, kv_heads=hidden // 64,
        vocab_size=4096, train_tokenizer_files=[str(text)], seed=0,
    )  # fmt: skip


def peak_mib(base: Path, out: Path, rows: Path, quantizer: str, num_rows: int) -> float:
    """MiB of the largest process of one export."""
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    group = ["--group-size", "32"] if quantizer in ("gptq", "awq") else []
    command = [sys.executable, "-m", "rayswift.cli", "export", str(base), str(out), "--quantizer", quantizer, *group,
               "--calibration", str(rows), "--calibration-rows", str(num_rows), "--held-out-rows", "16",
               "--max-length", str(_LENGTH), "--max-perplexity", "100", "--min-agreement", "0", "--engine", "none",
               "--force"]  # fmt: skip
    variables = {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True,
                          env=os.environ | variables)  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return int(done.stdout.split()[-1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--quantizer", default="gptq")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rayswift-bench-") as name:
        place = Path(name)
        (text := place / "text.txt").write_text("\n".join(topics[one] for one in sorted(topics)))
        words = text.read_text().split()
        rows = place / "rows.jsonl"
        cut = [" ".join(words[i * 150 % len(words) :][:300]) for i in range(600)]
        rows.write_text("".join(json.dumps({"text": f"{i} {line}"}) + "\n" for i, line in enumerate(cut)))
        print(f"{args.quantizer}, hidden {args.hidden}, rows of {_LENGTH} tokens, float32; MiB")
        print(f"{'blocks':>7} {'rows':>5} {'weights':>8} {'peak':>7} {'peak - weights':>15}")
        for layers, num_rows in ((4, 64), (16, 64), (16, 256)):
            base = place / f"base-{layers}"
            if not base.exists():
                make_model(base, args.hidden, layers, text)
            weights = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**20
            peak = peak_mib(base, place / "out", rows, args.quantizer, num_rows)
            print(f"{layers:7} {num_rows:5} {weights:8.0f} {peak:7.0f} {peak - weights:15.0f}", flush=True)


if __name__ == "__main__":
    main()
