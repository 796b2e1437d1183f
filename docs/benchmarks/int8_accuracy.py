"""Answers of the bundled checkpoint with int8 communication, against the same with exact.

    python docs/benchmarks/int8_accuracy.py [--problems 400] [--output FILE.json]

Solves the 400 bundled problems, float32, greedy, on each topology and with each setting, and prints
how many answers are right and how many differ. Takes most of an hour on two cores. The table of
docs/int8-communication.md is made from int8_accuracy.json beside this file.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer
from transformers import AutoTokenizer

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext, launch
from qwen3cp.eval.statistics import difference_interval

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
RESULTS = Path(__file__).with_suffix(".json")
MAX_NEW_TOKENS = 64
BATCH_TOKENS = 8192

REDUCTIONS: dict[str, dict[str, Any]] = {
    f"{name}, {unit}": {"all_reduce": f"int8_{form}", "group_size": group_size}
    for name, form in (("one-shot", "one_shot"), ("two-step", "two_step"))
    for unit, group_size in (("token", None), ("128", 128))
}
GATHER: dict[str, dict[str, Any]] = {"KV gather": {"kv_gather": "int8"}}
BOTH = {"two-step, 128, and KV gather": {**REDUCTIONS["two-step, 128"], **GATHER["KV gather"]}}
SETTINGS: dict[tuple[int, int], dict[str, dict[str, Any]]] = {
    (1, 2): REDUCTIONS,
    (1, 4): REDUCTIONS,
    (2, 2): {**REDUCTIONS, **GATHER, **BOTH},
    (2, 1): GATHER,
    (4, 1): GATHER,
}
"""(cp, tp) -> name -> CommConfig."""


@dataclass
class Problem:
    ids: list[int]
    answer: str


def main(
    problems: int = typer.Option(400, help="How many of each run, spread over the kinds."),
    output: Path = typer.Option(RESULTS, help="Where the counts go."),  # noqa: B008
    topology: str | None = typer.Option(None, hidden=True, help="What the ranks are told."),
) -> None:
    if topology is not None:
        cp, tp = (int(n) for n in topology.split("x"))
        run_topology(cp, tp, problems, output)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for cp, tp in SETTINGS:
            part = Path(folder) / f"{cp}x{tp}.json"
            arguments = [f"--problems={problems}", f"--output={part}", f"--topology={cp}x{tp}"]
            code = launch.start_ranks(cp * tp, [__file__, *arguments])
            if code:
                sys.exit(code)
            rows += json.loads(part.read_text())
    output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def run_topology(cp: int, tp: int, num_problems: int, output: Path) -> None:
    """On every rank: all settings of one topology."""
    ctx = ParallelContext.from_world(cp, tp, backend="gloo")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    problems = read_problems(tokenizer, num_problems)
    model = CPQwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, parallel_context=ctx, dtype=torch.float32, device="cpu"
    )
    exact = solve(model, tokenizer, problems)
    rows = [summary(cp, tp, "exact", problems, exact, exact)]
    for name, settings in SETTINGS[cp, tp].items():
        with ctx.communication(CommConfig(**settings)):
            answers = solve(model, tokenizer, problems)
        rows.append(summary(cp, tp, name, problems, exact, answers))
        if ctx.rank == 0:
            print(f"cp {cp} tp {tp} {name}: {rows[-1]}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
    if ctx.rank == 0:
        output.write_text(json.dumps(rows))


def read_problems(tokenizer: Any, count: int) -> list[Problem]:
    """Every (400 / count)-th problem."""
    lines = (CHECKPOINT / "problems-test.jsonl").read_text().splitlines()
    chosen = [json.loads(lines[i * len(lines) // count]) for i in range(count)]
    return [
        Problem(tokenizer(f"Question: {p['question']}\nAnswer:")["input_ids"], p["answer"])
        for p in chosen
    ]


def solve(model: CPQwen3MoeForCausalLM, tokenizer: Any, problems: list[Problem]) -> list[str]:
    """Greedy, up to a blank line or the end of the text: the text of each answer."""
    answers = [""] * len(problems)
    waiting = sorted(range(len(problems)), key=lambda i: len(problems[i].ids))
    while waiting:
        batch, tokens = [], 0
        while waiting and (not batch or tokens + len(problems[waiting[0]].ids) <= BATCH_TOKENS):
            batch.append(waiting.pop(0))
            tokens += len(problems[batch[-1]].ids)
        texts = solve_batch(model, tokenizer, [problems[i].ids for i in batch])
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text
    return answers


def solve_batch(
    model: CPQwen3MoeForCausalLM, tokenizer: Any, prompts: list[list[int]]
) -> list[str]:
    pages = sum(-(-(len(ids) + MAX_NEW_TOKENS) // 128) for ids in prompts)
    cache = model.new_kv_cache(num_pages=1 + pages)
    sequences = [cache.new_sequence() for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    logits = model.prefill(cache, sequences, prompts)
    while True:
        for i, token in zip(running, logits.argmax(-1).tolist(), strict=True):
            tokens[i].append(token)
        running = [i for i in running if not has_ended(tokenizer, tokens[i])]
        if not running:
            return [str(tokenizer.decode(answer)) for answer in tokens]
        logits = model.decode(
            cache, [sequences[i] for i in running], [tokens[i][-1] for i in running]
        )


def has_ended(tokenizer: Any, tokens: list[int]) -> bool:
    return (
        len(tokens) == MAX_NEW_TOKENS
        or tokens[-1] == tokenizer.eos_token_id
        or str(tokenizer.decode(tokens)).endswith("\n\n")
    )


def final_number(text: str) -> str | None:
    found = re.search(r"#### (-?\d+)", text)
    return found[1] if found else None


def summary(
    cp: int, tp: int, name: str, problems: list[Problem], exact: list[str], answers: list[str]
) -> dict[str, Any]:
    truth = [final_number(p.answer) for p in problems]
    before = [final_number(text) for text in exact]
    after = [final_number(text) for text in answers]
    pairs = [(a == t, b == t) for a, b, t in zip(before, after, truth, strict=True)]
    return {
        "cp": cp,
        "tp": tp,
        "comm": name,
        "problems": len(problems),
        "right": sum(b for _, b in pairs),
        "differ": sum(a != b for a, b in zip(before, after, strict=True)),
        "gained": pairs.count((False, True)),
        "lost": pairs.count((True, False)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation, in Markdown."""
    lines = [
        "| cp x tp | communication | right | answers that differ | gained, lost | points |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        place = f"{row['cp']} x {row['tp']}"
        right = f"{row['right']} / {row['problems']}"
        if row["comm"] == "exact":
            lines.append(f"| {place} | exact | {right} | | | |")
            continue
        gained, lost, count = row["gained"], row["lost"], row["problems"]
        low, high = difference_interval(gained, lost, count)
        change = f"{(gained - lost) / count * 100:+.2f} ({low * 100:+.2f} to {high * 100:+.2f})"
        lines.append(
            f"| {place} | {row['comm']} | {right} | {row['differ']} | {gained}, {lost} | {change} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
