"""The decoder and the language model on top of it, on one rank of a CP x TP replica.

Letters: T new tokens of a batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    Qwen3MoeConfig,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from qwen3cp import collectives, routing
from qwen3cp.batch import PaddedBatch, device_ids, host_ids
from qwen3cp.config import (
    check_supported,
    head_dim_of,
    local_config,
    local_vocabulary,
    max_length_of,
)
from qwen3cp.decoder import CPQwen3MoeDecoderLayer, add_norm
from qwen3cp.errors import InputError
from qwen3cp.kv_cache import DEFAULT_PAGE_SIZE, PagedCacheAdapter, PagedKVCache, Sequence
from qwen3cp.parallel import ForwardPhase, ParallelContext, default_device
from qwen3cp.plan import ForwardPlan
from qwen3cp.routing import ExpertPlacement, Placement

if TYPE_CHECKING:
    from qwen3cp.weights import LoadReport

__all__ = ["CPQwen3MoeForCausalLM", "CPQwen3MoeModel", "register_auto"]

_MAX_GRAPHS = 128
"""Of a compiled decode step: two for each batch size."""


class CPQwen3MoeModel(Qwen3MoeModel):
    """The decoder: embedding (whole on every rank), layers, final norm."""

    def __init__(
        self,
        config: Qwen3MoeConfig,
        *,
        parallel_context: ParallelContext | None = None,
        expert_placement: ExpertPlacement | None = None,
    ) -> None:
        ctx = ParallelContext.single() if parallel_context is None else parallel_context
        check_supported(config, ctx)
        # not transformers' constructor, which would build the whole model
        super(Qwen3MoeModel, self).__init__(config)
        self.parallel_context = ctx
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            CPQwen3MoeDecoderLayer(
                config,
                index,
                parallel_context=ctx,
                expert_placement=expert_placement.layers[index] if expert_placement else None,
            )
            for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._kv_width = local_config(config, ctx).num_key_value_heads * head_dim_of(config)
        self.max_sequence_length = max_length_of(config)
        """Tokens that a prompt and what is cached before it may have. Set it to go beyond."""
        self.post_init()

    def new_kv_cache(
        self,
        *,
        max_tokens: int | None = None,
        num_pages: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> PagedKVCache:
        """An empty cache for this rank, on the model's device, in its dtype. Not collective, but
        every rank must make the same.

        Args:
            max_tokens: tokens that one sequence can have; sequences do not share a page, so that
                several need up to a page more each.
            num_pages: instead of max_tokens: pages of the pool, the reserved page 0 included.
        """
        if (max_tokens is None) == (num_pages is None):
            raise InputError("pass either max_tokens or num_pages")
        if num_pages is None:
            assert max_tokens is not None
            if max_tokens < 1:
                raise InputError(f"max_tokens must be positive, got {max_tokens}")
            num_pages = 1 - (-max_tokens // page_size) if page_size > 0 else 2
        return PagedKVCache(
            num_layers=self.config.num_hidden_layers,
            num_pages=num_pages,
            kv_width=self._kv_width,
            dtype=self.dtype,
            device=self.device,
            page_size=page_size,
        )

    def plan(
        self,
        cache: PagedKVCache,
        sequences: Seq[Sequence],
        new_lengths: Seq[int],
        phase: ForwardPhase,
    ) -> ForwardPlan:
        """`PagedKVCache.plan` for this model's context."""
        return cache.plan(sequences, new_lengths, phase, self.parallel_context)

    def position_embeddings(self, plan: ForwardPlan) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of a plan's rows, both [1, rows, head_dim], as the layers take them."""
        return self.rotary_emb(self.embed_tokens.weight, plan.positions[None])

    def run_layers(
        self,
        hidden: torch.Tensor,
        plan: ForwardPlan,
        cache: PagedKVCache,
        *,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded rows of this rank, [rows, H], through all layers: (hidden, residual).

        The last layer's output is hidden + residual. Collective, as the layers are.

        Args:
            layer_inputs: a list to which each layer's input, [rows, H], is appended.
        """
        # in the form of the operator, for all layers at once
        cos, sin = (x.unsqueeze(2) for x in self.position_embeddings(plan))
        residual = None
        for index, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(hidden if residual is None else hidden + residual)
            hidden, residual = layer(
                hidden,
                residual,
                plan=plan,
                kv=cache.layer(index),
                position_embeddings=(cos, sin),
            )
        assert residual is not None, "a model has at least one layer"
        return hidden, residual

    @contextmanager
    def step(
        self, phase: ForwardPhase, read: Callable[[], Request]
    ) -> Iterator[tuple[Request, ForwardPlan]]:
        """One forward as a transaction: read, reserve pages, run the block, commit the tokens.

        Whatever fails, the cache is left as it was. Collective over the replica: every rank enters
        it, and if `read` or the plan fails on one rank, every rank raises before any layer runs.

        Args:
            read: checks this rank's arguments and says what to run.
        """
        ctx = self.parallel_context
        request, plan, error = None, None, None
        digest = hashlib.blake2b(digest_size=16)
        try:
            request = read()
            self._check_cache(request.cache)
            request.cache.check(request.sequences)
            self._check_lengths(request, phase)
            if phase is ForwardPhase.PREFILL:
                digest.update(request.ids.numpy().tobytes())
            plan = self.plan(request.cache, request.sequences, request.new_lengths, phase)
            digest.update(plan.digest)
            digest.update(request.wanted.numpy().tobytes())
            digest.update(ctx.comm.digest)
        except Exception as caught:  # the other ranks have to hear of it, whatever it is
            error = caught
        try:
            collectives.agree(ctx, error, digest.digest())
            assert request is not None and plan is not None
            with ctx.forward(phase), torch.no_grad():
                yield request, plan
        except BaseException:
            if request is not None and plan is not None:
                request.cache.cancel(request.sequences)
            raise
        request.cache.commit(request.sequences, request.new_lengths)

    def run(
        self,
        request: Request,
        plan: ForwardPlan,
        *,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's rows of a request through embedding and layers: (hidden, residual)."""
        ids = plan.split(request.ids).to(self.embed_tokens.weight.device)
        hidden = self.embed_tokens(ids)
        return self.run_layers(hidden, plan, request.cache, layer_inputs=layer_inputs)

    def final_hidden(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        plan: ForwardPlan,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """The final norm of some of the T new tokens, on every rank: [len(tokens), H].

        Only their rows are normed and exchanged. Collective over cp_group in PREFILL.

        Args:
            tokens: int64, on the host, the same on every rank.
        """
        owner, row = plan.owners(tokens)
        mine = row[owner == (self.parallel_context.cp_rank if plan.is_split else 0)]
        if not torch.equal(mine, torch.arange(len(hidden))):
            index = mine.to(hidden.device)
            hidden, residual = hidden[index], residual[index]
        normed = add_norm(hidden, residual, self.norm)[0]
        if not plan.is_split:
            return normed
        counts = torch.bincount(owner, minlength=plan.cp_size)
        part = normed.new_zeros(int(counts.max()), normed.shape[1])
        part[: len(normed)] = normed
        gathered = collectives.gather_rows(part, self.parallel_context, kind="logits")
        # a rank's rows lie in the order in which `tokens` names them
        place = torch.empty_like(owner)
        for rank, count in enumerate(counts.tolist()):
            place[owner == rank] = torch.arange(count)
        return gathered[(owner * len(part) + place).to(gathered.device)]

    def forward_batch(
        self,
        result_of: Callable[[torch.Tensor, torch.Tensor, ForwardPlan, torch.Tensor], torch.Tensor],
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        *,
        output_hidden_states: bool | None,
        phase: ForwardPhase | None,
        refused: dict[str, Any],
        logits_to_keep: int | torch.Tensor = 0,
        decoded: Callable[[Request, ForwardPlan], torch.Tensor | None] = lambda *_: None,
    ) -> tuple[torch.Tensor, PaddedCall, tuple[torch.Tensor, ...] | None]:
        """A transformers-style forward over a padded batch.

        Args:
            result_of: (hidden, residual, plan, tokens) -> rows of the tokens, on every rank.
            refused: arguments that must be unset.
            decoded: the rows of a request, if there is a shorter way to them; else None.

        Returns:
            The result of the kept columns, [batch, kept, ...]; the call; the hidden states of all
            columns if they are asked for.
        """
        phase = ForwardPhase.PREFILL if phase is None else phase
        wants_states = output_hidden_states or (
            output_hidden_states is None and self.config.output_hidden_states
        )
        layer_inputs: list[torch.Tensor] | None = [] if wants_states else None

        def read() -> Request:
            return self._read_batch(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                logits_to_keep,
                phase,
                refused,
            )

        states = None
        with self.step(phase, read) as (request, plan):
            rows = decoded(request, plan) if layer_inputs is None else None
            if rows is None:
                hidden, residual = self.run(request, plan, layer_inputs=layer_inputs)
                rows = result_of(hidden, residual, plan, request.wanted)
                if layer_inputs is not None:
                    every = torch.arange(len(request.ids))
                    last = self.final_hidden(hidden, residual, plan, every)
                    states = [*(plan.gather(x, self.parallel_context) for x in layer_inputs), last]
        call = request.padded
        assert call is not None
        call.past.advance(call.all_rows, call.batch.token_of_cell.shape[1], call.batch.closed)
        if states is not None:
            states = tuple(call.batch.pad(state, call.batch.token_of_cell) for state in states)
        return call.batch.pad(rows, call.cells), call, states

    def _read_batch(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
        logits_to_keep: int | torch.Tensor,
        phase: ForwardPhase,
        refused: dict[str, Any],
    ) -> Request:
        """Checks and unpads the arguments of a transformers-style forward."""
        given = [
            name for name, value in refused.items() if value is not None and value is not False
        ]
        if given:
            raise InputError(f"{', '.join(sorted(given))} cannot be honoured here; leave it out")
        if not isinstance(phase, ForwardPhase):
            raise InputError(f"phase must be a ForwardPhase, got {phase!r}")
        if input_ids is None:
            raise InputError("input_ids is missing")
        if past_key_values is not None and not isinstance(past_key_values, PagedCacheAdapter):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}; only a "
                "PagedCacheAdapter (leave it out to get one) can be used"
            )
        past = past_key_values
        if past is None:
            past = PagedCacheAdapter(self.new_kv_cache(num_pages=2), grow=True)
        batch = PaddedBatch.read(
            input_ids, attention_mask, position_ids, past, phase, self.vocab_size
        )
        all_rows = past.rows(input_ids.shape[0])
        sequences = [all_rows[row] for row in batch.rows]
        cells = batch.cells_to_keep(logits_to_keep)
        past.ensure_room(sequences, batch.lengths)
        return Request(
            cache=past.paged,
            sequences=sequences,
            new_lengths=batch.lengths,
            ids=batch.ids,
            wanted=cells[cells >= 0],
            padded=PaddedCall(batch=batch, cells=cells, past=past, all_rows=all_rows),
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        phase: ForwardPhase | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """transformers' forward: ids of all positions in, their hidden states out, on every rank.

        Collective over the replica. Arguments as of `CPQwen3MoeForCausalLM.forward`.
        """
        last, call, states = self.forward_batch(
            self.final_hidden,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            output_hidden_states=output_hidden_states,
            phase=phase,
            refused=dict(kwargs, inputs_embeds=inputs_embeds),
        )
        output = MoeModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=call.past if _use_cache(use_cache, self.config) else None,
            hidden_states=states,
        )
        return output if _returns_dict(return_dict, self.config) else output.to_tuple()

    def _check_cache(self, cache: PagedKVCache) -> None:
        if not isinstance(cache, PagedKVCache):
            raise InputError(f"cache is a {type(cache).__name__}, not a PagedKVCache")
        weight = self.embed_tokens.weight  # self.dtype would look at all parameters
        expected = (len(self.layers), self._kv_width, weight.dtype, weight.device)
        actual = (cache.num_layers, cache.kv_width, cache.dtype, cache.device)
        if actual != expected:
            raise InputError(
                f"the cache has (layers, width, dtype, device) = {actual}, this model needs "
                f"{expected}: make it with this model's new_kv_cache"
            )

    def _check_lengths(self, request: Request, phase: ForwardPhase) -> None:
        if phase is ForwardPhase.DECODE:
            empty = [i for i, s in enumerate(request.sequences) if s.length == 0]
            if empty:
                raise InputError(f"sequences {empty} are empty: prefill them first")
            return
        for i, (s, new) in enumerate(zip(request.sequences, request.new_lengths, strict=True)):
            if s.length + new > self.max_sequence_length:
                raise InputError(
                    f"sequence {i} would have {s.length + new} tokens, the model was made for "
                    f"{self.max_sequence_length}; set model.max_sequence_length to go beyond"
                )


