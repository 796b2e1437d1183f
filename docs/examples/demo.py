"""The whole library in one run, on two CPU ranks that this script starts itself.

The bundled checkpoint solves word problems over two context-parallel ranks, one of them with more
than 2,000 tokens of context. Then the same is computed by transformers and by one rank alone, and
compared. Ends with an error if anything differs.

    python docs/examples/demo.py
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, PagedKVCache, ParallelContext, collectives, launch

CHECKPOINT = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-qwen3-moe"
NUM_RANKS = 2
MAX_NEW_TOKENS = 64
MAX_LOGIT_DIFFERENCE = 2e-4
TIE = 1e-3
"""Two logits closer than this may change places; the greedy token is then not compared."""


@dataclass
class Problem:
    kind: str
    question: str
    answer: str
    ids: list[int]


@dataclass
class Solution:
    tokens: list[int]
    seconds_to_first_token: float
    seconds_per_token: float
    pages_used: int
    pages_free: int


def main() -> None:
    ctx = ParallelContext.from_world(cp_size=NUM_RANKS, backend="gloo")
    console = Console(quiet=ctx.rank != 0, highlight=False)  # rank 0 speaks for all
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = CPQwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, parallel_context=ctx, dtype=torch.float32, device="cpu"
    )
    problems = choose_problems(tokenizer)
    console.print(f"[bold]{len(problems)} problems on {NUM_RANKS} context-parallel ranks[/bold]")

    cache = model.new_kv_cache(max_tokens=max(len(p.ids) for p in problems) + MAX_NEW_TOKENS)
    solutions = []
    with collectives.record_communication() as log:
        for problem in problems:
            show_question(console, problem)
            solution = solve(model, cache, tokenizer, problem, console)
            show_verdict(console, tokenizer, problem, solution)
            solutions.append(solution)
    show_communication(console, log, ctx)

    logits = [prompt_logits(model, p) for p in problems]
    dist.destroy_process_group()
    if ctx.rank == 0:  # the rest needs one rank
        torch.set_num_threads(NUM_RANKS)
        if not compare(console, problems, solutions, logits):
            sys.exit(1)


def choose_problems(tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    """The first of each kind in the file: four short, one with facts to look up, and one that has
    more than 2,000 tokens."""
    wanted = {"short": 4, "facts": 1, "long": 1}
    chosen = []
    for line in (CHECKPOINT / "problems-test.jsonl").read_text().splitlines():
        problem = Problem(**json.loads(line), ids=[])
        problem.ids = tokenizer(f"Question: {problem.question}\nAnswer:")["input_ids"]
        if problem.kind == "long" and len(problem.ids) <= 2000:
            continue
        if wanted[problem.kind]:
            wanted[problem.kind] -= 1
            chosen.append(problem)
    return chosen


# ----------------------------------------------------------------------------- the custom loop


def solve(
    model: CPQwen3MoeForCausalLM,
    cache: PagedKVCache,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    console: Console,
) -> Solution:
    """Greedy, up to a blank line or the end of the text. Every rank makes the same calls."""
    start = time.perf_counter()
    sequence = cache.new_sequence()
    logits = model.prefill(cache, [sequence], [problem.ids])  # [1, vocabulary]
    tokens = [int(logits.argmax())]
    first = time.perf_counter()
    for text in answer_so_far(tokenizer, tokens):
        console.print(text, end="", markup=False, soft_wrap=True)
        logits = model.decode(cache, [sequence], tokens[-1:])
        tokens.append(int(logits.argmax()))
    end = time.perf_counter()
    console.print()
    solution = Solution(
        tokens,
        seconds_to_first_token=first - start,
        seconds_per_token=(end - first) / max(1, len(tokens) - 1),
        pages_used=len(sequence.pages),
        pages_free=cache.num_free_pages,
    )
    cache.free(sequence)
    return solution


def answer_so_far(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> Iterator[str]:
    """The text of each new token, until the answer ends."""
    shown = ""
    while tokens[-1] != tokenizer.eos_token_id:
        text = str(tokenizer.decode(tokens))
        if text.endswith("\n\n") or len(tokens) == MAX_NEW_TOKENS:
            return
        text = text.rstrip("\n")
        yield text[len(shown) :]
        shown = text


def prompt_logits(model: CPQwen3MoeForCausalLM, problem: Problem) -> torch.Tensor:
    """[tokens, vocabulary]: the logits of every position, through transformers' interface."""
    return model(torch.tensor([problem.ids]), use_cache=False).logits[0]


