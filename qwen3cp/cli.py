"""The command line: `qwen3cp COMMAND`, also as `python -m qwen3cp.cli COMMAND`."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.distributed as dist
import transformers
import typer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from qwen3cp.comm_report import error_report
from qwen3cp.errors import CheckpointError, InputError, ParallelConfigError
from qwen3cp.launch import exit_code_of, is_rank, report_error, start_ranks
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.parallel import CommConfig, ParallelContext
from qwen3cp.routing import RoutingLog, record_routing
from qwen3cp.version import __version__

__all__ = ["app", "main"]

logger = logging.getLogger("qwen3cp")

DTYPES = ("auto", "bfloat16", "float32")
INT8_FORMS: dict[str, Any] = {
    "exact": "exact",
    "auto": "auto",
    "one_shot": "int8_one_shot",
    "two_step": "int8_two_step",
}
PLOT_SUFFIXES = (".svg", ".png", ".pdf")
DEFAULT_NEW_TOKENS = 256
STDIN = "-"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that runs a model is told: the model, its ranks, its prompts."""

    model: str
    cp: int
    tp: int
    moe: str
    exchange: str
    prompts: list[str]
    prompt_file: str | None
    dtype: str
    timeout: float | None
    int8: str
    int8_kv: bool
    group_size: int | None
    min_bytes: int | None
    skip_layers: str | None

    def check(self) -> None:
        """Raises for what is wrong whatever the checkpoint is."""
        for name, value in (("--cp", self.cp), ("--tp", self.tp)):
            if value < 1:
                raise ParallelConfigError(f"{name} must be positive, got {value}")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InputError(f"--timeout must be positive, got {self.timeout}")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _moe(self.moe)
        if self.int8 not in INT8_FORMS:
            raise InputError(f"--int8 must be one of {', '.join(INT8_FORMS)}, got {self.int8!r}")
        self.comm()
        if self.prompts and self.prompt_file is not None:
            raise InputError("pass either --prompt or --prompt-file, not both")
        if not self.prompts and self.prompt_file is None:
            raise InputError("there is no prompt: pass --prompt TEXT or --prompt-file FILE")
        if self.prompts.count(STDIN) > 1:
            raise InputError("standard input can be read once: pass `--prompt -` once")

    def comm(self) -> CommConfig:
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

    @property
    def reads_stdin(self) -> bool:
        return STDIN in self.prompts or self.prompt_file == STDIN

    def read_prompts(self) -> list[str]:
        """The text of every prompt; a final newline of a file or of stdin is not a part of it."""
        if self.prompt_file is None:
            prompts = [_read(STDIN) if prompt == STDIN else prompt for prompt in self.prompts]
        else:
            prompts = [_read(self.prompt_file)]
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise InputError(f"prompt {i} is empty")
        return prompts


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """The arguments of `qwen3cp generate`."""

    max_new_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    chat: bool
    system: str | None
    stats: bool
    stats_plot: str | None
    expert_placement: str | None
    save_placement: str | None
    as_json: bool

    def check(self) -> None:
        super().check()
        if self.stats_plot is not None:
            _check_plot("--stats-plot", self.stats_plot)
        for name, value in (("--max-new-tokens", self.max_new_tokens), ("--top-k", self.top_k)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be positive, got {value}")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature must not be negative, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p must be above 0 and at most 1, got {self.top_p}")
        if self.system is not None and not self.chat:
            raise InputError("--system is a part of the chat template: pass --chat too")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions):
    """The arguments of `qwen3cp report-comm`."""

    plot: str | None
    as_json: bool

    def check(self) -> None:
        super().check()
        if self.comm().all_reduce == self.comm().kv_gather == "exact":
            raise InputError("there is nothing to report: pass --int8 or --int8-kv")
        if self.plot is not None:
            _check_plot("--plot", self.plot)