@dataclass(frozen=True, kw_only=True)
class PaddedCall:
    """The transformers side of a request: its cells and its `past_key_values`."""

    batch: PaddedBatch
    cells: torch.Tensor
    past: PagedCacheAdapter
    all_rows: list[Sequence]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one forward is asked to run. Equal on every rank."""

    cache: PagedKVCache
    sequences: Seq[Sequence]
    new_lengths: Seq[int]
    ids: torch.Tensor
    """int64 [T]: the new tokens, sequence by sequence; on the host in PREFILL."""
    wanted: torch.Tensor
    """int64, on the host: the tokens, among the T, whose logits are asked for."""
    padded: PaddedCall | None = None


class CPQwen3MoeForCausalLM(Qwen3MoeForCausalLM):
    """Qwen3-MoE with a language-model head, over context- and tensor-parallel ranks.

    Every rank of a replica makes the same calls with the same ids and gets the same logits, bit
    for bit. `lm_head.weight` holds this rank's ceil(V / world_size) rows of the vocabulary.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        *,
        parallel_context: ParallelContext | None = None,
        expert_placement: Placement = None,
    ) -> None:
        ctx = ParallelContext.single() if parallel_context is None else parallel_context
        check_supported(config, ctx)
        # not transformers' constructor, which would build the whole model
        super(Qwen3MoeForCausalLM, self).__init__(config)
        self.parallel_context = ctx
        self.expert_placement = ExpertPlacement.of(expert_placement, config)
        self.model = CPQwen3MoeModel(
            config, parallel_context=ctx, expert_placement=self.expert_placement
        )
        self.vocab_size = config.vocab_size
        self.load_report: LoadReport | None = None
        """What `from_pretrained` read on this rank."""
        self.lm_head = nn.Linear(config.hidden_size, len(self.local_vocabulary), bias=False)
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self._compiled_step: Callable[..., torch.Tensor] | None = None
        self.post_init()

    @property
    def local_vocabulary(self) -> range:
        """The token ids whose logits this rank computes; may be empty on the last ranks."""
        return local_vocabulary(self.config, self.parallel_context)

    @property
    def _vocabulary_shard(self) -> int:
        return -(-self.config.vocab_size // self.parallel_context.world_size)

    @property
    def max_sequence_length(self) -> int:
        """Tokens that a prompt and what is cached before it may have; may be set."""
        return self.model.max_sequence_length

    @max_sequence_length.setter
    def max_sequence_length(self, length: int) -> None:
        self.model.max_sequence_length = length

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        parallel_context: ParallelContext | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        config: Qwen3MoeConfig | None = None,
        expert_placement: Placement = None,
        share_reads: bool = False,
        progress: bool | None = None,
        **hub_kwargs: Any,
    ) -> CPQwen3MoeForCausalLM:
        """Loads this rank's part of a checkpoint; reads only the slices that it holds.

        Collective over the replica: every rank must call it; if it fails on one, all raise.

        Args:
            pretrained_model_name_or_path: a local folder with config.json and safetensors files,
                or the id of a repository on the Hugging Face hub.
            dtype: of the parameters and the cache; "auto" is what the config says. float32 and
                bfloat16 on a CPU, bfloat16 on an NPU.
            device: None is the current NPU where there is one, else the CPU.
            config: instead of the checkpoint's config.json.
            expert_placement: which expert is in which place: a permutation of the experts, one for
                each layer, an `ExpertPlacement`, or its JSON file. With moe="ep" it says which rank
                has which experts.
            share_reads: each CP rank reads a part of what all CP ranks hold, and passes it on to
                the others. Faster where files are slower than the links between the ranks, such as
                a disk of the network; ranks of one machine share what the system has cached.
            progress: a bar of bytes and rate on rank 0's stderr; None shows it on a terminal.
            hub_kwargs: revision, token, cache_dir, local_files_only, for a hub id.

        Raises:
            CheckpointError, UnsupportedConfigError, ParallelConfigError, InputError
        """
        from qwen3cp.weights import load_pretrained

        return load_pretrained(
            cls,
            os.fspath(pretrained_model_name_or_path),
            ParallelContext.single() if parallel_context is None else parallel_context,
            dtype=dtype,
            device=default_device() if device is None else torch.device(device),
            config=config,
            expert_placement=expert_placement,
            share_reads=share_reads,
            progress=progress,
            # AutoModelForCausalLM passes all of its options, most of them unset
            hub_kwargs={name: value for name, value in hub_kwargs.items() if value},
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        max_shard_size: int | str = "5GB",
        **refused: Any,
    ) -> None:
        """Writes the whole model as one checkpoint, which transformers loads bit for bit, too.

        Collective over the replica: every rank must call it. Rank 0 writes, and is sent the other
        ranks' parts one by one; replicas other than the first do nothing.

        The folder appears, or changes from the old checkpoint to the new, in one step when all is
        written; other files in it, such as a tokenizer, stay. If anything fails, it is as it was.

        Args:
            max_shard_size: of a file, in bytes or such as "5GB".
            refused: other arguments of transformers' method, which must be unset.

        Raises:
            InputError: an argument cannot be honoured.
            CheckpointError: on every rank, if rank 0 cannot write.
        """
        from qwen3cp.weights.saver import save_pretrained

        given = sorted(name for name, value in refused.items() if value is not None)
        if given:
            raise InputError(f"save_pretrained does not take {', '.join(given)}; leave it out")
        save_pretrained(self, Path(save_directory), max_shard_size)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """With tied embeddings, makes lm_head.weight this rank's rows of the embedding."""
        if self.config.tie_word_embeddings:
            rows = self.local_vocabulary
            embedding = self.model.embed_tokens.weight
            self.lm_head.weight = nn.Parameter(
                embedding.data[rows.start : rows.stop], requires_grad=embedding.requires_grad
            )

    def new_kv_cache(
        self,
        *,
        max_tokens: int | None = None,
        num_pages: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
    ) -> PagedKVCache:
        """As `CPQwen3MoeModel.new_kv_cache`."""
        return self.model.new_kv_cache(
            max_tokens=max_tokens, num_pages=num_pages, page_size=page_size
        )

    def plan(
        self,
        cache: PagedKVCache,
        sequences: Seq[Sequence],
        new_lengths: Seq[int],
        phase: ForwardPhase,
    ) -> ForwardPlan:
        """As `CPQwen3MoeModel.plan`."""
        return self.model.plan(cache, sequences, new_lengths, phase)

    def prefill(
        self,
        cache: PagedKVCache,
        sequences: Seq[Sequence],
        prompts: Seq[Seq[int] | torch.Tensor],
    ) -> torch.Tensor:
        """Appends a run of tokens to each sequence, split over the CP ranks.

        A sequence that holds tokens is continued: chunked prefill and prefix reuse are calls like
        any other. Collective over the replica: every rank passes the same.

        Args:
            prompts: for each sequence its new token ids, at least one: int64 or int32, 1-D, or a
                list. Read on the host.

        Returns:
            float32 [sequences, V]: the logits of the token after each sequence's last.

        Raises:
            InputError, KVCacheFullError: on every rank, with the cache as it was.
        """

        def read() -> Request:
            if len(sequences) != len(prompts):
                raise InputError(f"{len(sequences)} sequences, but {len(prompts)} prompts")
            if len(prompts) == 0:
                raise InputError("prefill needs at least one sequence, got an empty batch")
            ids = [host_ids(p, f"prompt {i}", self.vocab_size) for i, p in enumerate(prompts)]
            lengths = [len(x) for x in ids]
            last = torch.tensor(lengths).cumsum(0) - 1
            return Request(
                cache=cache,
                sequences=sequences,
                new_lengths=lengths,
                ids=torch.cat(ids),
                wanted=last,
            )

        return self._next_token_logits(ForwardPhase.PREFILL, read)

    def decode(
        self,
        cache: PagedKVCache,
        sequences: Seq[Sequence],
        next_ids: Seq[int] | torch.Tensor,
    ) -> torch.Tensor:
        """Appends one token to each sequence; every CP rank runs all of them.

        Nothing is read back from the device. Collective over the replica: every rank passes the
        same.

        Args:
            next_ids: int64 or int32 [sequences], on the model's device or the host, or a list.

        Returns:
            float32 [sequences, V]: the logits of the token after it.

        Raises:
            InputError, KVCacheFullError: on every rank, with the cache as it was. Ids on an NPU
                are not checked against the vocabulary, which would have to wait for it.
        """

        def read() -> Request:
            if isinstance(next_ids, torch.Tensor) and next_ids.device.type != "cpu":
                ids = device_ids(next_ids, "next_ids")
            else:
                ids = host_ids(next_ids, "next_ids", self.vocab_size)
            if len(sequences) != len(ids):
                raise InputError(f"{len(sequences)} sequences, but {len(ids)} next ids")
            return Request(
                cache=cache,
                sequences=sequences,
                new_lengths=[1] * len(ids),
                ids=ids,
                wanted=torch.arange(len(ids)),
            )

        return self._next_token_logits(ForwardPhase.DECODE, read)

    def decode_step(
        self, ids: torch.Tensor, plan: ForwardPlan, cache: PagedKVCache
    ) -> torch.Tensor:
        """The device's part of a DECODE, and what `compile_decode` compiles: a pure function of
        tensors and lengths but for the cache, where it writes keys and values.

        Collective over tp_group and world_group. `decode` does the rest before and after it: it
        checks, reserves pages, makes the plan, and counts the tokens.

        Args:
            ids: int64 [T], on the device.
            plan: of the DECODE phase, by `plan`.

        Returns:
            [T, V] in the model's dtype: the logits of the token after each.
        """
        hidden, residual = self.model.run_layers(self.model.embed_tokens(ids), plan, cache)
        return self._vocabulary(add_norm(hidden, residual, self.model.norm)[0])

    def compile_decode(self, **options: Any) -> None:
        """Has every DECODE of `decode`, `generate` and `forward` run `decode_step` compiled.

        Nothing is compiled yet: the first step of a batch size is, and the second once more, with
        the lengths as variables. After that no length and no size of the pool compiles again. Not
        collective, but every rank must call it.

        While `record_routing` is open, and where `forward` is asked for hidden states or not for
        all logits, a step runs eagerly.

        Args:
            options: of `torch.compile`, such as backend="aot_eager". fullgraph is True unless it is
                given; disable=True ends it.
        """
        defaults = dict(fullgraph=True, recompile_limit=_MAX_GRAPHS, isolate_recompiles=True)
        # the function, not the method: a copy of the model must not run this one's weights
        self._compiled_step = torch.compile(type(self).decode_step, **{**defaults, **options})

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        phase: ForwardPhase | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """transformers' forward over padded batches. What it cannot honour raises InputError.

        Collective over the replica: every rank passes the same.

        Args:
            input_ids: int64 or int32 [batch, columns], columns after those that are cached.
            attention_mask: [batch, cached columns + columns], 1 for tokens; each row's tokens are
                one run, with padding before or after it.
            position_ids: may only say what follows from the mask.
            past_key_values: a `PagedCacheAdapter`, such as an earlier output's.
            logits_to_keep: as of transformers: 0 all columns, n the last n, or which columns.
            phase: None is PREFILL, which splits the tokens over the CP ranks; DECODE runs them on
                every rank.

        Returns:
            logits [batch, kept columns, V] in the model's dtype, zeros at padding; with
            output_hidden_states, those of all columns, whole on every rank.
        """
        logits, call, states = self.model.forward_batch(
            self._logits,
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            phase=phase,
            decoded=self._decoded,
            refused=dict(
                kwargs,
                inputs_embeds=inputs_embeds,
                labels=labels,
                output_router_logits=output_router_logits,
            ),
        )
        output = MoeCausalLMOutputWithPast(
            logits=logits,
            past_key_values=call.past if _use_cache(use_cache, self.config) else None,
            hidden_states=states,
        )
        return output if _returns_dict(return_dict, self.config) else output.to_tuple()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers', with the phase: DECODE after the first iteration, if there is a cache."""
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("tokenizer", None)  # generate()'s own, which it passes on to every forward
        past = inputs.get("past_key_values")
        first = kwargs.get("is_first_iteration", False)
        if not first and past is not None and past.get_seq_length() > 0:
            inputs["phase"] = ForwardPhase.DECODE
            inputs.pop("position_ids", None)  # they go on from those of the first iteration
        return inputs

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate. Collective over the replica: every rank passes the same.

        Every rank starts from rank 0's random state, and so draws the same tokens, and stops when
        rank 0's stopping criteria say so. A streamer is fed on each rank that passes one.
        """
        share_random_state(self.parallel_context, self.device)
        return cast(Any, super()).generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Gives generate() pages for the longest batch that it can make."""
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation={generation_config.cache_implementation!r} cannot be "
                "honoured: the cache is paged; leave it out"
            )
        # assisted generation takes the whole prompt at once
        assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        chunked = generation_config.prefill_chunk_size is not None and not assisted
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not mask.any(1).all():
            empty = (~mask.any(1)).nonzero().flatten().tolist()
            raise InputError(f"rows {empty} have no tokens: the mask is 0 everywhere")
        past = model_kwargs.get("past_key_values")
        if past is None and generation_config.use_cache:
            rows = batch_size * max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            pages = rows * -(-max(1, max_cache_length) // DEFAULT_PAGE_SIZE)
            past = PagedCacheAdapter(self.new_kv_cache(num_pages=1 + pages), grow=True)
            model_kwargs["past_key_values"] = past
        if isinstance(past, PagedCacheAdapter):
            past.allow_empty_rows = chunked
            if chunked and mask is not None and past.columns == 0:
                # Columns that are padding in every row count as cached, which generate() then
                # leaves out: a chunk of them alone would have nothing to run.
                past.columns = int(mask.any(0).long().argmax())

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = cast(Any, super())._get_stopping_criteria(*args, **kwargs)
        return _RankZeroDecides(criteria, self.parallel_context)

    def _next_token_logits(self, phase: ForwardPhase, read: Callable[[], Request]) -> torch.Tensor:
        with self.model.step(phase, read) as (request, plan):
            logits = self._decoded(request, plan)
            if logits is None:
                hidden, residual = self.model.run(request, plan)
                logits = self._logits(hidden, residual, plan, request.wanted)
            logits = logits.float()
        return logits

    def _decoded(self, request: Request, plan: ForwardPlan) -> torch.Tensor | None:
        """`decode_step`, compiled or not, where it is what a request asks for."""
        everything = torch.arange(len(request.ids))
        if plan.phase is not ForwardPhase.DECODE or not torch.equal(request.wanted, everything):
            return None
        ids = request.ids.to(self.lm_head.weight.device)
        if self._compiled_step is None or routing.is_recording():
            return self.decode_step(ids, plan, request.cache)
        return self._compiled_step(self, ids, plan, request.cache)

    def _logits(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        plan: ForwardPlan,
        tokens: torch.Tensor,
    ) -> torch.Tensor:
        """[len(tokens), V] in the model's dtype. Collective over cp_group and world_group."""
        return self._vocabulary(self.model.final_hidden(hidden, residual, plan, tokens))

    def _vocabulary(self, rows: torch.Tensor) -> torch.Tensor:
        """The logits, [n, V], of normed rows that every rank has. Collective over world_group."""
        shard = F.linear(rows, self.lm_head.weight)
        missing = self._vocabulary_shard - shard.shape[1]
        if missing:
            shard = F.pad(shard, (0, missing))
        return collectives.gather_vocabulary(shard, self.parallel_context, self.vocab_size)


class _RankZeroDecides(StoppingCriteriaList):
    """Stopping criteria whose answer is rank 0's: clocks and user code differ between ranks."""

    def __init__(self, criteria: StoppingCriteriaList, ctx: ParallelContext) -> None:
        super().__init__(criteria)
        self._ctx = ctx

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return collectives.broadcast(super().__call__(*args, **kwargs), self._ctx)


def share_random_state(ctx: ParallelContext, device: torch.device) -> None:
    """Gives every rank rank 0's random state. Collective over world_group."""
    if ctx.world_size == 1:
        return
    generators = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    for generator in generators:
        state = collectives.broadcast(generator.get_rng_state().to(device), ctx)
        generator.set_rng_state(state.cpu())


def register_auto() -> None:
    """Makes transformers' AutoModelForCausalLM load Qwen3-MoE with this package's model.

    For the whole process, also for code that wants transformers' own; hence a call of its own.
    """
    AutoModelForCausalLM.register(Qwen3MoeConfig, CPQwen3MoeForCausalLM, exist_ok=True)


def _use_cache(use_cache: bool | None, config: Qwen3MoeConfig) -> bool:
    return bool(config.use_cache if use_cache is None else use_cache)


def _returns_dict(return_dict: bool | None, config: Qwen3MoeConfig) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)
