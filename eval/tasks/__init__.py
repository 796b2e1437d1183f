"""Tasks that need no network: the bundled word problems, and datasets in a local folder."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from qwen3cp.errors import InputError, Qwen3CPError
from qwen3cp.eval.tasks import readers

__all__ = ["check_tasks", "new_task_manager", "task_paths"]

ROOT = Path(__file__).parent
LOCAL = "gsm8k, boolq, hellaswag and ceval-valid"


def task_paths(data_dir: str | Path | None = None) -> list[Path]:
    """The folders of the tasks' YAML files, for lm-eval's `include_path`.

    With a data directory also those tasks of the harness's names that read it.
    """
    return [ROOT / "word_problems", *([ROOT / "local"] if data_dir is not None else [])]


def new_task_manager(
    tasks: str | Sequence[str] | None = None,
    *,
    data_dir: str | Path | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    metadata: dict[str, Any] | None = None,
) -> TaskManager:
    """A task manager that knows the bundled tasks too, and reads local files from `data_dir`.

    `include_path` and `metadata` are those of lm-eval. If `tasks` are given and all of them are the
    package's own or the user's, lm-eval's thousands are not indexed, which takes seconds.
    """
    users = [include_path] if isinstance(include_path, str | Path) else list(include_path or [])
    paths: list[str | Path] = [*task_paths(data_dir), *users]
    for path in users:
        if not Path(path).is_dir():
            raise InputError(f"--include_path {path} is not a folder")
    known = dict(metadata or {})
    if data_dir is not None:
        known["data_dir"] = str(Path(data_dir).expanduser().absolute())
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=known)
    names = _names(tasks)
    if names and all(_is_file(name) or manager.match_tasks([name]) for name in names):
        return manager
    return TaskManager(include_path=paths, metadata=known)


def check_tasks(
    tasks: str | Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None = None,
    data_dir: str | Path | None = None,
) -> TaskDict:
    """The tasks, loaded with their documents. Touches no model; not collective.

    Names may be patterns, lists separated by commas, or YAML files. Raises InputError for unknown
    names, data files that are missing or of another form, fewer few-shot documents than asked for,
    and a `data_dir` that none of the tasks reads.
    """
    specs: list[str] = []
    for name in _names(tasks):
        matches = [str(Path(name).absolute())] if _is_file(name) else manager.match_tasks([name])
        if not matches:
            raise InputError(_unknown(name, manager))
        specs += [match for match in matches if match not in specs]
    if not specs:
        raise InputError("no task is named: pass --tasks")
    try:
        with _without_hint():
            loaded = manager.load(specs)
    except Qwen3CPError:
        raise
    except Exception as error:  # lm-eval, datasets and the hub have errors of their own
        hint = "" if data_dir is not None else f"; --data-dir names a folder for {LOCAL}"
        raise InputError(f"{', '.join(specs)} cannot be loaded: {error}{hint}") from error
    for name, task in loaded["tasks"].items():
        _check_fewshot(name, task, num_fewshot)
    if data_dir is not None and not any(_reads_files(task) for task in loaded["tasks"].values()):
        raise InputError(
            f"--data-dir {data_dir} is read by none of {', '.join(loaded['tasks'])}; "
            f"the tasks that read local files are {LOCAL}"
        )
    return loaded


def _names(tasks: str | Sequence[str] | None) -> list[str]:
    listed = [tasks] if isinstance(tasks, str) else list(tasks or [])
    return [name.strip() for item in listed for name in item.split(",") if name.strip()]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _unknown(name: str, manager: TaskManager) -> str:
    if name.endswith((".yaml", ".yml")):
        return f"there is no task file {name}"
    near = difflib.get_close_matches(name, manager.all_tasks, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists lm-eval's"
    return f"there is no task {name!r}: {hint}"


def _check_fewshot(name: str, task: Task, num_fewshot: int | None) -> None:
    own = task.config.num_fewshot
    wanted = (own or 0) if num_fewshot is None or own == 0 else num_fewshot
    sampler = getattr(task, "sampler", None)
    if not wanted or sampler is None:
        return
    split = task.config.fewshot_split or task.config.training_split
    if wanted > len(sampler.df):
        source = readers.source_of(name) if _reads_files(task) else None
        file = source.files[split][0] if source is not None else "that split's file"
        raise InputError(
            f"{name}: {wanted} few-shot examples are wanted and there are {len(sampler.df)} "
            f"in its {split!r} split: pass --num_fewshot {len(sampler.df)} or less, or add {file}"
        )


def _reads_files(task: Task) -> bool:
    """Whether it has a reader that may look at data_dir: ours, or one of the user's tasks."""
    reader = task.config.custom_dataset
    return reader is not None and reader is not readers.word_problems


@contextmanager
def _without_hint() -> Iterator[None]:
    """Drops lm-eval's advice on --metadata, which it gives for each task that has a reader."""

    def wanted(record: logging.LogRecord) -> bool:
        return "Custom kwargs can be passed" not in record.getMessage()

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)
