"""The MLP of one layer: experts, or a dense MLP, cut over TP.

Letters: T rows of this rank, H hidden size, E experts, k experts a token, I this TP rank's share
of an expert's (or the dense MLP's) intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import cast

import torch
from torch.nn import functional as F
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeMLP,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from qwen3cp import collectives
from qwen3cp.config import check_supported, local_config, local_experts
from qwen3cp.errors import InputError
from qwen3cp.exchange import exchange
from qwen3cp.ops.checks import without_grad
from qwen3cp.ops.products import linear, matmul
from qwen3cp.parallel import ForwardPhase, ParallelContext, div_even
from qwen3cp.plan import ForwardPlan
from qwen3cp.routing import count_rows

__all__ = ["CPQwen3MoeMLP", "CPQwen3MoeSparseMoeBlock"]


class CPQwen3MoeMLP(Qwen3MoeMLP):
    """A dense MLP: gate_proj and up_proj [I, H], down_proj [H, I], summed over TP alone.

    CP ranks hold other tokens and the same weights, so nothing is summed over them.
    """

    def __init__(
        self,
        config: Qwen3MoeConfig,
        intermediate_size: int | None = None,
        *,
        parallel_context: ParallelContext,
        layer_idx: int | None = None,
    ) -> None:
        check_supported(config, parallel_context)
        whole = config.intermediate_size if intermediate_size is None else intermediate_size
        super().__init__(config, div_even(whole, parallel_context.tp_size, "intermediate_size"))
        self.parallel_context = parallel_context
        self.layer_idx = layer_idx

    @without_grad
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]. Collective over tp_group (one all-reduce)."""
        rows = hidden.shape[0]
        gate_up = hidden.new_empty(2 * rows, self.intermediate_size)  # gate rows, then up rows
        matmul(hidden, self.gate_proj.weight.t(), out=gate_up[:rows])
        matmul(hidden, self.up_proj.weight.t(), out=gate_up[rows:])
        activated = torch.ops.npu.npu_swiglu(gate_up, 0)
        partial = linear(activated, self.down_proj)
        return collectives.all_reduce(
            partial, self.parallel_context, in_place=True, layer=self.layer_idx
        )


