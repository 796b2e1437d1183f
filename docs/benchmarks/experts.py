"""Prefill time and bytes of experts cut over TP and of experts divided over all ranks.

    python docs/benchmarks/experts.py [--tokens 4096 --tokens 16384] [--repeats 3]

Four CPU ranks on this machine, a random model of 69 million parameters in float32: 2 layers, hidden
512, 8 query and 4 KV heads of 64, 64 experts of width 256, 4 for each token. The ways take turns;
times are medians of the slowest rank.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext, collectives, launch
from qwen3cp.weights import make_random

TOPOLOGIES = [(4, 1), (2, 2)]
WAYS: dict[str, dict[str, Any]] = {
    "tp": {},
    "ep, all-gather": {"exchange": "all_gather"},
    "ep, all-to-all": {"exchange": "all_to_all"},
    "ep, all-to-all, int8 rows": {"exchange": "all_to_all", "exchange_rows": "int8"},
}
SIZES: dict[str, Any] = dict(
    vocab_size=1024,
    hidden_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    num_experts=64,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    max_position_embeddings=65536,
)


def main(
    tokens: list[int] = typer.Option([4096, 16384], help="Prompt lengths."),  # noqa: B008
    repeats: int = typer.Option(3, help="Of each measurement, after one that does not count."),
    rank_of: str | None = typer.Option(None, hidden=True, help="What the ranks are told."),
) -> None:
    if rank_of is not None:
        folder, topology = rank_of.split(":")
        cp, tp = (int(n) for n in topology.split("x"))
        measure(Path(folder), cp, tp, tokens, repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_random(Qwen3MoeConfig(**SIZES), Path(folder) / "model", dtype="float32", seed=0)
        for cp, tp in TOPOLOGIES:
            lengths = [f"--tokens={n}" for n in tokens]
            arguments = [*lengths, f"--repeats={repeats}", f"--rank-of={folder}:{cp}x{tp}"]
            if code := launch.start_ranks(cp * tp, [__file__, *arguments]):
                sys.exit(code)
        rows = [
            row
            for cp, tp in TOPOLOGIES
            for row in json.loads((Path(folder) / f"{cp}x{tp}.json").read_text())
        ]
    table = Table("cp x tp", "tokens", "experts", "ms", "against tp", "MiB moved for experts")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=110).print(table)


def measure(folder: Path, cp: int, tp: int, lengths: list[int], repeats: int) -> None:
    """On every rank: all ways of one topology."""
    models = {
        moe: CPQwen3MoeForCausalLM.from_pretrained(
            folder / "model",
            parallel_context=ParallelContext.from_world(cp, tp, moe=moe, backend="gloo"),
            device="cpu",
        )
        for moe in ("tp", "ep")
    }
    rows = []
    for length in lengths:
        prompt = torch.randint(0, 1024, (length,), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        moved = {}
        for _ in range(1 + repeats):
            for way, settings in WAYS.items():
                model = models[way[:2]]
                with model.parallel_context.communication(CommConfig(**settings)):
                    took, moved[way] = prefill(model, prompt)
                seconds[way].append(took)
        medians = {way: statistics.median(times[1:]) for way, times in seconds.items()}
        rows += [
            (
                f"{cp} x {tp}",
                length,
                way,
                f"{medians[way] * 1e3:.0f}",
                f"{medians[way] / medians['tp']:.2f}",
                f"{moved[way] / 2**20:.1f}",
            )
            for way in WAYS
        ]
    if dist.get_rank() == 0:
        (folder / f"{cp}x{tp}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def prefill(model: CPQwen3MoeForCausalLM, prompt: torch.Tensor) -> tuple[float, int]:
    """(seconds of the slowest rank, bytes that rank 0 receives to sum or exchange the experts)"""
    cache = model.new_kv_cache(max_tokens=len(prompt))
    sequence = cache.new_sequence()
    dist.barrier()
    start = time.perf_counter()
    with collectives.record_communication() as log:
        model.prefill(cache, [sequence], [prompt])
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    sums = [r for r in log.records if r.kind == "all_reduce"]
    if model.parallel_context.moe == "tp":  # of two sums a layer the second
        return float(seconds), sum(r.bytes for r in sums) // 2
    return float(seconds), log.by_kind["expert_exchange"]


if __name__ == "__main__":
    typer.run(main)
