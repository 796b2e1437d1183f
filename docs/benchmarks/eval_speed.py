"""How fast `qwen3cp eval` is beside lm-eval's own `hf`, on one core of a CPU.

    python docs/benchmarks/eval_speed.py --repeats 3

Prints the two commands that it compares, and runs what they run in turn, each in new processes:
the bundled checkpoint in float32 on the bundled word problems. Times are those of the harness's
calls to the model, without starting and loading. CPU seconds are what a machine that does nothing
else would take on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
CHECKPOINT = "tests/assets/tiny-qwen3-moe"
TASKS = "--tasks word_problems"
COMMANDS = {
    "hf": (
        f"lm-eval run --model hf --model_args pretrained={CHECKPOINT},dtype=float32 --device cpu "
        f"--batch_size 8 --include_path eval/tasks/word_problems {TASKS}"
    ),
    "qwen3cp": f"qwen3cp eval --model {CHECKPOINT} --dtype float32 {TASKS}",
}


def measure(way: str, limit: int, num_fewshot: int) -> dict[str, Any]:
    """In a process of its own: seconds in the model, and the accuracy."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from qwen3cp.eval import CPQwen3LM
    from qwen3cp.eval.tasks import new_task_manager

    torch.set_num_threads(1)
    if way == "hf":
        model: Any = cast(Any, HFLM)(
            pretrained=CHECKPOINT, dtype="float32", device="cpu", batch_size=8
        )
    else:
        model = CPQwen3LM(CHECKPOINT, dtype="float32")
    times = {}
    generate = model.generate_until

    def timed(requests: Any) -> Any:
        start = time.perf_counter(), time.process_time()
        answers = generate(requests)
        times["seconds"] = time.perf_counter() - start[0]
        times["cpu_seconds"] = time.process_time() - start[1]
        return answers

    model.generate_until = timed
    results = cast(Any, simple_evaluate)(
        model=model,
        tasks=["word_problems"],
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=new_task_manager("word_problems"),
    )
    score = results["results"]["word_problems"]["exact_match,strict-match"]
    return {**times, "accuracy": float(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--limit", type=int, default=200, help="documents")
    parser.add_argument("--num-fewshot", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    parser.add_argument("--way", choices=COMMANDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.limit, args.num_fewshot)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in COMMANDS.values():
        print(f"{command} --limit {args.limit} --num_fewshot {args.num_fewshot}")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in COMMANDS}
    for _ in range(args.repeats):
        for way, of_way in runs.items():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--way", way],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                check=True,
            )
            of_way.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n{'':8}  CPU seconds  seconds  accuracy   (medians of {args.repeats})")
    for way, of_way in runs.items():
        cpu, wall, score = (
            statistics.median(run[name] for run in of_way)
            for name in ("cpu_seconds", "seconds", "accuracy")
        )
        print(f"{way:8}  {cpu:11.1f}  {wall:7.1f}  {score:8.3f}")
    ratios = [
        theirs["cpu_seconds"] / ours["cpu_seconds"]
        for theirs, ours in zip(runs["hf"], runs["qwen3cp"], strict=True)
    ]
    print(f"\nhf / qwen3cp, CPU seconds: {statistics.median(ratios):.1f}")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "runs": runs}, default=str))


if __name__ == "__main__":
    main()