def _check_plot(option: str, path: str) -> None:
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise InputError(f"{option} must end in {', '.join(PLOT_SUFFIXES)}, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{option} {path}: there is no such folder")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Qwen3-MoE over context-parallel ranks, on Ascend NPUs or on a CPU."""
    if version:
        print(__version__)
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


Model = Annotated[str, typer.Argument(help="Checkpoint folder, or Hugging Face hub id.")]
Cp = Annotated[int, typer.Option(help="Context-parallel ranks.")]
Tp = Annotated[int, typer.Option(help="Tensor-parallel ranks.")]
Moe = Annotated[
    str, typer.Option(help="Experts: cut over TP (tp), or divided over all ranks (ep).")
]
Exchange = Annotated[
    str, typer.Option(help="With --moe ep: auto, all_gather or all_to_all.", metavar="FORM")
]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; `-` reads stdin. Repeatable.")]
PromptFile = Annotated[str | None, typer.Option(help="A file that is one prompt; `-` reads stdin.")]
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


@app.command()
def generate(
    model: Model,
    cp: Cp = 1,
    tp: Tp = 1,
    moe: Moe = "tp",
    exchange: Exchange = "auto",
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Most tokens of an answer.")
    ] = DEFAULT_NEW_TOKENS,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy. Left out, the checkpoint's generation_config decides."),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    dtype: Dtype = "auto",
    int8: Int8 = "exact",
    int8_kv: Int8KV = False,
    group_size: GroupSize = None,
    min_bytes: MinBytes = None,
    skip_layers: SkipLayers = None,
    timeout: Timeout = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print how evenly the experts are used, to stderr.")
    ] = False,
    stats_plot: Annotated[
        str | None, typer.Option(help="Draw that: svg, png or pdf.", metavar="FILE")
    ] = None,
    expert_placement: Annotated[
        str | None, typer.Option(help="JSON file that says where each expert is.", metavar="FILE")
    ] = None,
    save_placement: Annotated[
        str | None,
        typer.Option(help="Write a placement that balances what this run counted.", metavar="FILE"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document; the prompts run as one batch.")
    ] = False,
) -> None:
    """Continue prompts with a checkpoint.

    Starts cp x tp ranks on this machine, unless torchrun or `accelerate launch` has started them.
    The answers alone go to stdout; progress and timing go to stderr.
    """
    options = GenerateOptions(
        model=model,
        cp=cp,
        tp=tp,
        moe=moe,
        exchange=exchange,
        prompts=prompt or [],
        prompt_file=prompt_file,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        chat=chat,
        system=system,
        dtype=dtype,
        int8=int8,
        int8_kv=int8_kv,
        group_size=group_size,
        min_bytes=min_bytes,
        skip_layers=skip_layers,
        timeout=timeout,
        stats=stats,
        stats_plot=stats_plot,
        expert_placement=expert_placement,
        save_placement=save_placement,
        as_json=as_json,
    )
    _on_ranks(options, lambda ctx: _generate_all(options, ctx))


@app.command()
def report_comm(
    model: Model,
    cp: Cp = 1,
    tp: Tp = 2,
    moe: Moe = "tp",
    exchange: Exchange = "auto",
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    dtype: Dtype = "auto",
    int8: Annotated[
        str | None,
        typer.Option(help="As of generate; two_step where there are TP ranks.", metavar="FORM"),
    ] = None,
    int8_kv: Int8KV = False,
    group_size: GroupSize = None,
    min_bytes: MinBytes = None,
    skip_layers: SkipLayers = None,
    timeout: Timeout = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw it to this file: svg, png or pdf.", metavar="FILE")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of the table.")] = False,
) -> None:
    """Report what int8 communication costs in accuracy on prompts of your own.

    For each layer the error of each reduction and the outliers in it; for the logits, how far they
    are from those with exact communication. Starts its ranks as `generate` does.
    """
    options = ReportOptions(
        model=model,
        cp=cp,
        tp=tp,
        moe=moe,
        exchange=exchange,
        prompts=prompt or [],
        prompt_file=prompt_file,
        dtype=dtype,
        int8=int8 or ("two_step" if tp > 1 else "exact"),
        int8_kv=int8_kv,
        group_size=group_size,
        min_bytes=min_bytes,
        skip_layers=skip_layers,
        timeout=timeout,
        plot=plot,
        as_json=as_json,
    )
    _on_ranks(options, lambda ctx: _report_communication(options, ctx))


def _on_ranks(options: RunOptions, run: Callable[[ParallelContext], None]) -> None:
    """Calls run(context) on every rank of the options, started here unless they are there."""
    with _reported():
        options.check()
        _find_model(options.model)
        if not is_rank() and options.cp * options.tp > 1:
            raise typer.Exit(_start_ranks(options))
        starts_group = not dist.is_initialized()
        ctx = ParallelContext.from_world(
            options.cp,
            options.tp,
            moe=_moe(options.moe),
            comm=options.comm(),
            timeout=options.timeout,
        )
        try:
            run(ctx)
        finally:
            if starts_group and dist.is_initialized():
                dist.destroy_process_group()


def main() -> None:
    """The entry point of the `qwen3cp` script."""
    app()


def _start_ranks(options: RunOptions) -> int:
    """Checks what needs no ranks, then runs this command on ranks of its own: the exit code."""
    if options.reads_stdin:
        _keep_stdin()
    options.read_prompts()
    if options.reads_stdin:
        os.lseek(0, 0, os.SEEK_SET)
    return start_ranks(options.cp * options.tp, ["-m", "qwen3cp.cli", *sys.argv[1:]])


def _load(
    options: RunOptions, ctx: ParallelContext, expert_placement: str | None = None
) -> CPQwen3MoeForCausalLM:
    """Collective over the replica."""
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
        f"{options.model}: cp={options.cp} tp={options.tp}{experts}, {_name(model.dtype)} on "
        f"{model.device}, loaded in {time.perf_counter() - start:.1f} s "
        f"({report.bytes_read / 1e9:.3f} GB, {report.bytes_per_second / 1e9:.2f} GB/s)"
    )
    return model


def _generate_all(options: GenerateOptions, ctx: ParallelContext) -> None:
    prompts = _share_prompts(options, ctx)
    sampling = _sampling(options)
    tokenizer = _load_tokenizer(options.model)
    if options.chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {options.model} has no chat template: omit --chat")
    texts = _apply_chat(tokenizer, prompts, options.system) if options.chat else prompts
    ids = [_tokenize(tokenizer, text, chat=options.chat) for text in texts]

    model = _load(options, ctx, options.expert_placement)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    settings = {**sampling, "max_new_tokens": options.max_new_tokens}
    wants_routing = options.stats or options.stats_plot or options.save_placement
    with record_routing() if wants_routing else nullcontext() as routing:
        if options.as_json:
            answers = _generate_batch(model, tokenizer, ids, settings)
            if ctx.rank == 0:
                print(json.dumps(_document(options, model, prompts, answers), indent=2))
        else:
            for one in ids:
                _generate_streaming(model, tokenizer, one, settings)
    if routing is not None:
        _report_routing(options, model, routing)


def _report_routing(
    options: GenerateOptions, model: CPQwen3MoeForCausalLM, routing: RoutingLog
) -> None:
    """Collective over the replica; rank 0 writes."""
    ctx = model.parallel_context
    report = routing.report(model)
    if ctx.rank != 0:
        return
    if options.stats:
        print(report.to_table(), file=sys.stderr)
    if options.stats_plot is not None:
        report.plot(options.stats_plot)
    if options.save_placement is not None:
        num_layers = model.config.num_hidden_layers
        report.balanced_placement(num_layers, ctx.world_size).save(options.save_placement)


def _report_communication(options: ReportOptions, ctx: ParallelContext) -> None:
    tokenizer = _load_tokenizer(options.model)
    ids = [_tokenize(tokenizer, text, chat=False) for text in _share_prompts(options, ctx)]
    report = error_report(_load(options, ctx), ids)
    if ctx.rank == 0:
        print(report.to_json() if options.as_json else report.to_table())
        if options.plot is not None:
            report.plot(options.plot)


# ---------------------------------------------------------------------------------------- inputs


def _find_model(name: str) -> None:
    """Raises CheckpointError for what is neither a folder nor can be the id of a hub repository."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise CheckpointError(f"{name} has no config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise CheckpointError(f"there is no folder {name}")


