"""The context-parallel attention in a module of one's own, with one's own process groups.

    python docs/examples/embed_attention.py [MODEL]
    torchrun --nproc-per-node 2 docs/examples/embed_attention.py [MODEL]

MODEL gives the config; the weights are random. Compares with the same module on one rank.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from qwen3cp import CPQwen3MoeAttention, ForwardPhase, PagedKVCache, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)


class MyBlock(nn.Module):
    def __init__(self, config, ctx):
        super().__init__()
        self.ctx = ctx
        self.rotary = Qwen3MoeRotaryEmbedding(config)
        self.attention = CPQwen3MoeAttention(config, 0, parallel_context=ctx)
        width = self.attention.num_kv_heads * self.attention.head_dim
        self.cache = PagedKVCache(
            num_layers=1, num_pages=8, kv_width=width, dtype=torch.float32, device="cpu"
        )

    def forward(self, rows, sequences, lengths, phase):
        """Rows of the new tokens of all sequences, the same on every rank: [tokens, hidden]."""
        plan = self.cache.plan(sequences, lengths, phase, self.ctx)
        rotary = self.rotary(rows, plan.positions[None])
        with self.ctx.forward(phase):
            mine = plan.split(rows)
            out = self.attention(
                mine, plan=plan, kv=self.cache.layer(0), position_embeddings=rotary
            )
            out = plan.gather(mine + out, self.ctx)
        self.cache.commit(sequences, lengths)
        return out


config = AutoConfig.from_pretrained(MODEL)
if "WORLD_SIZE" in os.environ:
    dist.init_process_group("gloo")
    group = dist.new_group()  # all ranks
    assert isinstance(group, dist.ProcessGroup)
    ctx = ParallelContext.from_groups(cp_group=group)  # no TP
else:
    ctx = ParallelContext.single()

results = []
for context in (ctx, ParallelContext.single()):
    torch.manual_seed(0)  # the same weights and rows, on every rank
    block = MyBlock(config, context)
    sequences = [block.cache.new_sequence(), block.cache.new_sequence()]
    prompt, token = torch.randn(22, config.hidden_size), torch.randn(2, config.hidden_size)
    prefilled = block(prompt, sequences, [13, 9], ForwardPhase.PREFILL)
    decoded = block(token, sequences, [1, 1], ForwardPhase.DECODE)
    results.append(torch.cat((prefilled, decoded)))

if ctx.rank == 0:
    difference = float((results[0] - results[1]).abs().max())
    print(f"{ctx.cp_size} ranks against one, {len(results[0])} rows: difference {difference:.1e}")
if dist.is_initialized():
    dist.destroy_process_group()
