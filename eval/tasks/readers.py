"""Datasets of the offline tasks, read from a local folder in their published file formats.

The documents come out as the hub's datasets hold them, so that prompts, and lm-eval's hashes of
documents, are the same wherever the files came from. The functions named after tasks are what the
YAML files beside this module call, with the task manager's metadata as arguments.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from qwen3cp.errors import InputError

__all__ = ["boolq", "ceval", "gsm8k", "hellaswag", "word_problems"]

Row = dict[str, Any]

BUNDLED = Path(__file__).parent / "word_problems"


@dataclass(frozen=True)
class Source:
    """Where the documents of one dataset are found, and what they look like."""

    name: str
    folders: tuple[str, ...]
    """Folders under --data-dir that are looked into before --data-dir itself."""
    files: dict[str, tuple[str, ...]]
    """Split -> patterns, the published names first; the hub's parquet files after them."""
    expected: str
    """For people: the columns."""
    convert: Callable[[Row, int], Row]
    """(row, index) -> document. KeyError, TypeError or ValueError for a row of another form."""
    columns: tuple[str, ...]
    """Of a document."""
    optional: tuple[str, ...] = ("train", "dev")
    """Splits that only few-shot examples come from: without their file there are none."""

    def read(self, data_dir: str | Path | None) -> dict[str, Dataset]:
        """All splits. Raises InputError, naming the file and what was expected."""
        if data_dir is None:
            raise InputError(
                f"{self.name} reads local files: name their folder with --data-dir "
                f'(with lm_eval itself: --metadata \'{{"data_dir": "DIR"}}\')'
            )
        folder = Path(data_dir).expanduser()
        if not folder.is_dir():
            raise InputError(f"--data-dir {folder} is not a folder")
        folder = next((folder / f for f in self.folders if (folder / f).is_dir()), folder)
        return {split: self._split(folder, split) for split in self.files}

    def _split(self, folder: Path, split: str) -> Dataset:
        patterns = self.files[split]
        found = (sorted(folder.glob(pattern)) for pattern in patterns)
        paths = next(filter(None, found), [])
        if not paths and split in self.optional:
            return Dataset.from_dict({column: [] for column in self.columns})
        if not paths:
            raise InputError(
                f"{self.name}: {folder} has no {' or '.join(patterns)}; "
                f"expected {self.expected} in each document"
            )
        documents = [document for path in paths for document in self._documents(path)]
        if not documents:
            raise InputError(f"{self.name}: {paths[0]} has no documents")
        return Dataset.from_list(documents)

    def _documents(self, path: Path) -> Iterator[Row]:
        index = 0
        try:
            for place, row in _rows(path):
                try:
                    yield self.convert(row, index)
                except (KeyError, TypeError, ValueError) as error:
                    reason = f"no {error}" if isinstance(error, KeyError) else error
                    raise InputError(
                        f"{self.name}: {path}, {place}: {reason}; expected {self.expected}"
                    ) from error
                index += 1
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{self.name}: {path} cannot be read: {error}") from error


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a .jsonl, .csv or .parquet file."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        yield from ((f"row {i}", row) for i, row in enumerate(rows))
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            for i, row in enumerate(csv.DictReader(file)):
                yield f"row {i}", row
    else:
        with path.open(encoding="utf-8-sig") as file:
            for i, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {i} is not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {i} is not a JSON object")
                yield f"line {i}", row


def _text(row: Row, column: str) -> str:
    if not isinstance(row[column], str):
        raise TypeError(f"{column!r} is {row[column]!r}, not a text")
    return row[column]


def _texts(row: Row, *columns: str) -> dict[str, str]:
    return {column: _text(row, column) for column in columns}


# -------------------------------------------------------------------------------- the datasets


def _gsm8k(row: Row, index: int) -> Row:
    return _texts(row, "question", "answer")


GSM8K = Source(
    name="gsm8k",
    folders=("gsm8k",),
    files={
        "train": ("train.jsonl", "main/train-*.parquet"),
        "test": ("test.jsonl", "main/test-*.parquet"),
    },
    expected="question and answer",
    convert=_gsm8k,
    columns=("question", "answer"),
)


