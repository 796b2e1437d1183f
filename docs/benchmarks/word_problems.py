"""Accuracy of the bundled checkpoint on its word problems: transformers, topologies, int8 forms.

    python docs/benchmarks/word_problems.py [--problems 400] [--runs FOLDER] [--output FILE.json]

Runs lm-eval's task `word_problems` through lm-eval's own `hf` model and through `qwen3cp eval`,
float32, greedy, and prints a table: right answers by kind of problem, and what changed against
transformers, document by document. On two cores it takes about a quarter of an hour. Runs that the
folder already holds are not made again. The table of docs/evaluation.md is made from
word_problems.json beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import typer

from qwen3cp.eval.compare import compare_runs
from qwen3cp.eval.runs import Run, read_run

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
RESULTS = Path(__file__).with_suffix(".json")
TASK = "word_problems"
FILTER = "strict-match"
KINDS = ("short", "facts", "long")

HF = "transformers"
RUNS: dict[str, list[str]] = {
    HF: [],
    "cp 1": [],
    "cp 2": ["--cp", "2"],
    "cp 2 x tp 2": ["--cp", "2", "--tp", "2"],
    "tp 2, int8 one-shot": ["--tp", "2", "--int8", "one_shot"],
    "tp 2, int8 two-step": ["--tp", "2", "--int8", "two_step"],
    "tp 2, int8 two-step, groups of 128": [
        "--tp",
        "2",
        "--int8",
        "two_step",
        "--group-size",
        "128",
    ],
    "cp 2, int8 keys and values": ["--cp", "2", "--int8-kv"],
    "cp 2 x tp 2, both int8": [
        *("--cp", "2", "--tp", "2", "--int8", "two_step", "--group-size", "128", "--int8-kv"),
    ],
}
"""Name -> options of `qwen3cp eval`; the first is lm-eval's `hf`."""


def main(
    problems: int = typer.Option(400, help="The first of each run; kinds are mixed evenly."),
    runs: Path | None = typer.Option(None, help="Folder of the runs; kept, if it is named."),  # noqa: B008
    output: Path = typer.Option(RESULTS, help="Where the counts go."),  # noqa: B008
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = runs or Path(temporary)
        for name in RUNS:
            if not holds(folder / slug(name), problems):
                print(f"{name} ...", file=sys.stderr, flush=True)
                evaluate(name, problems, folder / slug(name))
        rows = summaries({name: read_run(folder / slug(name)) for name in RUNS})
    output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


def holds(folder: Path, problems: int) -> bool:
    """Whether there is a run of that many problems."""
    if not list(folder.rglob(f"samples_{TASK}_*.jsonl")):
        return False
    return sum(sample.filter == FILTER for sample in read_run(folder).samples[TASK]) == problems


def slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def evaluate(name: str, problems: int, folder: Path) -> None:
    from qwen3cp.eval.tasks import task_paths

    shared = ["--tasks", TASK, "--limit", str(problems), "--log_samples"]
    if name == HF:
        model = ["--model", "hf", "--model_args", f"pretrained={CHECKPOINT},dtype=float32"]
        (tasks,) = task_paths()
        model += ["--include_path", str(tasks), "--batch_size", "8", "--device", "cpu"]
        command = ["-m", "lm_eval", "run", *model]
    else:
        model = ["--model", str(CHECKPOINT), "--dtype", "float32", *RUNS[name]]
        command = ["-m", "qwen3cp.cli", "eval", *model]
    done = subprocess.run(
        [sys.executable, *command, *shared, "--output_path", str(folder)],
        stdout=sys.stderr,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.returncode)


def summaries(found: dict[str, Run]) -> list[dict[str, Any]]:
    from qwen3cp.eval.tasks.readers import word_problems

    kinds = word_problems()["test"]["kind"]
    rows = []
    for name, run in found.items():
        against = compare_runs(found[HF], run)
        (row,) = (row for row in against.rows if row.filter == FILTER)
        samples = [s for s in run.samples[TASK] if s.filter == FILTER]
        right = Counter(kinds[s.doc_id] for s in samples if s.metrics["exact_match"])
        rows.append(
            {
                "run": name,
                "problems": row.documents,
                "right": row.right_b,
                "interval": row.interval_b,
                "of_kind": Counter(kinds[s.doc_id] for s in samples),
                "right_of_kind": {kind: right[kind] for kind in KINDS},
                "texts_differ": against.texts_differ[TASK],
                "lost": row.lost,
                "gained": row.gained,
                "other": row.other,
                "difference": row.difference,
                "difference_interval": row.difference_interval,
                "p_value": row.p_value,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table of the documentation, in Markdown."""
    of_kind = rows[0]["of_kind"]
    lines = [
        f"| run | right of {rows[0]['problems']} | % (95 %) | "
        + " | ".join(f"{kind} ({of_kind[kind]})" for kind in KINDS)
        + " | texts that differ | lost, gained | points (95 %) | p |",
        "|" + "---|" * (7 + len(KINDS)),
    ]
    for row in rows:
        low, high = (100 * end for end in row["interval"])
        cells = [
            row["run"],
            str(row["right"]),
            f"{100 * row['right'] / row['problems']:.2f} ({low:.1f} to {high:.1f})",
            *(str(row["right_of_kind"][kind]) for kind in KINDS),
        ]
        if row is rows[0]:
            cells += [""] * 4
        else:
            low, high = (100 * end for end in row["difference_interval"])
            cells += [
                str(row["texts_differ"]),
                f"{row['lost']}, {row['gained']}",
                f"{100 * row['difference']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{row['p_value']:.2g}",
            ]
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
