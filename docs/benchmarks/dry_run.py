"""How exact a dry run's memory is, and what the full-size models need.

    python docs/benchmarks/dry_run.py [--output FILE.json]

Runs a random model of 155 M parameters on this CPU, in a new process for each workload, with the
planner's counter on: the live tensors that it sees, and how far the resident memory grew, beside
what the dry run says. Then plans the full-size models. The tables of docs/dry-run.md are made from
dry_run.json beside this file. Takes a minute or two.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import typer
from transformers import Qwen3MoeConfig

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.planner.cost import fit
from qwen3cp.planner.counter import OperatorCounter
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import HARDWARE
from qwen3cp.planner.models import KNOWN_MODELS, read_model

RESULTS = Path(__file__).with_suffix(".json")
WORKLOADS = [(1024, 1024), (2048, 2048), (2048, 512)]
"""(prompt, chunk) of the random model."""
SMALL, LARGE = KNOWN_MODELS
PLANS: list[tuple[str, int, int, int, Any, int]] = [
    (SMALL, 262144, 1, 4, "tp", 32768),
    (SMALL, 262144, 2, 2, "tp", 32768),
    (SMALL, 262144, 4, 1, "tp", 32768),
    (SMALL, 262144, 4, 1, "ep", 32768),
    (SMALL, 1048576, 1, 4, "tp", 32768),
    (SMALL, 1048576, 2, 2, "tp", 32768),
    (SMALL, 1048576, 2, 4, "ep", 32768),
    (SMALL, 1048576, 4, 4, "ep", 32768),
    (LARGE, 131072, 2, 4, "ep", 32768),
    (LARGE, 131072, 4, 4, "tp", 32768),
    (LARGE, 131072, 4, 4, "ep", 32768),
    (LARGE, 131072, 2, 8, "ep", 131072),
]
"""(model, prompt, cp, tp, experts, chunk) on dies of an A3."""
GIB = 1 << 30


def random_config() -> Qwen3MoeConfig:
    return cast(Any, Qwen3MoeConfig)(
        vocab_size=16384,
        hidden_size=1024,
        moe_intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    )


def measure(prompt: int, chunk: int) -> dict[str, Any]:
    """In a process of its own, whose memory nothing has grown yet."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CPQwen3MoeForCausalLM(random_config(), parallel_context=ParallelContext.single())
    cache = model.new_kv_cache(max_tokens=prompt)
    layers = [cache.layer(i) for i in range(cache.num_layers)]
    for layer in layers:
        layer.rows.fill_(0)  # so that its memory is resident before
    sequence = cache.new_sequence()
    rows = [layer.rows for layer in layers]
    held = [*model.parameters(), *model.buffers(), layers[0].causal_mask, *rows]
    counter = OperatorCounter(model.eval(), held)
    ids = torch.randint(0, 16384, (prompt,))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    for start in range(0, prompt, chunk):
        with counter:
            model.prefill(cache, [sequence], [ids[start : start + chunk]])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    planned = dry_run(
        random_config(), prompt=prompt, chunk=chunk, dtype=torch.float32, decode=False
    )
    return {
        "prompt": prompt,
        "chunk": chunk,
        "planned_bytes": planned.ranks[0].peak_activation_bytes,
        "live_bytes": counter.peak_bytes,
        "resident_bytes": most - pages * resource.getpagesize(),
    }


def plan(name: str, prompt: int, cp: int, tp: int, moe: Any, chunk: int) -> dict[str, Any]:
    run = dry_run(
        read_model(name)[0],
        prompt=prompt,
        cp_size=cp,
        tp_size=tp,
        moe=moe,
        chunk=chunk,
        layers="distinct",
        ranks="busiest",
    )
    room = fit(run, HARDWARE["a3"])
    return {
        "model": name,
        "prompt": prompt,
        "cp": cp,
        "tp": tp,
        "moe": moe,
        "chunk": chunk,
        "parameter_bytes": room.parameter_bytes,
        "kv_bytes": room.kv_bytes,
        "activation_bytes": room.peak_activation_bytes,
        "needed_bytes": room.needed_bytes,
        "usable_bytes": room.usable_bytes,
        "fits": room.fits,
    }


def measured_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| prompt | chunk | planned MB | live MB | resident MB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [row[f"{name}_bytes"] / 1e6 for name in ("planned", "live", "resident")]
        values = " | ".join(f"{number:.2f}" for number in numbers)
        lines.append(f"| {row['prompt']:,} | {row['chunk']:,} | {values} |")
    return "\n".join(lines) + "\n"


def plans_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | prompt | CP x TP | experts | chunk | parameters | KV cache | activations | sum "
        "| fits |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("parameter", "kv", "activation", "needed")
        values = " | ".join(f"{row[f'{name}_bytes'] / GIB:.1f}" for name in names)
        lines.append(
            f"| {row['model'].split('/')[1]} | {row['prompt']:,} | {row['cp']} x {row['tp']} "
            f"| {row['moe']} | {row['chunk']:,} | {values} | {'yes' if row['fits'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main(output: Path = typer.Option(RESULTS, help="Where the numbers go.")) -> None:  # noqa: B008
    spawn = multiprocessing.get_context("spawn")
    measured = []
    for workload in WORKLOADS:
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            measured.append(process.submit(measure, *workload).result())
    document = {"measured": measured, "plans": [plan(*each) for each in PLANS]}
    output.write_text(json.dumps(document, indent=2) + "\n")
    print(measured_table(document["measured"]))
    print(plans_table(document["plans"]))


if __name__ == "__main__":
    typer.run(main)