def _read(name: str) -> str:
    try:
        text = sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the prompt cannot be read from {name}: {error}") from error
    return text.removesuffix("\n")


def _keep_stdin() -> None:
    """Puts what stdin holds into a file in its place, for the ranks to read again.

    They run in sessions of their own, which a terminal gives no input to.
    """
    with tempfile.TemporaryFile() as kept:
        kept.write(sys.stdin.buffer.read())
        kept.flush()
        os.dup2(kept.fileno(), 0)
    os.lseek(0, 0, os.SEEK_SET)
    sys.stdin = open(0, encoding="utf-8", closefd=False)


def _share_prompts(options: RunOptions, ctx: ParallelContext) -> list[str]:
    """The prompts as rank 0 reads them. Collective over the replica."""
    if ctx.host_group is None:
        return options.read_prompts()
    prompts, error = None, None
    if ctx.rank == 0:
        try:
            prompts = options.read_prompts()
        except InputError as caught:
            error = caught
    shared = [prompts, error]
    dist.broadcast_object_list(shared, group=ctx.host_group, group_src=0)
    prompts, error = shared
    if error is not None:
        raise error
    assert prompts is not None
    return prompts


def _sampling(options: GenerateOptions) -> dict[str, Any]:
    """What generate() is told about sampling."""
    chosen = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    given = {name: value for name, value in chosen.items() if value is not None}
    samples = bool(options.temperature)
    if options.temperature is None:
        samples = bool(_generation_config(options.model).do_sample)
    if samples:
        return {**given, "do_sample": True}
    if options.top_p is not None or options.top_k is not None:
        raise InputError("--top-p and --top-k choose among samples: pass --temperature above 0 too")
    # the checkpoint's own values would have no effect, which transformers warns of
    return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def _generation_config(model: str) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # it has none
        return GenerationConfig()


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} has no tokenizer that loads: {error}") from error


