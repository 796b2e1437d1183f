"""A loop of one's own: prefill, decode, free, on pages that several sequences share.

python docs/examples/custom_loop.py [MODEL]
torchrun --nproc-per-node 2 docs/examples/custom_loop.py [MODEL]
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
CHUNK = 16
PROMPTS = [
    "Question: Omar has 44 stamps. Omar buys 21 more. How many stamps does Omar have now?\nAnswer:",
    "Question: There are 6 boxes with 12 toys each. How many toys are there in total?\nAnswer:",
    "Question: Mia has 12 flowers. Mia finds 15 more and then loses 7. "
    "How many flowers does Mia have?\nAnswer:",
]

ctx = ParallelContext.from_world(cp_size=int(os.environ.get("WORLD_SIZE", "1")))
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = CPQwen3MoeForCausalLM.from_pretrained(MODEL, parallel_context=ctx)
prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

cache = model.new_kv_cache(num_pages=32)
sequences = [cache.new_sequence() for _ in prompts]

# prompts of different lengths in one call; of the last a first chunk, as of a very long one
logits = model.prefill(cache, sequences, [*prompts[:2], prompts[2][:CHUNK]])
for start in range(CHUNK, len(prompts[2]), CHUNK):
    logits[2:] = model.prefill(cache, sequences[2:], [prompts[2][start : start + CHUNK]])
answers = [[token] for token in logits.argmax(-1).tolist()]

# all of them one token at a time; who has ended leaves the batch and gives its pages back
running = list(range(len(sequences)))
while running:
    logits = model.decode(cache, [sequences[i] for i in running], [answers[i][-1] for i in running])
    for i, token in zip(list(running), logits.argmax(-1).tolist(), strict=True):
        answers[i].append(token)
        ended = tokenizer.decode(answers[i]).endswith(("\n\n", tokenizer.eos_token))
        if ended or len(answers[i]) == 64:
            running.remove(i)
            cache.free(sequences[i])

if ctx.rank == 0:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(prompt + tokenizer.decode(answer, skip_special_tokens=True).rstrip() + "\n")
    print(f"free pages: {cache.num_free_pages} of {cache.num_pages - 1}")
if dist.is_initialized():
    dist.destroy_process_group()
