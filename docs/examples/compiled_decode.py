"""Decode steps compiled by torch.compile, which are a graph for every length of the sequences.

python docs/examples/compiled_decode.py [MODEL] [BACKEND]
torchrun --nproc-per-node 2 docs/examples/compiled_decode.py [MODEL] [BACKEND]
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import AutoTokenizer

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
# "inductor" is faster, and needs a C++ compiler; torch_npu brings backends of its own
BACKEND = sys.argv[2] if len(sys.argv) > 2 else "aot_eager"
PROMPTS = [
    "Question: Omar has 44 stamps. Omar buys 21 more. How many stamps does Omar have now?\nAnswer:",
    "Question: There are 6 boxes with 12 toys each. How many toys are there in total?\nAnswer:",
]

ctx = ParallelContext.from_world(tp_size=int(os.environ.get("WORLD_SIZE", "1")))
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = CPQwen3MoeForCausalLM.from_pretrained(MODEL, parallel_context=ctx)
model.compile_decode(backend=BACKEND)  # on every rank

cache = model.new_kv_cache(num_pages=8)
sequences = [cache.new_sequence() for _ in PROMPTS]
logits = model.prefill(cache, sequences, [tokenizer(text)["input_ids"] for text in PROMPTS])
answers = [logits.argmax(-1)]
for _ in range(63):  # the first step compiles, and the second, with the lengths as variables
    answers.append(model.decode(cache, sequences, answers[-1]).argmax(-1))

if ctx.rank == 0:
    for prompt, answer in zip(PROMPTS, zip(*answers, strict=True), strict=True):
        text = tokenizer.decode([int(token) for token in answer])
        print(prompt + text.split("\n\n")[0].split(tokenizer.eos_token)[0] + "\n")
    print(f"graphs: {counters['stats']['unique_graphs']}, breaks: {len(counters['graph_break'])}")
if dist.is_initialized():
    dist.destroy_process_group()
