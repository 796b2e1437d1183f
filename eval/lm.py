"""`CPQwen3LM`: the lm-eval harness on context-, tensor- and data-parallel ranks.

What a prompt is made of, where it is truncated and where an answer is cut is lm-eval's own `hf`
model, whose class this one extends. How tokens are run is `qwen3cp.eval.batching`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, hash_args
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from qwen3cp.errors import CommunicationError, InputError
from qwen3cp.eval.batching import (
    Batch,
    Generated,
    Run,
    Scored,
    Tokens,
    check_room,
    longest,
    sharing_order,
)
from qwen3cp.eval.ranks import Ranks, report_of
from qwen3cp.kv_cache import DEFAULT_PAGE_SIZE, PagedKVCache
from qwen3cp.model import CPQwen3MoeForCausalLM
from qwen3cp.options import RankOptions, moe_form
from qwen3cp.parallel import ParallelContext
from qwen3cp.version import __version__

__all__ = ["CPQwen3LM"]

logger = logging.getLogger("qwen3cp")

MAX_ROWS = 256
"""Documents in the batch with batch_size=auto, if the cache has room for so many."""
PREFILL_TOKENS = 4096
MAX_GEN_TOKS = 256
NPU_MEMORY = 0.8
"""Of what the loaded model leaves free on an NPU, the share that the cache takes."""
CPU_BYTES = 1 << 30
"""Of the cache on a CPU."""
REFUSED = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "guidance_scale",
    "max_time",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "return_dict_in_generate",
    "stop_strings",
    "streamer",
    "watermarking_config",
)
"""Generation arguments that transformers takes and continuous batching does not."""


@dataclass(frozen=True, kw_only=True)
class _Input:
    """A run as it travels to all ranks."""

    tokens: Tokens
    first_wanted: int
    choices: tuple[int, ...] = ()
    max_new_tokens: int = 0
    setting: int = 0


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """How documents are generated: one for each set of generation arguments."""

    until: tuple[str, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What all ranks run together: everything that one call of the harness asks for."""

    kind: str
    inputs: list[_Input]
    truncated: set[tuple[Any, Any]]
    settings: list[_Setting] = field(default_factory=list)
    seed: int = 0

    def digest(self) -> bytes:
        """Equal on two ranks only if they ask for the same."""
        digest = hashlib.blake2b(f"{self.kind} {self.settings}".encode())
        for x in self.inputs:
            digest.update(x.tokens.tobytes())
            shape = (len(x.tokens), x.first_wanted, x.choices, x.max_new_tokens, x.setting)
            digest.update(repr(shape).encode())
        return digest.digest()


@dataclass(frozen=True)
class _Stop:
    """The first rank has no more calls; with what ended it, if it was an error."""

    report: tuple[type[Exception], str] | None


Answer = Scored | Generated
Finish = Callable[[int, Answer], list[Instance]]
"""Takes the answer to an input; returns the requests that have theirs now."""


_HFLM: Any = HFLM  # whose type its registration hides