# ---------------------------------------------------------------------------------- the report


def show_question(console: Console, problem: Problem) -> None:
    question = problem.question
    if len(question) > 300:
        question = f"{question[:120]} [...] {question[-120:]}"
    console.print(f"\n[bold]{problem.kind}[/bold], {len(problem.ids):,} tokens of context")
    console.print(f"Question: {question}\nAnswer:", markup=False, end="", soft_wrap=True)


def show_verdict(
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    solution: Solution,
) -> None:
    found = final_number(str(tokenizer.decode(solution.tokens)))
    expected = final_number(problem.answer)
    verdict = "[green]right[/green]" if found == expected else "[red]wrong[/red]"
    console.print(
        f"{verdict}: {found}, the reference says {expected}\n"
        f"[dim]first token {solution.seconds_to_first_token * 1e3:.0f} ms, "
        f"each further {solution.seconds_per_token * 1e3:.0f} ms, "
        f"cache pages {solution.pages_used} used, {solution.pages_free} free[/dim]"
    )


def final_number(text: str) -> str | None:
    found = re.search(r"#### (-?\d+)", text)
    return found[1] if found else None


def show_communication(
    console: Console, log: collectives.CommunicationLog, ctx: ParallelContext
) -> None:
    table = Table("collective", "calls", "bytes received", title_justify="left")
    for kind, num_bytes in log.by_kind.items():
        table.add_row(kind, f"{log.counts[kind]:,}", f"{num_bytes:,}")
    console.print(f"\n[bold]Communication of rank {ctx.rank}, all problems[/bold]")
    console.print(table)


# ------------------------------------------------------------------------------ the comparison


def compare(
    console: Console,
    problems: list[Problem],
    solutions: list[Solution],
    logits: list[torch.Tensor],
) -> bool:
    """Whether transformers and one rank alone say the same."""
    console.print("\n[bold]The same problems, computed otherwise[/bold]")
    transformers.logging.disable_progress_bar()
    theirs = Qwen3MoeForCausalLM.from_pretrained(
        CHECKPOINT, dtype=torch.float32, experts_implementation="eager"
    )
    single = CPQwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, device="cpu")
    table = Table("compared with", "largest logit difference", "greedy tokens")
    verdicts = []
    for name, model in (("transformers", theirs), ("qwen3cp, cp=1", single)):
        difference, equal, differ, ties = 0.0, 0, 0, 0
        for problem, solution, ours in zip(problems, solutions, logits, strict=True):
            full = torch.tensor([problem.ids + solution.tokens[:-1]])
            with torch.no_grad():
                reference = model(full, use_cache=False).logits[0]
            prompt = reference[: len(problem.ids)]
            difference = max(difference, float((ours - prompt).abs().max()))
            # what it would say next, at each step of our answer
            steps = reference[len(problem.ids) - 1 :]
            for token, row in zip(solution.tokens, steps, strict=True):
                top, runner_up = row.topk(2).values
                if token == int(row.argmax()):
                    equal += 1
                elif top - runner_up > TIE:
                    differ += 1
                else:
                    ties += 1
        verdicts.append(difference <= MAX_LOGIT_DIFFERENCE and not differ)
        tokens = f"{equal} equal, {differ} differ" + (f", {ties} ties" if ties else "")
        table.add_row(name, f"{difference:.1e}", tokens)
    console.print(table)
    positions = sum(len(p.ids) for p in problems)
    limit = f"{MAX_LOGIT_DIFFERENCE:.0e}"
    if all(verdicts):
        console.print(
            f"{positions:,} prompt positions: logits within {limit}, every greedy token the same."
        )
    else:
        console.print(f"[red]MISMATCH: logits differ by more than {limit}, or tokens do.[/red]")
    return all(verdicts)


if __name__ == "__main__":
    if not launch.is_rank():
        sys.exit(launch.start_ranks(NUM_RANKS, [__file__]))
    main()
