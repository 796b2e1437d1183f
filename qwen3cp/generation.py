"""What `qwen3cp generate` and `qwen3cp report-comm` do with their prompts."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from qwen3cp.comm_report import error_report
from qwen3cp.errors import InputError
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.options import RankOptions, check_plot, dtype_name, load_model, load_tokenizer
from qwen3cp.parallel import ParallelContext
from qwen3cp.routing import RoutingLog, record_routing

__all__ = ["GenerateOptions", "ReportOptions", "generate_all", "report_communication"]

logger = logging.getLogger("qwen3cp")

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class PromptOptions(RankOptions):
    """Of the commands that take prompts."""

    prompts: list[str]
    prompt_file: str | None

    def check(self) -> None:
        super().check()
        if self.prompts and self.prompt_file is not None:
            raise InputError("pass either --prompt or --prompt-file, not both")
        if not self.prompts and self.prompt_file is None:
            raise InputError("there is no prompt: pass --prompt TEXT or --prompt-file FILE")
        if self.prompts.count(STDIN) > 1:
            raise InputError("standard input can be read once: pass `--prompt -` once")

    def prepare_ranks(self) -> None:
        if self.reads_stdin:
            _keep_stdin()
        self.read_prompts()
        if self.reads_stdin:
            os.lseek(0, 0, os.SEEK_SET)

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
class GenerateOptions(PromptOptions):
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
            check_plot("--stats-plot", self.stats_plot)
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
class ReportOptions(PromptOptions):
    """The arguments of `qwen3cp report-comm`."""

    plot: str | None
    as_json: bool

    def check(self) -> None:
        super().check()
        if self.comm().all_reduce == self.comm().kv_gather == "exact":
            raise InputError("there is nothing to report: pass --int8 or --int8-kv")
        if self.plot is not None:
            check_plot("--plot", self.plot)


def generate_all(options: GenerateOptions, ctx: ParallelContext) -> None:
    prompts = _share_prompts(options, ctx)
    sampling = _sampling(options)
    tokenizer = load_tokenizer(options.model)
    if options.chat and not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {options.model} has no chat template: omit --chat")
    texts = _apply_chat(tokenizer, prompts, options.system) if options.chat else prompts
    ids = [_tokenize(tokenizer, text, chat=options.chat) for text in texts]

    model = load_model(options, ctx, options.expert_placement)
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


def report_communication(options: ReportOptions, ctx: ParallelContext) -> None:
    tokenizer = load_tokenizer(options.model)
    ids = [_tokenize(tokenizer, text, chat=False) for text in _share_prompts(options, ctx)]
    report = error_report(load_model(options, ctx), ids)
    if ctx.rank == 0:
        print(report.to_json() if options.as_json else report.to_table())
        if options.plot is not None:
            report.plot(options.plot)


# ---------------------------------------------------------------------------------------- inputs


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


def _share_prompts(options: PromptOptions, ctx: ParallelContext) -> list[str]:
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
        "dtype": dtype_name(model.dtype),
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
