"""One run of lm-eval's harness, on the first rank: its arguments, its tasks, its files."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from lm_eval._cli.run import Run
from lm_eval.config.evaluate_config import EvaluatorConfig

from qwen3cp.errors import InputError
from qwen3cp.options import load_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from qwen3cp.eval.lm import CPQwen3LM

__all__ = ["Arguments", "Tasks", "run"]

logger = logging.getLogger("qwen3cp")


@dataclass(frozen=True)
class Tasks:
    """The tasks of a run, loaded with their documents."""

    manager: TaskManager
    tasks: dict[str, Task]
    selected: list[Task | Group]
    """As the harness takes them: groups, and the tasks that are in none."""


@dataclass(frozen=True)
class Arguments:
    """The options of `lm-eval run`, read by its own parser."""

    config: EvaluatorConfig
    given: dict[str, Any]
    """Those that the command line or the YAML file names."""

    @classmethod
    def read(cls, arguments: Seq[str]) -> Arguments:
        """Raises InputError with what lm-eval finds wrong."""
        subparsers = argparse.ArgumentParser().add_subparsers()
        Run.create(subparsers)
        parser = subparsers.choices["run"]

        def fail(message: str) -> NoReturn:
            raise InputError(f"{message} (`lm-eval run --help` names its options)")

        parser.error = fail
        namespace = parser.parse_args(list(arguments))
        try:
            # it prints a YAML file that it reads, and warns, which each rank would
            with redirect_stdout(io.StringIO()), _silent("lm_eval"):
                given = dict(vars(namespace))
                if given.get("config"):
                    given = {**EvaluatorConfig.load_yaml_config(given["config"]), **given}
                config = EvaluatorConfig.from_cli(namespace)
        except (OSError, TypeError, ValueError) as error:
            raise InputError(f"lm-eval: {error}") from error
        if "batch_size" not in given:
            config.batch_size = "auto"  # type: ignore[assignment]
        if config.model != "qwen3cp" and "model" in given and given["model"] is not None:
            raise InputError(
                f"lm-eval's model is {config.model!r}; `qwen3cp eval` runs qwen3cp: leave it out"
            )
        config.model = "qwen3cp"
        return cls(config, given)

    @property
    def model_args(self) -> dict[str, Any]:
        return self.config.model_args

    def for_model(self) -> dict[str, Any]:
        """The arguments of `CPQwen3LM` that lm-eval gives to any model."""
        config = self.config
        return {
            **self.model_args,
            "batch_size": config.batch_size,
            "max_batch_size": config.max_batch_size,
            "device": config.device,
        }

    def check(self) -> None:
        """Raises InputError for what can be seen without tasks or a model."""
        config = self.config
        if not config.tasks:
            raise InputError("there is no task: pass --tasks NAME")
        if config.samples is not None and not isinstance(config.samples, dict):
            raise InputError(f"--samples {config.samples!r} is neither JSON nor a JSON file")
        if config.limit is not None and config.limit <= 0:
            raise InputError(f"--limit must be positive, got {config.limit:g}")
        if config.num_fewshot is not None and config.num_fewshot < 0:
            raise InputError(f"--num_fewshot must not be negative, got {config.num_fewshot}")
        for option, path, folder_of in (
            ("--output_path", config.output_path, _folder_of_results),
            ("--use_cache", config.use_cache, lambda path: Path(path).parent),
        ):
            if path:
                folder = folder_of(path)
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise InputError(f"{option}: {folder} cannot be made: {error}") from error
                if not os.access(folder, os.W_OK):
                    raise InputError(f"{option}: {folder} cannot be written")

    def read_tasks(self, model: str, data_dir: str | None) -> Tasks:
        """Loads the tasks, and checks the arguments that concern them. Loads no model.

        Raises:
            InputError: unknown tasks, missing data, arguments that do not fit.
        """
        from lm_eval.models.utils import resolve_max_length

        from qwen3cp.eval.lm import MAX_GEN_TOKS, checked_generation, read_gen_kwargs
        from qwen3cp.eval.tasks import check_tasks, new_task_manager
        from qwen3cp.weights import read_config

        config = self.config
        manager = new_task_manager(
            config.tasks,
            data_dir=data_dir,
            include_path=config.include_path,
            metadata=config.metadata,
        )
        loaded = check_tasks(
            config.tasks, manager, num_fewshot=config.num_fewshot, data_dir=data_dir
        )
        tasks, groups = loaded["tasks"], loaded.get("groups", {})
        for name in config.samples or {}:
            if name not in tasks:
                raise InputError(f"--samples names {name!r}, which is not a task of this run")
        longest = self.model_args.get("max_length")
        if not isinstance(longest, int):  # what is neither a number nor left out, the model refuses
            longest = resolve_max_length(read_config(model))
        for name, task in tasks.items():
            if getattr(task, "UNSAFE_CODE", False) and not config.confirm_run_unsafe_code:
                raise InputError(
                    f"{name} runs code that the model writes: pass --confirm_run_unsafe_code"
                )
            if task.OUTPUT_TYPE == "generate_until":
                own = task.config.generation_kwargs or {}
                kwargs, *_ = read_gen_kwargs(
                    {**own, **(config.gen_kwargs or {})},
                    self.model_args.get("max_gen_toks", MAX_GEN_TOKS),
                    longest,
                )
                checked_generation(kwargs)
        if config.apply_chat_template and not load_tokenizer(model).chat_template:
            raise InputError(
                f"the tokenizer of {model} has no chat template: omit --apply_chat_template"
            )
        inner = [group.get_all_tasks() for group in groups.values()]
        in_group = {task.task_name for group in inner for task in group}
        in_group |= {g.name for group in groups.values() for g in group.get_all_groups()}
        return Tasks(
            manager=manager,
            tasks=tasks,
            selected=[x for name, x in {**groups, **tasks}.items() if name not in in_group],
        )


def run(lm: CPQwen3LM, arguments: Arguments, tasks: Tasks, model_args: dict[str, Any]) -> None:
    """Evaluates, writes and prints, as `lm-eval run` does. On the first rank, in its `leading`."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
    from lm_eval.utils import handle_non_serializable, make_table, setup_logging

    config = arguments.config
    setup_logging(cast(Any, config.verbosity or os.environ.get("LMEVAL_LOG_LEVEL", "WARNING")))
    logs: list[Any] = []
    if config.wandb_args:
        logs.append(WandbLogger(config.wandb_args, config.wandb_config_args))
    if config.trackio_args:
        logs.append(TrackioLogger(config.trackio_args))
    tracking = dict(config.hf_hub_log_args)
    if config.output_path:
        tracking["output_path"] = config.output_path
    if os.environ.get("HF_TOKEN"):
        tracking["token"] = os.environ["HF_TOKEN"]
    tracker = EvaluationTracker(**tracking)
    seeds = config.seed if isinstance(config.seed, list) else [config.seed] * 4
    caching = config.cache_requests
    evaluate: Any = simple_evaluate  # its decorator hides what it takes
    results = evaluate(
        model=lm,
        model_args=model_args,
        tasks=list(tasks.selected),
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=str(lm.device),
        use_cache=config.use_cache,
        cache_requests=caching.get("cache_requests", False),
        rewrite_requests_cache=caching.get("rewrite_requests_cache", False),
        delete_requests_cache=caching.get("delete_requests_cache", False),
        limit=config.limit,
        samples=config.samples if isinstance(config.samples, dict) else None,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=config.log_samples,
        evaluation_tracker=tracker,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs or None,
        task_manager=tasks.manager,
        predict_only=config.predict_only,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )
    assert results is not None
    results["config"]["model"] = tracker.general_config_tracker.model_source = config.model
    if config.use_cache:  # answers that were cached did not come to the model
        instances = [instance for task in tasks.tasks.values() for instance in task.instances]
        results["config"]["truncated_documents"] = len(lm.find_truncated(instances))
    samples = results.pop("samples", None) if config.log_samples else None

    if config.show_config:
        print(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    for log in logs:
        try:
            log.post_init(results)
            log.log_eval_result()
            if samples is not None:
                log.log_eval_samples(samples)
        except Exception as error:
            logger.warning(f"{type(log).__name__} has failed: {error}")
    tracker.save_results_aggregated(results=results, samples=samples)
    if samples is not None:
        for name, of_task in samples.items():
            _write_tokens(lm, tracker, name, tasks.tasks[name].OUTPUT_TYPE, of_task)
            tracker.save_results_samples(task_name=name, samples=of_task)
    if tracker.push_results_to_hub or tracker.push_samples_to_hub:
        tracker.recreate_metadata_card()

    values = ", ".join(f"{name}={value}" for name, value in model_args.items())
    print(
        f"{config.model} ({values}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}, "
        f"num_fewshot: {config.num_fewshot}, batch_size: {config.batch_size}"
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    truncated = results["config"]["truncated_documents"]
    if truncated:
        print(f"{truncated} documents were truncated on the left to {lm.max_length} tokens")
    for log in logs:
        log.run.finish() if isinstance(log, WandbLogger) else log.finish()


def _folder_of_results(output_path: str) -> Path:
    path = Path(output_path)
    return path.parent if path.suffix == ".json" else path


def _write_tokens(
    lm: CPQwen3LM,
    tracker: EvaluationTracker,
    task: str,
    kind: str | None,
    samples: list[dict[str, Any]],
) -> None:
    """Writes, beside the file of a task's samples, what each document's tokens were and their
    log-probabilities: `logprobs_TASK_DATE.jsonl`, a line for each document.

    They are not in the samples, which are then equal whatever the ranks.
    """
    if not tracker.output_path:
        return
    method = kind if kind in ("generate_until", "loglikelihood_rolling") else "loglikelihood"
    folder = _folder_of_results(tracker.output_path)
    if Path(tracker.output_path).suffix != ".json":
        folder /= str(tracker.general_config_tracker.model_name_sanitized)
    written = set()
    with open(folder / f"logprobs_{task}_{tracker.date_id}.jsonl", "w") as file:
        for sample in samples:  # one for each document and filter
            if sample["doc_id"] in written:
                continue
            written.add(sample["doc_id"])
            line = {
                "doc_id": sample["doc_id"],
                "doc_hash": sample["doc_hash"],
                "requests": [lm.tokens_of(method, arguments) for arguments in sample["arguments"]],
            }
            file.write(json.dumps(line) + "\n")


@contextmanager
def _silent(name: str) -> Iterator[None]:
    of_library = logging.getLogger(name)
    level = of_library.level
    of_library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        of_library.setLevel(level)