class CPQwen3LM(_HFLM):
    """Qwen3-MoE on cp x tp ranks, which are one worker to the harness, rank 0 of 1.

    With replicas (dp) the documents of a call are divided over them, and the answers gathered.
    Prompts, truncation and stop strings are those of lm-eval's `hf`.

    Two ways to run it. Either every rank runs the harness and calls it with the same requests, or
    only the first does, inside `leading()`, while the others `serve()`; `qwen3cp eval` does the
    latter. Constructor and requests are collective over all ranks of all replicas.

    Args:
        pretrained: a folder or hub id, or a loaded model, whose context is then used.
        parallel_context: of a model that is to be loaded; None is made from the world with the
            arguments after it, which are as those of `qwen3cp eval`.
        dtype: as of `CPQwen3MoeForCausalLM.from_pretrained`.
        device: cpu, npu or npu:N; None, and the harness's default cuda:0, are the current NPU where
            there is one, else the CPU.
        tokenizer: None is that of the checkpoint.
        max_length: tokens of a prompt and its answer; None is what the config says.
        max_gen_toks: new tokens, where a task does not say how many.
        batch_size: documents in the batch; "auto" is as many as the cache has room for, up to
            max_batch_size.
        cache_tokens: tokens of the KV cache, on each rank; None is by the free memory on an NPU and
            1 GiB on a CPU, the same on all ranks.
        prefill_tokens: tokens of one prefill; longer prompts are run in chunks.
        think_end_token, enable_thinking, chat_template_args, add_bos_token, prefix_token_id,
        truncation, use_fast_tokenizer, trust_remote_code: as of `hf`; code of a repository is only
            ever run for its tokenizer.

    Raises:
        InputError: an argument that is none of these, or does not fit.
    """

    def __init__(
        self,
        pretrained: str | CPQwen3MoeForCausalLM,
        *,
        parallel_context: ParallelContext | None = None,
        cp: int = 1,
        tp: int = 1,
        dp: int = 1,
        moe: str = "tp",
        exchange: str = "auto",
        int8: str = "exact",
        int8_kv: bool = False,
        group_size: int | None = None,
        min_bytes: int | None = None,
        skip_layers: str | int | None = None,
        timeout: float | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str = "main",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        use_fast_tokenizer: bool = True,
        trust_remote_code: bool = False,
        truncation: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise InputError(f"model_args: {', '.join(sorted(unknown))}: there is no such argument")
        for name, value in (
            ("max_length", max_length),
            ("max_gen_toks", max_gen_toks),
            ("max_batch_size", max_batch_size),
            ("cache_tokens", cache_tokens),
            ("prefill_tokens", prefill_tokens),
        ):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        max_rows = _max_rows(batch_size, max_batch_size)
        if enable_thinking and think_end_token is None:
            raise InputError(
                "enable_thinking=True needs think_end_token, such as </think>, so that an answer "
                "can be told from the thinking before it"
            )
        if isinstance(pretrained, str):
            if parallel_context is None:
                options = RankOptions(
                    model=pretrained,
                    cp=cp,
                    tp=tp,
                    dp=dp,
                    moe=moe,
                    exchange=exchange,
                    dtype=str(dtype).removeprefix("torch."),
                    timeout=timeout,
                    int8=int8,
                    int8_kv=int8_kv,
                    group_size=group_size,
                    min_bytes=min_bytes,
                    skip_layers=None if skip_layers is None else str(skip_layers),
                )
                options.check()
                parallel_context = ParallelContext.from_world(
                    cp, tp, dp, moe=moe_form(moe), comm=options.comm(), timeout=timeout
                )
            model = CPQwen3MoeForCausalLM.from_pretrained(
                pretrained,
                parallel_context=parallel_context,
                dtype=dtype,
                device=_device(device),
                revision=revision,
            )
            tokenizer = pretrained if tokenizer is None else tokenizer
        else:
            model = pretrained
        with _quiet("lm_eval.models.huggingface"):  # it warns of arguments that are honoured here
            super().__init__(
                pretrained=cast(Any, model),
                tokenizer=cast(Any, tokenizer),
                revision=revision,
                use_fast_tokenizer=use_fast_tokenizer,
                trust_remote_code=trust_remote_code,
                truncation=truncation,
                add_bos_token=add_bos_token,
                prefix_token_id=prefix_token_id,
                max_length=max_length,
                batch_size=batch_size,
                think_end_token=think_end_token,
                enable_thinking=enable_thinking,
                chat_template_args=chat_template_args,
            )
        self.pretrained = str(model.name_or_path)
        self.max_batch_size = max_rows
        self._max_gen_toks = max_gen_toks
        if max_length is not None and max_length > model.max_sequence_length:
            model.max_sequence_length = max_length
        self._prefill_tokens = prefill_tokens
        self._ranks = Ranks(model.parallel_context)
        pages = min(self._ranks.gather(_num_pages(model, cache_tokens)))
        self.kv_cache: PagedKVCache = model.new_kv_cache(num_pages=pages)
        self.truncated: set[tuple[Any, Any]] = set()
        """(task, document) of those whose prompts were truncated on the left."""
        self._tokens: dict[str, dict[str, list[Any]]] = {}
        self._leads = self._others_serve = False

    @property
    def model(self) -> CPQwen3MoeForCausalLM:
        return cast(Any, self._model)

    @property
    def max_gen_toks(self) -> int:
        return self._max_gen_toks

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank, of all replicas, that leads, writes and prints."""
        return self._ranks.is_first

    # -------------------------------------------------------------------------------- the ranks

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On the first rank: the block runs the harness, while the other ranks `serve`.

        Collective over all ranks. If the block raises, the other ranks' `serve` does.
        """
        assert self.is_first
        with self._ranks.patient():
            self._leads = self._others_serve = True
            try:
                yield
            except BaseException as error:
                if self._others_serve:
                    self._ranks.share(_Stop(report_of(error)))
                raise
            else:
                self._ranks.share(_Stop(None))
            finally:
                self._leads = self._others_serve = False

    def serve(self) -> None:
        """On the other ranks: runs what the first rank asks for, until its `leading` block ends.

        Collective over all ranks.

        Raises:
            CommunicationError: the first rank's block raised.
        """
        with self._ranks.patient():
            while not isinstance(call := self._ranks.share(cast(Any, None)), _Stop):
                self._ranks.fail_together(None)
                self._execute(call, lambda index, answer: None)
            if call.report is not None:
                raise CommunicationError(f"the first rank has stopped: {call.report[1]}")

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Takes the harness's cache of answers, which one rank must read for all."""
        if self._ranks.size > 1 and not self._leads:
            raise InputError(
                "use_cache: each of several ranks would read a cache of its own, and run other "
                "requests than the rest; use `qwen3cp eval`, or lm.leading() and lm.serve()"
            )
        super().set_cache_hook(cache_hook)

    def _together(
        self, prepare: Callable[[], _Call], finish: Finish, requests: list[Instance], quiet: bool
    ) -> None:
        """Has all ranks run what this rank's requests amount to; each answer goes to `finish`."""
        self._others_serve = False  # until the call has succeeded
        call, error = None, None
        try:
            call = prepare()
        except Exception as caught:  # the other ranks have to hear of it, whatever it is
            error = caught
        first = self._ranks.share(call)
        if error is None and (first is None or call is None or first.digest() != call.digest()):
            error = InputError(
                "this rank was given other requests than the first rank: every rank must run the "
                "harness with the same arguments and seeds"
            )
        self._ranks.fail_together(error)
        assert call is not None and first is not None
        self.truncated |= call.truncated
        if call.truncated and self.is_first:
            logger.warning(
                f"{len(call.truncated)} documents are longer than the model allows, "
                f"{self.max_length} tokens: the beginning of each is left out"
            )
        with _Progress(self, requests, quiet or not self.is_first) as progress:

            def answered(index: int, answer: Answer) -> None:
                for request in finish(index, answer):
                    progress.answered(request)

            self._execute(first, answered, progress)  # with the first rank's seed
        self._others_serve = self._leads

    def _execute(
        self,
        call: _Call,
        finish: Callable[[int, Answer], object],
        progress: _Progress | None = None,
    ) -> None:
        """Runs this replica's share of a call; every answer goes to `finish`, also the others'."""
        ranks = self._ranks
        mine = _shares(call.inputs, ranks.dp_size)[ranks.dp_rank]
        batch = Batch(
            self.model,
            self.kv_cache,
            max_rows=self.max_batch_size,
            prefill_tokens=self._prefill_tokens,
            on_step=lambda tokens: None if progress is None else progress.step(tokens),
        )
        settings = [_Rule(self, setting) for setting in call.settings]
        mailbox = ranks.mailbox() if ranks.dp_size > 1 else None
        answers: dict[int, Answer] = {}
        delivered: set[int] = set()
        error = None
        try:
            # on every replica, also for the documents of others
            check_room(self.kv_cache, [longest(x) for x in call.inputs])
            runs = [self._run(call, i, settings) for i in mine]
            for which, answer in batch.run(runs):
                answers[mine[which]] = answer
                finish(mine[which], answer)
                if mailbox is not None:
                    mailbox.send((mine[which], answer))
                    for index, theirs in mailbox.take():
                        delivered.add(index)
                        finish(index, theirs)
        except Exception as caught:
            if mailbox is None:
                raise
            error = caught
        if mailbox is not None:
            ranks.fail_together(error)
            of_ranks = ranks.gather(answers if ranks.speaks_for_replica else {})
            for index, answer in (item for each in of_ranks for item in each.items()):
                if index not in answers and index not in delivered:
                    finish(index, answer)

    def _run(self, call: _Call, index: int, rules: list[_Rule]) -> Run:
        source = call.inputs[index]
        if not source.max_new_tokens:
            return Run(
                tokens=source.tokens, first_wanted=source.first_wanted, choices=source.choices
            )
        rule = rules[source.setting]
        return Run(
            tokens=source.tokens,
            first_wanted=source.first_wanted,
            max_new_tokens=source.max_new_tokens,
            ends=rule.ends,
            processors=rule.processors(len(source.tokens)),
            # by the document's place, so that batches and replicas make no difference
            seed=hash((call.seed, index)) & (2**63 - 1) if rule.samples else None,
        )

    # -------------------------------------------------------------------------------- requests

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each prompt until one of its stop strings. Collective over all ranks."""
        texts: list[Any] = [None] * len(requests)

        def finish(index: int, answer: Answer) -> list[Instance]:
            assert isinstance(answer, Generated)
            context, gen_kwargs = cast(Any, requests[index].args)
            texts[index] = self._text(answer.tokens, self._until(gen_kwargs))
            self._keep("generate_until", requests[index], answer.tokens, answer.logprobs)
            self.cache_hook.add_partial("generate_until", (context, gen_kwargs), texts[index])
            return [requests[index]]

        self._together(lambda: self._generation(requests), finish, requests, disable_tqdm)
        return texts

    def tokens_of(self, method: str, arguments: Any) -> dict[str, list[Any]] | None:
        """What was generated or scored for a request of one of the three methods: `tokens` and
        `logprobs`, natural logarithms by the model's own logits.

        Generated tokens include the one that ended the answer; of a context and its continuation
        they are the continuation, of a whole text all that are scored. From this run, or from the
        harness's cache of answers; None if neither has them.
        """
        key = hash_args(f"{method}_tokens", arguments)
        cache = self.cache_hook.dbdict
        if key not in self._tokens and cache is not None and key in cache:
            return cast(Any, cache)[key]
        return self._tokens.get(key)

    def _keep(
        self, method: str, request: Instance, tokens: list[int], logprobs: list[float]
    ) -> None:
        kept = {"tokens": tokens, "logprobs": [round(value, 6) for value in logprobs]}
        self._tokens[hash_args(f"{method}_tokens", request.args)] = kept
        self.cache_hook.add_partial(f"{method}_tokens", request.args, kept)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores each continuation of a context. Collective over all ranks."""
        results: list[Any] = [None] * len(requests)
        parts: list[list[_Part]] = []

        def prepare() -> _Call:
            if self.enable_thinking:
                raise InputError(
                    "enable_thinking=True cannot be used with tasks that score continuations"
                )
            return self._continuations(requests, parts)

        def finish(index: int, answer: Answer) -> list[Instance]:
            for part in parts[index]:
                request = requests[part.request]
                logprobs, greedy = part.score(answer)
                results[part.request] = (sum(logprobs), greedy)
                self._keep("loglikelihood", request, part.continuation, logprobs)
                self.cache_hook.add_partial("loglikelihood", request.args, results[part.request])
            return [requests[part.request] for part in parts[index]]

        self._together(prepare, finish, requests, disable_tqdm)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores each whole text, in windows as long as the model allows. Collective over all
        ranks."""
        results = [0.0] * len(requests)
        missing = [0] * len(requests)
        scored: list[dict[int, tuple[list[int], list[float]]]] = [{} for _ in requests]
        parts: list[list[_Part]] = []

        def prepare() -> _Call:
            windows = [
                (index, utils.make_disjoint_window(window))
                for index, request in enumerate(requests)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(cast(Any, request.args)[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for index, _ in windows:
                missing[index] += 1
            return self._scoring("loglikelihood_rolling", requests, windows, parts)

        def finish(index: int, answer: Answer) -> list[Instance]:
            finished = []
            for part in parts[index]:
                request = requests[part.request]
                scored[part.request][part.window] = (part.continuation, part.score(answer)[0])
                missing[part.request] -= 1
                if missing[part.request] == 0:
                    finished.append(request)
                    windows = [scored[part.request][i] for i in sorted(scored[part.request])]
                    tokens = [token for window, _ in windows for token in window]
                    logprobs = [value for _, window in windows for value in window]
                    results[part.request] = sum(logprobs)
                    self._keep("loglikelihood_rolling", request, tokens, logprobs)
                    self.cache_hook.add_partial(
                        "loglikelihood_rolling", request.args, results[part.request]
                    )
            return finished

        self._together(prepare, finish, requests, disable_tqdm)
        return results

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("`loglikelihood` runs the tokens of all its requests at once")

    # --------------------------------------------------------------------------- tokens of them

    def _generation(self, requests: list[Instance]) -> _Call:
        settings: dict[str, tuple[int, int, int | None]] = {}
        known: list[_Setting] = []
        inputs, truncated = [], set()
        for request in requests:
            context, gen_kwargs = cast(Any, request.args)
            key = json.dumps(gen_kwargs, sort_keys=True, default=str)
            if key not in settings:
                kwargs, most, whole = read_gen_kwargs(
                    gen_kwargs, self.max_gen_toks, self.max_length
                )
                known.append(_Setting(until=tuple(self._until(gen_kwargs)), kwargs=kwargs))
                _Rule(self, known[-1])
                settings[key] = (len(known) - 1, most, whole)
            setting, most, whole = settings[key]
            ids = self.tok_batch_encode([context], truncation=self.truncation)[0][0]
            tokens = ids.numpy().astype(np.int32)
            if len(tokens) > self.max_length - most:
                tokens = tokens[-(self.max_length - most) :]
                truncated.add(document_of(request))
            if whole is not None:
                most = whole - len(tokens)
            if len(tokens) == 0 or most < 1:
                raise InputError(
                    f"document {request.doc_id} of {request.task_name} has "
                    + (
                        "an empty prompt"
                        if len(tokens) == 0
                        else f"{len(tokens)} tokens, which is all that max_length={whole} allows"
                    )
                )
            inputs.append(
                _Input(
                    tokens=tokens,
                    first_wanted=len(tokens) - 1,
                    max_new_tokens=most,
                    setting=setting,
                )
            )
        return _Call(
            kind="generate_until",
            inputs=inputs,
            truncated=truncated,
            settings=known,
            seed=torch.initial_seed(),
        )

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `TemplateLM.loglikelihood`: an empty context is the prefix token."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation, add_special_tokens=False)
        if tokens and tokens[0] == self.prefix_token_id:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _continuations(self, requests: list[Instance], parts: list[list[_Part]]) -> _Call:
        pairs = [self._encode_request(*cast(Any, request.args)) for request in requests]
        return self._scoring("loglikelihood", requests, list(enumerate(pairs)), parts)

    def _scoring(
        self,
        kind: str,
        requests: list[Instance],
        pairs: list[tuple[int, tuple[list[int], list[int]]]],
        parts: list[list[_Part]],
    ) -> _Call:
        """Runs of (request, (context, continuation)): those that differ in their last token are
        one. Says in `parts` what of each run's answer is which request's."""
        runs: dict[bytes, int] = {}
        tokens: list[Tokens] = []
        choices: list[list[int]] = []
        truncated = set()
        for window, (index, (context, continuation)) in enumerate(pairs):
            if not context or not 0 < len(continuation) <= self.max_length:
                request = requests[index]
                raise InputError(
                    f"document {request.doc_id} of {request.task_name}: a continuation must be of "
                    f"1 to {self.max_length} tokens, after a context of at least one; it has "
                    f"{len(continuation)} after {len(context)}"
                )
            if len(context) + len(continuation) > self.max_length + 1:
                truncated.add(document_of(requests[index]))
            whole = np.asarray([*context, *continuation], np.int32)[-(self.max_length + 1) :]
            key = whole[:-1].tobytes()
            run = runs.setdefault(key, len(runs))
            if run == len(tokens):
                tokens.append(whole[:-1])
                choices.append([])
                parts.append([])
            last = continuation[-1]
            if last not in choices[run]:
                choices[run].append(last)
            parts[run].append(_Part(index, window, continuation, choices[run].index(last)))
        inputs = []
        for run, its_parts in enumerate(parts):
            for part in its_parts:
                part.num_choices = len(choices[run])
            first = len(tokens[run]) - max(len(part.continuation) for part in its_parts)
            inputs.append(
                _Input(tokens=tokens[run], first_wanted=first, choices=tuple(choices[run]))
            )
        return _Call(kind=kind, inputs=inputs, truncated=truncated)

    def _until(self, gen_kwargs: dict[str, Any]) -> list[str]:
        until: Any = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))["until"]
        until = [stop for stop in until if stop is not None]
        eos = self.tok_decode(cast(Any, self.eot_token_id), skip_special_tokens=False)
        return handle_stop_sequences(until, eos=cast(Any, eos))

    def _text(self, tokens: list[int], until: list[str]) -> str:
        """The answer in the tokens, as `HFLM.generate_until` takes it out of them."""
        think_end = self.think_end_token
        if isinstance(think_end, int) and think_end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think_end) :]
        text = str(self.tok_decode(cast(Any, tokens)))
        if isinstance(think_end, int):
            text = text.lstrip()
        return postprocess_generated_text(
            text, until, think_end if isinstance(think_end, str) else None
        )

    # ---------------------------------------------------------------------------------- report

    def find_truncated(self, requests: Seq[Instance]) -> set[tuple[Any, Any]]:
        """(task, document) of those whose prompts are truncated on the left. Not collective."""
        of_kind: dict[str, list[Instance]] = {}
        for request in requests:
            of_kind.setdefault(request.request_type, []).append(request)
        truncated = set()
        if "generate_until" in of_kind:
            truncated |= self._generation(of_kind["generate_until"]).truncated
        if "loglikelihood" in of_kind:  # rolled texts go in windows
            truncated |= self._continuations(of_kind["loglikelihood"], []).truncated
        return truncated

    def get_model_info(self) -> dict[str, Any]:
        """What the harness adds to the `config` of its results."""
        ctx = self.model.parallel_context
        is_folder = Path(self.pretrained).exists()
        return {
            "model_num_parameters": num_parameters(self.model),
            "model_dtype": str(self.model.dtype).removeprefix("torch."),
            "model_revision": self.revision,
            "model_sha": "" if is_folder else super().get_model_info()["model_sha"],
            "topology": {"cp": ctx.cp_size, "tp": ctx.tp_size, "dp": ctx.dp_size, "moe": ctx.moe},
            "comm": asdict(ctx.comm),
            "kv_cache": {
                "num_pages": self.kv_cache.num_pages,
                "page_size": self.kv_cache.page_size,
                "max_rows": self.max_batch_size,
            },
            "versions": {
                "qwen3cp": __version__,
                **{name: _version(name) for name in ("torch", "torch_npu", "transformers")},
            },
            "truncated_documents": len(self.truncated),
        }


@dataclass
class _Part:
    """A request's part of a run's answer."""

    request: int
    window: int
    """Which of all that are scored: those of a rolled text in their order."""
    continuation: list[int]
    choice: int
    """Which of the tokens after the last is its own last."""
    num_choices: int = 0

    def score(self, answer: Answer) -> tuple[list[float], bool]:
        """The continuation's log-probabilities, and whether all of it is the likeliest."""
        assert isinstance(answer, Scored)
        before = len(answer.logprobs) - self.num_choices
        places = [*range(before - (len(self.continuation) - 1), before), before + self.choice]
        logprobs = [answer.logprobs[place] for place in places]
        return logprobs, all(answer.greedy[place] for place in places)


class _Rule:
    """A `_Setting` as this rank applies it."""

    def __init__(self, lm: CPQwen3LM, setting: _Setting) -> None:
        self._model: Any = lm.model
        self._config, _ = self._model._prepare_generation_config(
            None, **checked_generation(setting.kwargs)
        )
        _check_mode(self._config)
        self._model._prepare_special_tokens(self._config, True, device=self._model.device)
        self.samples = bool(self._config.do_sample)
        eos = self._config.eos_token_id
        self._stop_ids = {eos} if isinstance(eos, int) else set(eos or ())
        self._stop_texts = setting.until
        self._tokenizer = cast(Any, lm.tokenizer)
        # A token has a byte of text at least, so that the stop string is whole in so many.
        self._lookback = max((len(text.encode()) for text in self._stop_texts), default=0) + 2
        self._may_end: dict[int, bool] = {}

    def processors(self, prompt_length: int) -> Any:
        """transformers' logits processors, for one document; None if there are none."""
        processors = self._model._get_logits_processor(
            generation_config=self._config,
            input_ids_seq_length=prompt_length,
            device=cast(Any, self._model.device),
            model_kwargs={},
        )
        return processors if self.samples or len(processors) else None

    def ends(self, new: list[int]) -> bool:
        """Whether the last of the new tokens ends the answer, alone or with those before it."""
        last = new[-1]
        if last in self._stop_ids:
            return True
        if last not in self._may_end:
            self._may_end[last] = self._completes(last)
        if not self._may_end[last]:
            return False
        text = self._tokenizer.decode(new[-self._lookback :])
        return any(stop in text for stop in self._stop_texts)

    def _completes(self, token: int) -> bool:
        """Whether a stop string can end in the text of the token, or in a character of which it is
        a part."""
        text = self._tokenizer.decode([token])
        return "\ufffd" in text or any(not s or s[-1] in text for s in self._stop_texts)


class _Progress:
    """A bar over the documents of a call: how many, tokens per second, pages in use."""

    def __init__(self, lm: CPQwen3LM, requests: list[Instance], disable: bool) -> None:
        self._cache = lm.kv_cache
        self._missing = Counter(document_of(request) for request in requests)
        self._bar = tqdm(total=len(self._missing), unit="doc", disable=disable, desc="Documents")
        self._tokens, self._start = 0, time.perf_counter()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self, tokens: int) -> None:
        """A forward has run so many tokens."""
        self._tokens += tokens
        seconds = time.perf_counter() - self._start
        pages = self._cache.num_pages - 1
        self._bar.set_postfix_str(
            f"{self._tokens / seconds:.0f} tokens/s, "
            f"{pages - self._cache.num_free_pages}/{pages} pages",
            refresh=False,
        )
        self._bar.update(0)

    def answered(self, request: Instance) -> None:
        document = document_of(request)
        self._missing[document] -= 1
        if self._missing[document] == 0:
            self._bar.update()