def _boolq(row: Row, index: int) -> Row:
    """BoolQ's own form, or SuperGLUE's, which has the title in the passage and a label."""
    texts = _texts(row, "question", "passage")
    if "label" in row:
        label, index = row["label"], row["idx"]
    else:
        label = row["answer"]
        texts["passage"] = f"{_text(row, 'title')} -- {texts['passage']}"
    if label not in (0, 1):
        raise ValueError(f"{label!r} is not true or false")
    return {**texts, "idx": index, "label": int(label)}


BOOLQ = Source(
    name="boolq",
    folders=("boolq", "BoolQ"),
    files={
        "train": ("train.jsonl", "train-*.parquet"),
        "validation": ("dev.jsonl", "val.jsonl", "validation-*.parquet"),
    },
    expected="question, title, passage and answer (SuperGLUE: question, passage, idx and label)",
    convert=_boolq,
    columns=("question", "passage", "idx", "label"),
)


def _hellaswag(row: Row, index: int) -> Row:
    endings = row["endings"]
    if not isinstance(endings, list) or not all(isinstance(e, str) for e in endings):
        raise TypeError(f"'endings' is {endings!r}, not a list of texts")
    if int(row["label"]) not in range(len(endings)):
        raise ValueError(f"'label' is {row['label']!r}, and there are {len(endings)} endings")
    return {
        "ind": int(row["ind"]),
        **_texts(row, "activity_label", "ctx_a", "ctx_b", "ctx"),
        "endings": endings,
        **_texts(row, "source_id", "split", "split_type"),
        "label": str(row["label"]),
    }


HELLASWAG = Source(
    name="hellaswag",
    folders=("hellaswag",),
    files={
        "train": ("hellaswag_train.jsonl", "data/train-*.parquet"),
        "validation": ("hellaswag_val.jsonl", "data/validation-*.parquet"),
    },
    expected="ind, activity_label, ctx_a, ctx_b, ctx, endings, source_id, split, split_type, label",
    convert=_hellaswag,
    columns=(
        *("ind", "activity_label", "ctx_a", "ctx_b", "ctx"),
        *("endings", "source_id", "split", "split_type", "label"),
    ),
)


def _ceval(row: Row, index: int) -> Row:
    document = {"id": int(row["id"]), **_texts(row, "question", "A", "B", "C", "D", "answer")}
    if document["answer"] not in ("A", "B", "C", "D"):
        raise ValueError(f"'answer' is {document['answer']!r}, not one of A, B, C, D")
    return {**document, "explanation": row.get("explanation") or ""}


def ceval_source(subject: str) -> Source:
    return Source(
        name=f"ceval-valid_{subject}",
        folders=("ceval", "ceval-exam"),
        files={
            "dev": (f"dev/{subject}_dev.csv", f"{subject}/dev-*.parquet"),
            "val": (f"val/{subject}_val.csv", f"{subject}/val-*.parquet"),
        },
        expected="id, question, A, B, C, D and answer",
        convert=_ceval,
        columns=("id", "question", "A", "B", "C", "D", "answer", "explanation"),
    )


def source_of(task: str) -> Source | None:
    """Of one of our tasks, by name."""
    if task.startswith("ceval-valid_"):
        return ceval_source(task.removeprefix("ceval-valid_"))
    return {source.name: source for source in (GSM8K, BOOLQ, HELLASWAG)}.get(task)


# ----------------------------------------------------------------- what the YAML files refer to


def gsm8k(*, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    return GSM8K.read(data_dir)


def boolq(*, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    return BOOLQ.read(data_dir)


def hellaswag(*, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    return HELLASWAG.read(data_dir)


def ceval(*, subject: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    return ceval_source(subject).read(data_dir)


def word_problems(*, kind: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The problems that the package holds: all, or those of one kind (short, facts, long)."""
    splits = {}
    for split, name in (("fewshot", "fewshot.jsonl"), ("test", "problems.jsonl")):
        rows = [row for _, row in _rows(BUNDLED / name)]
        if split == "test" and kind is not None:
            rows = [row for row in rows if row["kind"] == kind]
        splits[split] = Dataset.from_list(rows)
    return splits
