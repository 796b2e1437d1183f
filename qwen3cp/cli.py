"""The command line: `qwen3cp COMMAND`, also as `python -m qwen3cp.cli COMMAND`.

Importing this module imports no torch: the commands import what they run.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qwen3cp.benchmark.command import bench
from qwen3cp.eval.command import evaluate
from qwen3cp.eval.compare_report import compare
from qwen3cp.options import (
    AsJson,
    Cp,
    Dtype,
    Exchange,
    GroupSize,
    Int8,
    Int8KV,
    MinBytes,
    Model,
    Moe,
    SkipLayers,
    Timeout,
    Tp,
    moe_form,
    on_ranks,
    reported,
)
from qwen3cp.planner.command import plan
from qwen3cp.version import __version__

__all__ = ["app", "main"]

DEFAULT_NEW_TOKENS = 256

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(plan)

Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; `-` reads stdin. Repeatable.")]
PromptFile = Annotated[str | None, typer.Option(help="A file that is one prompt; `-` reads stdin.")]


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
    from qwen3cp.generation import GenerateOptions, generate_all

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
    on_ranks(options, lambda ctx: generate_all(options, ctx))


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
    from qwen3cp.generation import ReportOptions, report_communication

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
    on_ranks(options, lambda ctx: report_communication(options, ctx))


app.command()(bench)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a hub id that is cached.")],
    cp: Cp = 1,
    tp: Tp = 1,
    moe: Moe = "tp",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Tell whether a checkpoint is whole, what each rank will read, and how much memory it takes.

    Reads the headers, no tensor. Ends with 2 and the first thing that is wrong.
    """
    with reported():
        from qwen3cp.weights import check

        report = check(model, cp_size=cp, tp_size=tp, moe=moe_form(moe), dtype=dtype)
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
    with reported():
        from qwen3cp.weights import shard

        manifest = shard(model, out, cp_size=cp, tp_size=tp, moe=moe_form(moe), dtype=dtype)
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
    with reported():
        from qwen3cp.weights import make_random, read_config

        plan = make_random(
            read_config(config), out, dtype=dtype, seed=seed, max_shard_size=max_shard_size
        )
        print(f"{out}: {plan.numel} parameters, {plan.num_bytes / 1e9:.3f} GB")


app.command()(compare)
app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    evaluate
)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Tell what this machine has (torch, torch_npu, CANN, NPUs, links), and what to do about it.

    Ends with 1 if something keeps the model from running as this machine could run it.
    """
    with reported():
        from qwen3cp.doctor import examine

        checks = []
        for check in examine():
            checks.append(check)
            if not as_json:
                print(f"{check.status:8} {check.name}: {check.found}", flush=True)
                if check.advice is not None:
                    print(f"{'':8} -> {check.advice}", flush=True)
        if as_json:
            print(json.dumps([asdict(check) for check in checks], indent=2))
        if any(check.status == "problem" for check in checks):
            raise typer.Exit(1)


def main() -> None:
    """The entry point of the `qwen3cp` script."""
    app()


if __name__ == "__main__":
    main()
