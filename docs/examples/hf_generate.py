"""transformers' generate() on prompts of different lengths, padded on the left.

python docs/examples/hf_generate.py [MODEL]
torchrun --nproc-per-node 2 docs/examples/hf_generate.py [MODEL]
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
PROMPTS = [
    "Question: Omar has 44 stamps. Omar buys 21 more. How many stamps does Omar have now?\nAnswer:",
    "Question: There are 6 boxes with 12 toys each. How many toys are there in total?\nAnswer:",
]

ctx = ParallelContext.from_world(cp_size=int(os.environ.get("WORLD_SIZE", "1")))
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
model = CPQwen3MoeForCausalLM.from_pretrained(MODEL, parallel_context=ctx)

batch = tokenizer(PROMPTS, padding=True, return_tensors="pt").to(model.device)
output = model.generate(
    **batch, max_new_tokens=64, do_sample=False, stop_strings="\n\n", tokenizer=tokenizer
)
if ctx.rank == 0:
    for text in tokenizer.batch_decode(output, skip_special_tokens=True):
        print(text.rstrip() + "\n")
if dist.is_initialized():
    dist.destroy_process_group()
