"""`qwen3cp eval`: its options, and those of lm-eval that it passes on."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3cp.errors import InputError, UnsupportedConfigError
from qwen3cp.options import RankOptions, on_ranks, reported

if TYPE_CHECKING:
    from qwen3cp.eval.harness import Arguments
    from qwen3cp.parallel import ParallelContext

__all__ = ["EvalOptions", "evaluate"]

DEFAULTS: dict[str, Any] = dict(
    cp=1,
    tp=1,
    dp=1,
    moe="tp",
    exchange="auto",
    dtype="auto",
    timeout=None,
    int8="exact",
    int8_kv=False,
    group_size=None,
    min_bytes=None,
    skip_layers=None,
    cache_tokens=None,
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RankOptions):
    """The arguments of `qwen3cp eval`."""

    cache_tokens: int | None
    data_dir: str | None
    harness: Arguments
    """What lm-eval is told."""

    def check(self) -> None:
        super().check()
        if self.cache_tokens is not None and self.cache_tokens < 1:
            raise InputError(f"--cache-tokens must be positive, got {self.cache_tokens}")

    def prepare_ranks(self) -> None:
        self.harness.check()
        self.harness.read_tasks(self.model, self.data_dir)


def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder, or Hugging Face hub id.", metavar="DIR")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16 or float32.")] = None,
    cp: Annotated[int | None, typer.Option(help="Context-parallel ranks.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel ranks.")] = None,
    dp: Annotated[
        int | None, typer.Option(help="Replicas of cp x tp ranks; documents are divided over them.")
    ] = None,
    moe: Annotated[
        str | None, typer.Option(help="Experts: cut over TP (tp), or over all ranks (ep).")
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(help="With --moe ep: auto, all_gather or all_to_all.", metavar="FORM"),
    ] = None,
    int8: Annotated[
        str | None,
        typer.Option(
            help="Sums over TP in a prefill: exact, auto, one_shot or two_step.", metavar="FORM"
        ),
    ] = None,
    int8_kv: Annotated[
        bool | None, typer.Option("--int8-kv", help="Int8 keys and values between CP ranks.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="With --int8: values that share a scale, such as 128.")
    ] = None,
    min_bytes: Annotated[
        int | None, typer.Option(help="With --int8: smaller sums are exact. auto: 1 MiB.")
    ] = None,
    skip_layers: Annotated[
        str | None, typer.Option(help="Layers that stay exact, such as 0,1,47.", metavar="LAYERS")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that a collective may take.")
    ] = None,
    cache_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the KV cache on each rank; left out, by the free memory."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(help="Folder of the datasets' files, for tasks that run offline."),
    ] = None,
) -> None:
    """Run lm-eval's tasks on context-parallel ranks.

    All other options are those of `lm-eval run` and are passed on to it: --tasks, --num_fewshot,
    --limit, --output_path, --log_samples, --use_cache, --apply_chat_template, --gen_kwargs,
    --model_args, --config and the rest. --batch_size is `auto` unless it is given.

    Starts dp x cp x tp ranks on this machine, unless torchrun or `accelerate launch` has started
    them. The table of results goes to stdout; they are written once, by the first rank.
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS}
    with reported():
        if find_spec("lm_eval") is None:
            raise UnsupportedConfigError(
                "lm-eval is not installed: pip install 'qwen3cp[eval]', or lm-eval>=0.4.13"
            )
        from qwen3cp.eval.harness import Arguments

        harness = Arguments.read(context.args)
        in_config = {name: harness.model_args.pop(name, None) for name in ("pretrained", *DEFAULTS)}
        model = model or in_config["pretrained"]
        if model is None:
            raise InputError("there is no model: pass --model DIR")
        values = {
            name: _first(given[name], in_config[name], default)
            for name, default in DEFAULTS.items()
        }
        if values["skip_layers"] is not None:
            values["skip_layers"] = str(values["skip_layers"])
        options = EvalOptions(model=str(model), data_dir=data_dir, harness=harness, **values)
    on_ranks(options, lambda ctx: _evaluate(options, ctx))


def _evaluate(options: EvalOptions, ctx: ParallelContext) -> None:
    """Collective over the ranks of all replicas."""
    from qwen3cp.eval.harness import run
    from qwen3cp.eval.lm import CPQwen3LM
    from qwen3cp.eval.ranks import Ranks

    ranks = Ranks(ctx)
    tasks, error = None, None
    with ranks.patient():
        if ranks.is_first:
            try:
                options.harness.check()
                tasks = options.harness.read_tasks(options.model, options.data_dir)
            except Exception as caught:  # the other ranks have to hear of it, whatever it is
                error = caught
        ranks.fail_together(error)
    lm = CPQwen3LM(
        options.model,
        parallel_context=ctx,
        dtype=options.dtype,
        cache_tokens=options.cache_tokens,
        **options.harness.for_model(),
    )
    if not ranks.is_first:
        lm.serve()
        return
    assert tasks is not None
    model_args = {"pretrained": options.model, **changed(options), **options.harness.model_args}
    with lm.leading():
        run(lm, options.harness, tasks, model_args)


def changed(options: EvalOptions) -> dict[str, Any]:
    """The options that are not what they are by themselves."""
    return {name: value for name in DEFAULTS if (value := getattr(options, name)) != DEFAULTS[name]}


def _first(*values: Any) -> Any:
    """The first that is not None, if there is one."""
    return next((value for value in values if value is not None), None)
