"""One context-parallel decoder layer on its own, with the weights of a transformers model.

    python docs/examples/embed_layer.py [MODEL]
    torchrun --nproc-per-node 2 docs/examples/embed_layer.py [MODEL]

Compares with transformers' layer. Without TP a layer holds whole parameters under transformers'
names, so that a state dict can be loaded as it is.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from transformers import Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeDecoderLayer, ForwardPhase, PagedKVCache, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
NUM_TOKENS = 300

transformers.logging.disable_progress_bar()
theirs = Qwen3MoeForCausalLM.from_pretrained(
    MODEL, dtype=torch.float32, experts_implementation="eager"
).model
config = theirs.config
ctx = ParallelContext.from_world(
    cp_size=int(os.environ.get("WORLD_SIZE", "1")), backend="gloo"
)  # tensors on the CPU

layer = CPQwen3MoeDecoderLayer(config, 0, parallel_context=ctx)
layer.load_state_dict(theirs.layers[0].state_dict())
cache = PagedKVCache(
    num_layers=1,
    num_pages=4,
    kv_width=config.num_key_value_heads * config.head_dim,
    dtype=torch.float32,
)

torch.manual_seed(0)
rows = theirs.embed_tokens(torch.randint(config.vocab_size, (NUM_TOKENS,))).detach()
sequence = cache.new_sequence()
plan = cache.plan([sequence], [NUM_TOKENS], ForwardPhase.PREFILL, ctx)
with ctx.forward(ForwardPhase.PREFILL):
    hidden, residual = layer(
        plan.split(rows),
        plan=plan,
        kv=cache.layer(0),
        position_embeddings=theirs.rotary_emb(rows, plan.positions[None]),
    )
    output = plan.gather(hidden + residual, ctx)
cache.commit([sequence], [NUM_TOKENS])

positions = torch.arange(NUM_TOKENS)[None]
with torch.no_grad():
    expected = theirs.layers[0](
        rows[None], position_embeddings=theirs.rotary_emb(rows, positions), attention_mask=None
    )
if ctx.rank == 0:
    difference = float((output - expected).abs().max())
    print(f"{plan.num_rows} of {NUM_TOKENS} rows here: difference {difference:.1e}")
if dist.is_initialized():
    dist.destroy_process_group()
