"""`qwen3cp bench`. Importing this module imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from qwen3cp.errors import InputError, ParallelConfigError
from qwen3cp.options import (
    DTYPES,
    INT8_FORMS,
    AsJson,
    GroupSize,
    MinBytes,
    Model,
    SkipLayers,
    Timeout,
    check_plot,
    dtype_name,
    find_model,
    moe_form,
    reported,
)

if TYPE_CHECKING:
    from transformers import Qwen3MoeConfig

    from qwen3cp.benchmark.ways import Settings
    from qwen3cp.parallel import CommConfig

__all__ = ["bench"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """The arguments of `qwen3cp bench`, lists not yet taken apart."""

    model: str
    prompt_tokens: str
    new_tokens: int
    batch_size: str
    dtype: str
    cp: str
    tp: str
    moe: str
    exchange: str
    int8: str
    kv_gather: str
    group_size: int | None
    min_bytes: int | None
    skip_layers: str | None
    chunk_tokens: str
    float32_scores: bool
    copies: int
    against: str | None
    repeats: int
    threads: int
    seed: int
    parts: bool
    timeout: float | None
    output: str | None
    plot: str | None
    as_json: bool

    def check(self) -> None:
        """Raises for what is wrong whatever the checkpoint is."""
        for name, value in (
            ("--copies", self.copies),
            ("--repeats", self.repeats),
            ("--threads", self.threads),
        ):
            if value < 1:
                raise InputError(f"{name} must be positive, got {value}")
        if self.new_tokens < 0:
            raise InputError(f"--new-tokens must not be negative, got {self.new_tokens}")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout must be positive, got {self.timeout}")
        if self.against not in (None, "transformers"):
            raise InputError(f"--against must be transformers, got {self.against!r}")
        if self.plot is not None:
            check_plot("--plot", self.plot)
        if self.output is not None and not Path(self.output).absolute().parent.is_dir():
            raise InputError(f"--output {self.output}: there is no such folder")

    def settings(self, config: Qwen3MoeConfig) -> Settings:
        """Raises InputError or ParallelConfigError for values that are none."""
        from qwen3cp.benchmark.ways import Settings, Workload, ways_of
        from qwen3cp.weights.loader import resolve_dtype

        dtypes = _list("--dtype", self.dtype, _one_of("--dtype", DTYPES))
        sizes = _list("--batch-size", self.batch_size, _positive("--batch-size"))
        lengths = _list("--prompt-tokens", self.prompt_tokens, _positive("--prompt-tokens"))
        return Settings(
            model=self.model,
            ways=ways_of(
                dtypes=list(
                    dict.fromkeys(dtype_name(resolve_dtype(name, config)) for name in dtypes)
                ),
                cp=_list("--cp", self.cp, _positive("--cp", ParallelConfigError)),
                tp=_list("--tp", self.tp, _positive("--tp", ParallelConfigError)),
                moe=_list("--moe", self.moe, moe_form),
                comm=self._comm(),
                chunk_tokens=_list("--chunk-tokens", self.chunk_tokens, _count("--chunk-tokens")),
                float32_scores=[False, True] if self.float32_scores else [False],
                copies=self.copies,
                transformers=self.against == "transformers",
            ),
            workloads=tuple(
                Workload(batch_size=size, prompt_tokens=length, new_tokens=self.new_tokens)
                for size, length in product(sizes, lengths)
            ),
            repeats=self.repeats,
            threads=self.threads,
            seed=self.seed,
            parts=self.parts,
            timeout=self.timeout,
        )

    def _comm(self) -> list[CommConfig]:
        from qwen3cp.parallel import CommConfig

        layers = (self.skip_layers or "").replace(",", " ").split()
        if not all(layer.isdecimal() for layer in layers):
            raise InputError(
                f"--skip-layers must be layer numbers such as 0,47, got {self.skip_layers!r}"
            )
        return [
            CommConfig(
                all_reduce=INT8_FORMS[form],
                kv_gather=cast(Any, gather),
                exchange=cast(Any, exchange),
                group_size=self.group_size,
                min_bytes=self.min_bytes,
                skip_layers=[int(layer) for layer in layers],
            )
            for form, gather, exchange in product(
                _list("--int8", self.int8, _one_of("--int8", tuple(INT8_FORMS))),
                _list("--kv-gather", self.kv_gather, str),
                _list("--exchange", self.exchange, str),
            )
        ]


def bench(
    model: Model,
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of the prompts.")] = "512,2048",
    new_tokens: Annotated[int, typer.Option(help="Decode steps after each prefill.")] = 16,
    batch_size: Annotated[str, typer.Option(help="Prompts that run together.")] = "1",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    cp: Annotated[str, typer.Option(help="Context-parallel ranks.")] = "1",
    tp: Annotated[str, typer.Option(help="Tensor-parallel ranks.")] = "1",
    moe: Annotated[str, typer.Option(help="Experts: tp or ep.")] = "tp",
    exchange: Annotated[
        str, typer.Option(help="With --moe ep: auto, all_gather or all_to_all.")
    ] = "auto",
    int8: Annotated[
        str, typer.Option(help="Sums over TP in a prefill: exact, auto, one_shot or two_step.")
    ] = "exact",
    kv_gather: Annotated[
        str, typer.Option(help="Keys and values between CP ranks: exact or int8.")
    ] = "exact",
    group_size: GroupSize = None,
    min_bytes: MinBytes = None,
    skip_layers: SkipLayers = None,
    chunk_tokens: Annotated[
        str, typer.Option(help="Tokens of one call of a prefill; 0 is the whole prompt.")
    ] = "0",
    float32_scores: Annotated[
        bool, typer.Option("--float32-scores", help="Also with float32 attention scores on a CPU.")
    ] = False,
    copies: Annotated[
        int, typer.Option(help="Also so many independent copies of one rank at the same time.")
    ] = 1,
    against: Annotated[
        str | None, typer.Option(help="Compare with transformers.", metavar="transformers")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads of a rank.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the prompts, which are random tokens.")] = 0,
    parts: Annotated[bool, typer.Option(help="Take the time of each part, too.")] = True,
    timeout: Timeout = None,
    output: Annotated[
        str | None, typer.Option(help="Write the results to this JSON file.", metavar="FILE")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw tokens/s: svg, png or pdf.", metavar="FILE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure prefill and decode: time, memory, bytes, and where the time goes.

    Options given as text take several values, such as --cp 1,2; every combination is a way to run,
    and all ways take turns in one run, so that their ratios do not depend on what else the machine
    does. Starts as many ranks as the largest needs, one core each, unless torchrun has started
    them; those that a way does not need wait.
    """
    options = BenchOptions(
        model=model,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        dtype=dtype,
        cp=cp,
        tp=tp,
        moe=moe,
        exchange=exchange,
        int8=int8,
        kv_gather=kv_gather,
        group_size=group_size,
        min_bytes=min_bytes,
        skip_layers=skip_layers,
        chunk_tokens=chunk_tokens,
        float32_scores=float32_scores,
        copies=copies,
        against=against,
        repeats=repeats,
        threads=threads,
        seed=seed,
        parts=parts,
        timeout=timeout,
        output=output,
        plot=plot,
        as_json=as_json,
    )
    with reported():
        _run(options)


