"""Load time, bytes and memory, beside transformers' from_pretrained.

    python docs/benchmarks/load.py --hidden 64 --expert-width 32 --repeats 5

Writes a random checkpoint with as many tensors as Qwen3-30B-A3B (48 layers, 128 experts: 18,867)
and small sizes, reads it once into the system's cache, and then loads it in turn in every way, each
time in new processes. Shows the median and the fastest of each way.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

WAYS: dict[str, tuple[int, int, Literal["tp", "ep"], bool]] = {
    "transformers": (1, 1, "tp", False),
    "tp=1": (1, 1, "tp", False),
    "tp=2, one rank alone": (1, 2, "tp", False),
    "tp=2, both ranks": (1, 2, "tp", False),
    "tp=2 moe=ep, both ranks": (1, 2, "ep", False),
    "cp=2, each reads": (2, 1, "tp", False),
    "cp=2, share_reads": (2, 1, "tp", True),
}


def anonymous_bytes() -> int:
    """Of this process's resident memory, what is not of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise OSError("this system does not tell RssAnon")


def bytes_from_disk() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise OSError("this system does not tell read_bytes")


def load(way: str, folder: str) -> dict:
    """In a process of its own, or in one of several ranks."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

    cp, tp, moe, share = WAYS[way]
    ctx = ParallelContext.single()
    if "alone" in way:
        ctx = ParallelContext.describe(0, cp_size=cp, tp_size=tp, moe=moe)
    elif cp * tp > 1:
        ctx = ParallelContext.from_world(cp, tp, moe=moe)
    before, peak, ended = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    disk, start = bytes_from_disk(), time.perf_counter()
    if way == "transformers":
        Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        read = held = 0
    else:
        model = CPQwen3MoeForCausalLM.from_pretrained(
            folder, parallel_context=ctx, dtype=torch.bfloat16, share_reads=share
        )
        report = model.load_report
        assert report is not None
        read, held = report.bytes_read, report.parameter_bytes
    seconds = time.perf_counter() - start
    ended.set()
    thread.join()
    return {
        "seconds": seconds,
        "bytes read": read,
        "parameter bytes": held,
        "anonymous bytes": max(peak, anonymous_bytes()) - before,
        "bytes from disk": bytes_from_disk() - disk,
    }


def measure(way: str, folder: str, port: int) -> list[dict]:
    """One load; what each rank tells."""
    cp, tp, _, _ = WAYS[way]
    size = 1 if "alone" in way else cp * tp
    ranks = []
    for rank in range(size):
        env = dict(os.environ, OMP_NUM_THREADS=str(max(1, (os.cpu_count() or 1) // size)))
        if size > 1:
            env |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--load", way, folder]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{way}: a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def evict(folder: str) -> None:
    """Drops the files from the system's cache."""
    os.sync()
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--cold", action="store_true", help="drop the files from the cache first")
    parser.add_argument("--folder", help="an existing checkpoint, instead of a random one")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(*options.load)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            from transformers import Qwen3MoeConfig

            from qwen3cp.weights import make_random

            sizes: dict[str, Any] = dict(
                vocab_size=1024,
                hidden_size=options.hidden,
                moe_intermediate_size=options.expert_width,
                num_hidden_layers=48,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=64,
                num_experts=128,
                num_experts_per_tok=8,
            )
            folder = str(Path(temporary) / "checkpoint")
            plan = make_random(Qwen3MoeConfig(**sizes), Path(folder), max_shard_size="300MB")
            print(f"{plan.num_bytes / 1e9:.3f} GB in {len(plan.files)} files")
        for path in Path(folder).glob("*.safetensors"):
            path.read_bytes()
        results: dict[str, list[list[dict]]] = {way: [] for way in options.ways}
        for repeat in range(options.repeats):
            for i, way in enumerate(options.ways):
                if options.cold:
                    evict(folder)
                results[way].append(measure(way, folder, 29500 + 100 * (repeat % 5) + i))
        print("| way | median s | fastest s | read GB | parameters GB | anonymous GB | disk GB |")
        print("|---|---|---|---|---|---|---|")
        for way, loads in results.items():
            times = [max(rank["seconds"] for rank in each) for each in loads]
            numbers = [statistics.median(times), min(times)] + [
                max(rank[name] for each in loads for rank in each) / 1e9
                for name in ("bytes read", "parameter bytes", "anonymous bytes")
            ]
            disk = max(sum(rank["bytes from disk"] for rank in each) for each in loads) / 1e9
            cells = [f"{n:.3f}" if n else "" for n in (*numbers, disk)]
            print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
