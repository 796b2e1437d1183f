"""Runs of lm-eval as it writes them: one results file, and the samples of each task.

Next to a samples file, `qwen3cp eval` leaves the log-probability of every token that was generated
or scored: `logprobs_TASK_DATE.jsonl`, a line for each document, {"doc_id": 3, "requests":
[{"tokens": [...], "logprobs": [...]}, ...]}, with "margins", how far apart the two largest logits
were, where tokens were chosen by the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3cp.errors import InputError

__all__ = ["Run", "Sample", "TokenLogprobs", "read_run"]

DATE = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one request."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Natural logarithms."""
    margins: Sequence[float] | None


@dataclass(frozen=True)
class Sample:
    """One document under one filter."""

    doc_id: int
    doc_hash: str
    prompt_hash: str
    filter: str
    target: str
    arguments: Sequence[Sequence[Any]]
    """Of each request: the prompt, then what follows it or how to generate."""
    responses: Sequence[Any]
    """Of each request: one for each repeat."""
    filtered: Sequence[Any]
    metrics: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.arguments[0][0])


@dataclass(frozen=True)
class Run:
    path: Path
    """The results file."""
    results: Mapping[str, Any]
    samples: Mapping[str, Sequence[Sample]]
    """Task -> its samples, in the order of the file."""
    logprobs: Mapping[str, Mapping[int, Sequence[TokenLogprobs]]] = field(default_factory=dict)
    """Task -> doc_id -> requests, where the run has them."""
    older: Sequence[str] = ()
    """Other results files in the folder."""

    @property
    def model(self) -> str:
        return str(self.results.get("model_name") or self.results.get("model_source") or "?")

    def output_type(self, task: str) -> str:
        return str(self.results.get("configs", {}).get(task, {}).get("output_type", ""))

    def higher_is_better(self, task: str, metric: str) -> bool:
        return self.results.get("higher_is_better", {}).get(task, {}).get(metric) is not False

    def settings(self) -> dict[str, Any]:
        """What the results file says of how the run was made, flat: name -> value."""
        named = ("config", "qwen3cp")
        flat = {}
        for name in named:
            flat.update(_flat(name, self.results.get(name)))
        for name in ("system_instruction", "chat_template_sha", "fewshot_as_multiturn"):
            flat[name] = self.results.get(name)
        return flat


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value


def read_run(path: str | Path) -> Run:
    """The run in an output folder (the newest, if it holds several), or of one results file.

    Raises InputError if there is none, if it has no samples, or if a file is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"there is no folder or results file {path}")
    date = re.search(rf"_({DATE})\.json$", path.name) if path.is_file() else None
    folder = path if path.is_dir() else path.parent
    pattern = f"samples_*_{date[1]}.jsonl" if date else "samples_*.jsonl"
    found: dict[tuple[str, Path], dict[str, Path]] = {}  # a run -> task -> file
    for file in sorted(folder.glob(pattern) if date else folder.rglob(pattern)):
        name = re.fullmatch(rf"samples_(.+)_({DATE})\.jsonl", file.name)
        if name:
            found.setdefault((name[2], file.parent), {})[name[1]] = file
    runs = sorted(found)
    if not runs:
        raise InputError(
            f"{path} has no samples_TASK_DATE.jsonl: run lm-eval or `qwen3cp eval` with "
            "--log_samples --output_path"
        )
    (day, parent), files = runs[-1], found[runs[-1]]
    results = path if date else next(parent.glob(f"*_{day}.json"), None)
    if results is None:
        raise InputError(f"{parent} has samples of {day} and no results_{day}.json")
    return Run(
        path=results,
        results=_read_results(results),
        samples={task: _read_samples(file) for task, file in files.items()},
        logprobs={
            task: _read_logprobs(file)
            for task in files
            if (file := parent / f"logprobs_{task}_{day}.jsonl").exists()
        },
        older=[str(f) for when, where in runs[:-1] for f in where.glob(f"*_{when}.json")],
    )


def _read_results(path: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or "results" not in results:
        raise InputError(f"{path} is not a results file of lm-eval: it has no 'results'")
    return results


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_samples(path: Path) -> list[Sample]:
    samples = []
    for number, row in _lines(path):
        try:
            requests = row["arguments"]
            arguments = [list(requests[f"gen_args_{i}"].values()) for i in range(len(requests))]
            samples.append(
                Sample(
                    doc_id=int(row["doc_id"]),
                    doc_hash=row["doc_hash"],
                    prompt_hash=row["prompt_hash"],
                    filter=row["filter"],
                    target=str(row["target"]),
                    arguments=arguments,
                    responses=row["resps"],
                    filtered=row["filtered_resps"],
                    metrics={name: row[name] for name in row["metrics"]},
                )
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{path}, line {number} is not a sample as lm-eval 0.4.13 writes it: "
                f"{type(error).__name__} {error}"
            ) from error
    return samples


def _read_logprobs(path: Path) -> dict[int, list[TokenLogprobs]]:
    found = {}
    for number, row in _lines(path):
        try:
            found[int(row["doc_id"])] = [
                TokenLogprobs(r["tokens"], r["logprobs"], r.get("margins")) for r in row["requests"]
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{path}, line {number} has another form: {error!r}") from error
    return found
