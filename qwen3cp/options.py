"""What the commands that run a model share: their options, their ranks, how they report an error.

Importing this module imports no torch: help and `qwen3cp doctor` do without it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from qwen3cp.errors import CheckpointError, InputError, ParallelConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen3cp.model import CPQwen3MoeForCausalLM
    from qwen3cp.parallel import CommConfig, ParallelContext

__all__ = [
    "RankOptions",
    "check_plot",
    "dtype_name",
    "find_model",
    "load_model",
    "load_tokenizer",
    "moe_form",
    "on_ranks",
    "reported",
]

logger = logging.getLogger("qwen3cp")

DTYPES = ("auto", "bfloat16", "float32")
INT8_FORMS: dict[str, Any] = {
    "exact": "exact",
    "auto": "auto",
    "one_shot": "int8_one_shot",
    "two_step": "int8_two_step",
}
PLOT_SUFFIXES = (".svg", ".png", ".pdf")

Model = Annotated[str, typer.Argument(help="Checkpoint folder, or Hugging Face hub id.")]
Cp = Annotated[int, typer.Option(help="Context-parallel ranks.")]
Tp = Annotated[int, typer.Option(help="Tensor-parallel ranks.")]
Moe = Annotated[
    str, typer.Option(help="Experts: cut over TP (tp), or divided over all ranks (ep).")
]
Exchange = Annotated[
    str, typer.Option(help="With --moe ep: auto, all_gather or all_to_all.", metavar="FORM")
]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that a collective may take.")]
Int8 = Annotated[
    str,
    typer.Option(
        help="Sums over TP in a prefill: exact, auto, one_shot or two_step.", metavar="FORM"
    ),
]
Int8KV = Annotated[bool, typer.Option("--int8-kv", help="Int8 keys and values between CP ranks.")]
GroupSize = Annotated[
    int | None, typer.Option(help="With --int8: values that share a scale, such as 128.")
]
MinBytes = Annotated[
    int | None, typer.Option(help="With --int8: smaller sums are exact. auto: 1 MiB.")
]
SkipLayers = Annotated[
    str | None, typer.Option(help="Layers that stay exact, such as 0,1,47.", metavar="LAYERS")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document.")]


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """What every command that runs a model is told: the model, its ranks, their communication."""

    model: str
    cp: int
    tp: int
    dp: int = 1
    moe: str
    exchange: str
    dtype: str
    timeout: float | None
    int8: str
    int8_kv: bool
    group_size: int | None
    min_bytes: int | None
    skip_layers: str | None

    @property
    def num_ranks(self) -> int:
        return self.dp * self.cp * self.tp

    def check(self) -> None:
        """Raises for what is wrong whatever the checkpoint is."""
        for name, value in (("--cp", self.cp), ("--tp", self.tp), ("--dp", self.dp)):
            if value < 1:
                raise ParallelConfigError(f"{name} must be positive, got {value}")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout must be positive, got {self.timeout}")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        moe_form(self.moe)
        self.comm()

    def prepare_ranks(self) -> None:
        """Called before ranks are started here: checks what needs none of them."""

    def comm(self) -> CommConfig:
        from qwen3cp.parallel import CommConfig

        if self.int8 not in INT8_FORMS:
            raise InputError(f"--int8 must be one of {', '.join(INT8_FORMS)}, got {self.int8!r}")
        layers = (self.skip_layers or "").replace(",", " ").split()
        if not all(layer.isdecimal() for layer in layers):
            raise InputError(
                f"--skip-layers must be layer numbers such as 0,47, got {self.skip_layers!r}"
            )
        return CommConfig(
            all_reduce=INT8_FORMS[self.int8],
            exchange=cast(Any, self.exchange),
            group_size=self.group_size,
            min_bytes=self.min_bytes,
            kv_gather="int8" if self.int8_kv else "exact",
            skip_layers=[int(layer) for layer in layers],
        )


def on_ranks(options: RankOptions, run: Callable[[ParallelContext], None]) -> None:
    """Calls run(context) on every rank of the options, started here unless they are there."""
    with reported():
        import torch.distributed as dist

        from qwen3cp.launch import is_rank, start_ranks
        from qwen3cp.parallel import ParallelContext

        options.check()
        find_model(options.model)
        if not is_rank() and options.num_ranks > 1:
            options.prepare_ranks()
            arguments = ["-m", "qwen3cp.cli", *sys.argv[1:]]
            raise typer.Exit(start_ranks(options.num_ranks, arguments))
        starts_group = not dist.is_initialized()
        ctx = ParallelContext.from_world(
            options.cp,
            options.tp,
            dp_size=options.dp,
            moe=moe_form(options.moe),
            comm=options.comm(),
            timeout=options.timeout,
        )
        try:
            run(ctx)
        finally:
            if starts_group and dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def reported() -> Iterator[None]:
    """Ends the command with `error: ...` on stderr and its exit code, if the block fails."""
    _configure_logging()
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        from qwen3cp.launch import exit_code_of, report_error

        report_error(error)
        raise typer.Exit(exit_code_of(error)) from None


def load_model(
    options: RankOptions, ctx: ParallelContext, expert_placement: str | None = None
) -> CPQwen3MoeForCausalLM:
    """Collective over the replica."""
    from qwen3cp.model import CPQwen3MoeForCausalLM

    start = time.perf_counter()
    model = CPQwen3MoeForCausalLM.from_pretrained(
        options.model,
        parallel_context=ctx,
        dtype=options.dtype,
        expert_placement=expert_placement,
    )
    report = model.load_report
    assert report is not None
    experts = "" if options.moe == "tp" else f" moe={options.moe}"
    logger.info(
        f"{options.model}: cp={options.cp} tp={options.tp}{experts}, {dtype_name(model.dtype)} on "
        f"{model.device}, loaded in {time.perf_counter() - start:.1f} s "
        f"({report.bytes_read / 1e9:.3f} GB, {report.bytes_per_second / 1e9:.2f} GB/s)"
    )
    return model


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no tokenizer that loads: {error}") from error


def find_model(name: str) -> None:
    """Raises CheckpointError for what is neither a folder nor can be the id of a hub repository."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise CheckpointError(f"{name} has no config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(f"there is no folder {name}")


def moe_form(name: str) -> Literal["tp", "ep"]:
    if name not in ("tp", "ep"):
        raise ParallelConfigError(f"--moe must be tp or ep, got {name!r}")
    return name


def check_plot(option: str, path: str) -> None:
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise InputError(f"{option} must end in {', '.join(PLOT_SUFFIXES)}, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no such folder")


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _configure_logging() -> None:
    """The log of rank 0 goes to stderr; the other ranks' is dropped."""
    level = os.environ.get("QWEN3CP_LOG_LEVEL", "INFO").upper()
    known = level in logging.getLevelNamesMapping()
    logger.setLevel(level if known else "INFO")
    if os.environ.get("RANK", "0") != "0":
        import transformers

        transformers.logging.set_verbosity_error()
        logger.handlers[:] = [logging.NullHandler()]
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    if not known:
        logger.warning(f"QWEN3CP_LOG_LEVEL={level} is no log level; INFO is used")
