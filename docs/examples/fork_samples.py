"""Several samples of one prompt, which is prefilled once: `cache.fork` shares its pages.

python docs/examples/fork_samples.py [MODEL]
torchrun --nproc-per-node 2 docs/examples/fork_samples.py [MODEL]
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
MODEL = sys.argv[1] if len(sys.argv) > 1 else str(CHECKPOINT)
NUM_SAMPLES, NUM_TOKENS, TEMPERATURE = 4, 48, 1.5

ctx = ParallelContext.from_world(cp_size=int(os.environ.get("WORLD_SIZE", "1")))
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = CPQwen3MoeForCausalLM.from_pretrained(MODEL, parallel_context=ctx)
problems = (CHECKPOINT / "problems-test.jsonl").read_text().splitlines()
question = next(p for p in map(json.loads, problems) if p["kind"] == "facts")["question"]
prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]

cache = model.new_kv_cache(num_pages=32)
first = cache.new_sequence()
logits = model.prefill(cache, [first], [prompt]).expand(NUM_SAMPLES, -1)
sequences = [first, *(cache.fork(first) for _ in range(NUM_SAMPLES - 1))]
used = cache.num_pages - 1 - cache.num_free_pages
held = sum(len(s.pages) for s in sequences)

# All ranks have the same logits, bit for bit: with the same seed they draw the same tokens.
generator = torch.Generator(logits.device).manual_seed(0)
samples = torch.empty(NUM_SAMPLES, 0, dtype=torch.int64, device=logits.device)
for _ in range(NUM_TOKENS):
    probabilities = (logits / TEMPERATURE).softmax(-1)
    token = torch.multinomial(probabilities, 1, generator=generator)
    samples = torch.cat((samples, token), dim=1)
    logits = model.decode(cache, sequences, token.flatten())

if ctx.rank == 0:
    print(f"{len(prompt)} tokens of prompt; {NUM_SAMPLES} sequences of {held} pages use {used}")
    for sample in samples.tolist():
        answer = tokenizer.decode(sample).split(tokenizer.eos_token)[0].split("\n\n")[0]
        print(f"sample: {answer!r}")
if dist.is_initialized():
    dist.destroy_process_group()