def read_gen_kwargs(
    gen_kwargs: dict[str, Any], max_gen_toks: int, max_length: int
) -> tuple[dict[str, Any], int, int | None]:
    """A task's arguments: (those for transformers' generation, new tokens, max_length or None).

    The first are for `checked_generation` to check; the last limits prompt and answer together.

    Args:
        max_gen_toks: new tokens, where the arguments do not say how many.
        max_length: tokens that the model allows, a prompt and its answer.

    Raises:
        InputError: numbers that are none, or that leave no token to a prompt.
    """
    try:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, max_gen_toks))
    except (TypeError, ValueError) as error:
        raise InputError(f"gen_kwargs: {error}") from error
    kwargs.pop("until")
    most = kwargs.pop("max_gen_toks")
    if not 0 < most < max_length:
        raise InputError(
            f"max_gen_toks={most} leaves no room for a prompt: the model allows {max_length} "
            "tokens in all (max_length)"
        )
    return kwargs, most, kwargs.pop("max_length", None)


def checked_generation(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What transformers' generation is to be told, of the first that `read_gen_kwargs` returns.

    Raises:
        InputError: an argument that does not exist, or that continuous batching cannot honour.
    """
    given = dict(kwargs)
    refused = sorted(name for name in REFUSED if given.get(name) is not None)
    if refused:
        raise InputError(f"gen_kwargs: {', '.join(refused)} cannot be honoured here; leave it out")
    if not given["do_sample"]:
        given.pop("temperature", None)
    elif not given.get("temperature"):
        raise InputError("gen_kwargs: do_sample=True needs a temperature above 0")
    config = GenerationConfig()
    try:
        unused = config.update(**given)
        config.validate()
    except (TypeError, ValueError) as error:
        raise InputError(f"gen_kwargs: {error}") from error
    if unused:
        raise InputError(f"gen_kwargs: {', '.join(sorted(unused))}: there is no such argument")
    _check_mode(config)
    return given


def _check_mode(config: GenerationConfig) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"gen_kwargs, or the checkpoint's generation_config, ask for {mode.value}; only greedy "
            "search and sampling can be run"
        )


def document_of(request: Instance) -> tuple[Any, Any]:
    """What the harness calls a document: its task, and its place in it."""
    return request.task_name, request.doc_id


def num_parameters(model: CPQwen3MoeForCausalLM) -> int:
    """Of the whole model, not of this rank's part."""
    with init_empty_weights():
        whole = CPQwen3MoeForCausalLM(model.config)
    return whole.num_parameters()


def _shares(inputs: Seq[_Input], num_replicas: int) -> list[list[int]]:
    """Which inputs each replica runs: neighbours in sharing order, about as many tokens each."""
    order = sharing_order([x.tokens for x in inputs])
    costs = np.cumsum([len(inputs[i].tokens) + inputs[i].max_new_tokens for i in order])
    shares: list[list[int]] = [[] for _ in range(num_replicas)]
    for place, index in enumerate(order):
        # by the middle of what it costs
        middle = costs[place] - (costs[place] - (costs[place - 1] if place else 0)) / 2
        shares[min(num_replicas - 1, int(middle * num_replicas / costs[-1]))].append(index)
    return shares


def _max_rows(batch_size: int | str, max_batch_size: int | None) -> int:
    text = str(batch_size)
    if text.partition(":")[0] == "auto":
        return max_batch_size or MAX_ROWS
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"batch_size must be auto or a positive integer, got {batch_size!r}")
    return int(text)


def _device(device: str | torch.device | None) -> torch.device | None:
    name = str(device or "")
    if name in ("", "cuda", "cuda:0"):  # the harness's default
        return None
    if name.partition(":")[0] not in ("cpu", "npu"):
        raise InputError(f"device must be cpu or npu, got {name!r}")
    return torch.device(name)


def _num_pages(model: CPQwen3MoeForCausalLM, cache_tokens: int | None) -> int:
    """Pages of the cache that this rank has memory for."""
    if cache_tokens is not None:
        return 1 - (-cache_tokens // DEFAULT_PAGE_SIZE)
    num_bytes = CPU_BYTES
    if model.device.type == "npu":
        free, _ = torch.get_device_module(model.device).mem_get_info(model.device)
        num_bytes = int(free * NPU_MEMORY)
    page = model.new_kv_cache(num_pages=2)
    return max(2, num_bytes // (page.num_bytes // page.num_pages))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Drops the warnings of a logger."""
    of_library = logging.getLogger(name)
    level = of_library.level
    of_library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of_library.setLevel(level)