def _run(options: BenchOptions) -> None:
    options.check()
    find_model(options.model)
    import torch.distributed as dist

    from qwen3cp.launch import is_rank, start_ranks
    from qwen3cp.weights import read_config

    config = read_config(options.model)
    settings = options.settings(config)
    settings.check_model(config)
    if options.plot is not None:
        from qwen3cp.plots import new_figure

        new_figure(1, 1)  # not after an hour: matplotlib may be missing
    if not is_rank() and settings.num_ranks > 1:
        arguments = ["-m", "qwen3cp.cli", *sys.argv[1:]]
        raise typer.Exit(start_ranks(settings.num_ranks, arguments))
    starts_group = not dist.is_initialized()
    try:
        _measure(options, settings)
    finally:
        if starts_group and dist.is_initialized():
            dist.destroy_process_group()


def _measure(options: BenchOptions, settings: Settings) -> None:
    """Collective over the world; rank 0 writes."""
    import os

    from tqdm import tqdm

    from qwen3cp.benchmark.runner import num_steps, run_benchmark

    off_rank_0 = os.environ.get("RANK", "0") != "0"
    # None: only on a terminal
    with tqdm(total=num_steps(settings), disable=True if off_rank_0 else None) as bar:

        def on_step(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        report = run_benchmark(settings, on_step)
    if report is None:
        return
    if options.output is not None:
        try:
            Path(options.output).write_text(report.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--output {options.output}: {error}") from error
    if options.plot is not None:
        report.plot(options.plot)
    print(report.to_json() if options.as_json else report.to_table())


def _list(option: str, text: str, read: Callable[[str], T]) -> list[T]:
    """The values of `1,2`, each once."""
    values = [part.strip() for part in text.split(",")]
    if not all(values):
        raise InputError(f"{option} must be values such as a or a,b, got {text!r}")
    return list(dict.fromkeys(read(value) for value in values))


def _count(option: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal():
            raise InputError(f"{option} must be whole numbers, got {text!r}")
        return int(text)

    return read


def _positive(option: str, error: type[ValueError] = InputError) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = _count(option)(text.removeprefix("-"))
        if value < 1 or text.startswith("-"):
            raise error(f"{option} must be positive, got {text}")
        return value

    return read


def _one_of(option: str, allowed: tuple[str, ...]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise InputError(f"{option} must be one of {', '.join(allowed)}, got {text!r}")
        return text

    return read