class CPQwen3MoeSparseMoeBlock(Qwen3MoeSparseMoeBlock):
    """The experts of this rank, gate_up_proj [E, 2I, H] and down_proj [E, H, I].

    With moe="tp" these are all experts, each cut over TP; with "ep" this rank's `local_experts`,
    each whole. The router, gate.weight [all experts, H], is whole.

    With expert_placement, a layer's of `ExpertPlacement`, expert expert_placement[i] is in the
    place of expert i; the router's order stays.
    """

    owners: torch.Tensor
    slot_of_expert: torch.Tensor | None

    def __init__(
        self,
        config: Qwen3MoeConfig,
        *,
        parallel_context: ParallelContext,
        layer_idx: int | None = None,
        expert_placement: Seq[int] | None = None,
    ) -> None:
        check_supported(config, parallel_context)
        # not transformers' constructor, which would build all experts
        super(Qwen3MoeSparseMoeBlock, self).__init__()
        ctx = parallel_context
        local = local_config(config, ctx)
        self.gate = Qwen3MoeTopKRouter(local)
        self.local_experts = range(config.num_experts)
        if ctx.moe == "ep":
            of_ranks = [
                local_experts(config.num_experts, rank, ctx.world_size)
                for rank in range(ctx.world_size)
            ]
            self.local_experts = of_ranks[ctx.rank]
            owners = torch.tensor([r for r, each in enumerate(of_ranks) for _ in each])
            self.register_buffer("owners", owners.int(), persistent=False)
        slot_of_expert = None
        if expert_placement is not None:
            slot_of_expert = torch.tensor(expert_placement).argsort().int()
        self.register_buffer("slot_of_expert", slot_of_expert, persistent=False)
        local.num_experts = len(self.local_experts)
        self.experts = Qwen3MoeExperts(local)
        self.parallel_context = ctx
        self.layer_idx = layer_idx

    @without_grad
    def forward(self, hidden: torch.Tensor, *, plan: ForwardPlan | None = None) -> torch.Tensor:
        """[T, H] -> [T, H].

        With moe="tp", collective over tp_group (one all-reduce). With "ep", over world_group: one
        all-reduce where every rank has all rows, else an exchange (see `qwen3cp.exchange`).

        Args:
            plan: of the forward. Needed with "ep" and several CP ranks, which have other rows each
                in a PREFILL.
        """
        ctx = self.parallel_context
        if ctx.moe == "tp":
            if hidden.shape[0] == 0:  # and so on every TP rank, which hold the same rows
                return hidden
            partial = self._run_experts(hidden, *self._route(hidden))
            return collectives.all_reduce(partial, ctx, in_place=True, layer=self.layer_idx)
        if plan is None and ctx.cp_size > 1:
            raise InputError("moe='ep' with several CP ranks needs the plan: pass plan=...")
        if plan is None or plan.phase is ForwardPhase.DECODE or ctx.world_size == 1:
            partial = self._run_experts(hidden, *self._route(hidden))
            return collectives.all_reduce_world(partial, ctx, "all_reduce", self.layer_idx)
        return exchange(
            hidden,
            self._route,
            self._run_experts,
            ctx,
            padded_rows=plan.padded_rows,
            top_k=self.gate.top_k,
            owners=self.owners,
            layer=self.layer_idx,
        )

    def _run_experts(
        self, hidden: torch.Tensor, weights_Tk: torch.Tensor, experts_Tk: torch.Tensor
    ) -> torch.Tensor:
        """What the experts of this rank make of [T, H]: their weighted sum, [T, H]."""
        ctx = self.parallel_context
        first, end = self.local_experts.start, self.local_experts.stop
        if hidden.shape[0] == 0 or first == end:
            return torch.zeros_like(hidden)
        rows, row_of_choice, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
            hidden,
            experts_Tk,
            active_num=experts_Tk.numel(),
            expert_num=self.gate.num_experts,
            # The operator's own defaults of these are refused by CANN 8.5, and its default range
            # is that of the first call of the process.
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            active_expert_range=[first, end],
            quant_mode=-1,
        )
        count_rows(counts, self.local_experts, self.gate.num_experts, self.layer_idx, ctx)
        experts = self.experts
        # What each step reads is freed after it: together they would be the peak of a prefill.
        gate_up = _grouped_matmul(rows, cast(torch.Tensor, experts.gate_up_proj), counts)
        del rows
        activated = torch.ops.npu.npu_swiglu(gate_up)
        del gate_up
        down = _grouped_matmul(activated, cast(torch.Tensor, experts.down_proj), counts)
        del activated
        if len(self.local_experts) < self.gate.num_experts:
            # the choices of other ranks' experts have the index -1, which is not skipped
            weights_Tk = weights_Tk * (row_of_choice >= 0).view(weights_Tk.shape)
            row_of_choice = row_of_choice.abs()
        return torch.ops.npu.npu_moe_token_unpermute(down, row_of_choice, weights_Tk)

    def _route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (float32) and slots (int32) of each token's experts, both [T, k]."""
        logits = F.linear(hidden, self.gate.weight).float()
        weights, experts, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(
            logits, None, self.gate.top_k
        )
        if self.gate.norm_topk_prob:  # the operator does not
            weights = weights / weights.sum(-1, keepdim=True)
        if self.slot_of_expert is not None:
            experts = self.slot_of_expert[experts.long()]
        return weights, experts


def _grouped_matmul(
    rows: torch.Tensor, weight_EOI: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert, [M, in], times each expert's [out, in]: [M, out]."""
    return torch.ops.npu.npu_grouped_matmul(
        [rows],
        [weight_EOI.transpose(1, 2)],
        group_list=counts,
        # counts; of one group, where they are refused, the same as cumulative ends
        group_list_type=1 if len(counts) > 1 else 0,
        group_type=0,
        split_item=2,
    )[0]