def _apply_chat(
    tokenizer: PreTrainedTokenizerBase, prompts: Seq[str], system: str | None
) -> list[str]:
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        str(
            tokenizer.apply_chat_template(
                [*before, {"role": "user", "content": prompt}],
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        for prompt in prompts
    ]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    assert isinstance(ids, list)
    if not ids:
        raise InputError(f"the prompt {text!r} is empty: the tokenizer makes no token of it")
    return ids


# ------------------------------------------------------------------------------------ generation


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated for one prompt."""

    text: str
    token_ids: list[int]
    """With the end-of-sequence token, if it was generated."""
    finish_reason: str
    """stop: an end-of-sequence token; length: as many tokens as were allowed."""
    seconds_to_first_token: float
    seconds: float
    """To the last token, from the start of the call."""

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None if there is only one."""
        rest = self.seconds - self.seconds_to_first_token
        return (len(self.token_ids) - 1) / rest if len(self.token_ids) > 1 and rest > 0 else None


class _Clock(BaseStreamer):
    """Takes the time of each step of generate()."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: list[float] = []
        """Until the prompt was given, then until each new token."""

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def end(self) -> None:
        pass


class _Printer(_Clock):
    """Prints the answer to stdout as it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self._text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self._text.put(value)

    def end(self) -> None:
        self._text.end()


def _generate_streaming(
    model: CPQwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    settings: dict[str, Any],
) -> None:
    """Collective over the replica; rank 0 prints."""
    clock = _Printer(tokenizer) if model.parallel_context.rank == 0 else _Clock()
    (answer,) = _generate(model, tokenizer, [ids], settings, clock)
    rate = answer.tokens_per_second
    logger.info(
        f"{len(ids)} prompt tokens, {len(answer.token_ids)} new ({answer.finish_reason}); "
        f"first after {answer.seconds_to_first_token:.3f} s"
        + (f", then {rate:.1f} tokens/s" if rate else "")
    )


def _generate_batch(
    model: CPQwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    settings: dict[str, Any],
) -> list[Answer]:
    """Collective over the replica."""
    answers = _generate(model, tokenizer, ids, settings, _Clock())
    seconds = max(answer.seconds for answer in answers)
    logger.info(
        f"{len(ids)} prompts of {sum(map(len, ids))} tokens, "
        f"{sum(len(answer.token_ids) for answer in answers)} new in {seconds:.3f} s"
    )
    return answers


def _generate(
    model: CPQwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[list[int]],
    settings: dict[str, Any],
    clock: _Clock,
) -> list[Answer]:
    """One batch, padded on the left. Collective over the replica."""
    stops = _stop_ids(model)
    pad = next(
        (
            token
            for token in (model.generation_config.pad_token_id, tokenizer.pad_token_id, *stops)
            if token is not None
        ),
        0,
    )
    columns = max(map(len, ids))
    padded = torch.tensor([[pad] * (columns - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (columns - len(one)) + [1] * len(one) for one in ids])
    output = model.generate(
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        streamer=clock,
        pad_token_id=pad,
        **settings,
    )
    answers = []
    for row in output[:, columns:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        token_ids = row[: ends[0] + 1] if ends else row
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        answers.append(
            Answer(
                text=str(text),
                token_ids=token_ids,
                finish_reason="stop" if ends else "length",
                seconds_to_first_token=clock.seconds[1],
                seconds=clock.seconds[len(token_ids)],
            )
        )
    return answers


def _stop_ids(model: CPQwen3MoeForCausalLM) -> list[int]:
    stops = model.generation_config.eos_token_id
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else list(stops)


def _document(
    options: GenerateOptions,
    model: CPQwen3MoeForCausalLM,
    prompts: list[str],
    answers: list[Answer],
) -> dict[str, Any]:
    return {
        "model": options.model,
        "dtype": _name(model.dtype),
        "device": str(model.device),
        "topology": {"cp": options.cp, "tp": options.tp},
        "results": [
            {
                "prompt": prompt,
                "text": answer.text,
                "token_ids": answer.token_ids,
                "num_tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "timing": {
                    "seconds_to_first_token": answer.seconds_to_first_token,
                    "seconds": answer.seconds,
                    "tokens_per_second": answer.tokens_per_second,
                },
            }
            for prompt, answer in zip(prompts, answers, strict=True)
        ],
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _configure_logging() -> None:
    """The log of rank 0 goes to stderr; the other ranks' is dropped."""
    level = os.environ.get("QWEN3CP_LOG_LEVEL", "INFO").upper()
    known = level in logging.getLevelNamesMapping()
    logger.setLevel(level if known else "INFO")
    if os.environ.get("RANK", "0") != "0":
        transformers.logging.set_verbosity_error()
        logger.handlers[:] = [logging.NullHandler()]
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    if not known:
        logger.warning(f"QWEN3CP_LOG_LEVEL={level} is no log level; INFO is used")


# --------------------------------------------------------------------------------------- weights


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a hub id that is cached.")],
    cp: Cp = 1,
    tp: Tp = 1,
    moe: Moe = "tp",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Tell whether a checkpoint is whole, what each rank will read, and how much memory it takes.

    Reads the headers, no tensor. Ends with 2 and the first thing that is wrong.
    """
    from qwen3cp.weights import check

    with _reported():
        report = check(model, cp_size=cp, tp_size=tp, moe=_moe(moe), dtype=dtype)
        if as_json:
            print(json.dumps(asdict(report), indent=2))
            return
        print(
            f"{model} is whole: {report.form}, {report.num_tensors} tensors in "
            f"{report.num_files} files, {report.num_bytes / 1e9:.3f} GB of "
            f"{', '.join(report.dtypes)}"
        )
        print(f"cp={cp} tp={tp} moe={moe}, parameters in {report.dtype}; GB, on each rank:")
        print("rank    cp    tp  files     reads  with gaps    memory  parameters")
        for rank in report.ranks:
            print(
                f"{rank.rank:4}  {rank.cp_rank:4}  {rank.tp_rank:4}  {rank.num_files:5}  "
                f"{rank.bytes_to_read / 1e9:8.3f}  {rank.bytes_spanned / 1e9:9.3f}  "
                f"{rank.parameter_bytes / 1e9:8.3f}  {rank.num_parameters:10}"
            )


@app.command()
def shard(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    cp: Cp = 1,
    tp: Tp = 1,
    moe: Moe = "tp",
    dtype: Dtype = "auto",
) -> None:
    """Cut a checkpoint for the ranks of one topology, so that they load it without cutting."""
    from qwen3cp.weights import shard

    with _reported():
        manifest = shard(model, out, cp_size=cp, tp_size=tp, moe=_moe(moe), dtype=dtype)
        print(f"{out}: {len(manifest.files)} files for cp={cp} tp={tp} moe={moe}")


@app.command()
def make_random(
    config: Annotated[str, typer.Argument(help="config.json, a folder with one, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the values.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Of a file.")] = "5GB",
) -> None:
    """Write a checkpoint of any Qwen3-MoE config with random weights, file by file."""
    from qwen3cp.weights import make_random, read_config

    with _reported():
        plan = make_random(
            read_config(config), out, dtype=dtype, seed=seed, max_shard_size=max_shard_size
        )
        print(f"{out}: {plan.numel} parameters, {plan.num_bytes / 1e9:.3f} GB")


@contextmanager
def _reported() -> Iterator[None]:
    """Ends the command with `error: ...` on stderr and its exit code, if the block fails."""
    _configure_logging()
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        report_error(error)
        raise typer.Exit(exit_code_of(error)) from None


def _moe(name: str) -> Literal["tp", "ep"]:
    if name not in ("tp", "ep"):
        raise ParallelConfigError(f"--moe must be tp or ep, got {name!r}")
    return name


if __name__ == "__main__":
    main()
