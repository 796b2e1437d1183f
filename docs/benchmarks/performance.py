"""Speed, scaling and memory on a CPU: everything that docs/performance.md shows.

    make bench
    python docs/benchmarks/performance.py [--steps single,cp,tp] [--shrink 16]

Makes a random Qwen3-MoE of 324 million parameters (random-324m.json), measures it in steps, each in
processes of its own with one core a rank, writes performance.json beside this file, and puts the
tables into docs/performance.md and README.md. Takes about three quarters of an hour on two quiet
cores.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("random-324m.json")
RESULTS = Path(__file__).with_suffix(".json")
PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")

BENCH: dict[str, list[str]] = {
    "single": [
        "--prompt-tokens=2048,8192",
        "--new-tokens=16",
        "--float32-scores",
        "--against=transformers",
    ],
    "cp": ["--prompt-tokens=16384", "--new-tokens=8", "--cp=1,2", "--copies=2", "--no-parts"],
    "chunks": [
        "--prompt-tokens=16384",
        "--new-tokens=0",
        "--cp=2",
        "--chunk-tokens=0,2048",
        "--no-parts",
    ],
    "tp": ["--prompt-tokens=8192", "--new-tokens=8", "--tp=1,2", "--copies=2"],
    "memory": ["--prompt-tokens=16384", "--new-tokens=0", "--cp=1,2", "--no-parts"],
}
"""Steps that are runs of `qwen3cp bench`, and their arguments."""
STEPS = ("limits", *BENCH, "attention", "accuracy", "overlap")
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128


def main(
    steps: str = typer.Option(",".join(STEPS), help="Which; of the others the results are kept."),
    repeats: int = typer.Option(3, help="Of each measurement."),
    shrink: int = typer.Option(1, help="Divides all lengths, to try this script."),
    model: Path | None = typer.Option(None, help="A checkpoint, in place of the random one."),  # noqa: B008
    output: Path = typer.Option(RESULTS, help="Where the results go."),  # noqa: B008
    pages: bool = typer.Option(True, help="Put the tables into the pages."),
    only: str | None = typer.Option(None, hidden=True, help="What a process of a step is told."),
) -> None:
    if only is not None:
        assert model is not None
        result = ALONE[only](model, repeats, shrink)
        if result is not None:
            output.write_text(json.dumps(result))
        return
    chosen = steps.split(",")
    if unknown := set(chosen) - set(STEPS):
        raise typer.BadParameter(f"no such steps: {', '.join(sorted(unknown))}")
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = Path(folder) / "model"
            run("make-random", str(CONFIG), str(model))
        for step in chosen:
            print(f"--- {step}", file=sys.stderr, flush=True)
            part = Path(folder) / "part.json"
            measure(step, model, part, repeats, shrink)
            results[step] = {"shrink": shrink, **rounded(json.loads(part.read_text()))}
            output.write_text(json.dumps(results, indent=1) + "\n")
    found = tables(results)
    for name, table in found.items():
        print(f"\n{name}\n\n{table}")
    if pages:
        for page in PAGES:
            page.write_text(filled(page.read_text(), found))


def measure(step: str, model: Path, part: Path, repeats: int, shrink: int) -> None:
    if step in BENCH:
        arguments = [shrunk(argument, shrink) for argument in BENCH[step]]
        # glibc keeps freed blocks of up to 32 MiB for later, unless it is told from which size on
        # to give them back: the peak of memory is to be what is in use at a time.
        environment = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if step == "memory" else {}
        run(
            "bench",
            str(model),
            *arguments,
            f"--repeats={repeats}",
            f"--output={part}",
            **environment,
        )
        return
    arguments = [f"--model={model}", f"--repeats={repeats}", f"--shrink={shrink}"]
    arguments += [f"--only={step}", f"--output={part}"]
    if step == "overlap":
        from qwen3cp.launch import start_ranks

        if code := start_ranks(2, [__file__, *arguments]):
            sys.exit(code)
        return
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def run(*arguments: str, **environment: str) -> None:
    command = [sys.executable, "-m", "qwen3cp.cli", *arguments]
    subprocess.run(command, check=True, env=os.environ | environment)


def shrunk(argument: str, by: int) -> str:
    name, _, values = argument.partition("=")
    if name not in ("--prompt-tokens", "--chunk-tokens"):
        return argument
    lengths = [str(max(1, int(v) // by) if int(v) else 0) for v in values.split(",")]
    return f"{name}={','.join(lengths)}"


def rounded(value: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------- steps that are not bench


def in_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1 + repeats):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def limits(model: Path, repeats: int, shrink: int) -> dict[str, Any]:
    """What one core can do, and what the model asks of it."""
    import torch
    from transformers import Qwen3MoeConfig

    from qwen3cp.benchmark.report import describe_machine

    torch.set_num_threads(1)
    size = 4096 // shrink
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16)
    source, target = torch.zeros(2, (256 << 20) // shrink, dtype=torch.uint8)
    seconds = in_turns(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 2 + repeats
    )
    config: Any = Qwen3MoeConfig.from_pretrained(model)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    hidden, width = config.hidden_size, config.head_dim
    projections = hidden * width * (2 * heads + 2 * kv_heads)
    experts = 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    router = hidden * config.num_experts
    return {
        "machine": describe_machine(1),
        "flops_per_second": 2 * size**3 / min(seconds["product"]),
        "bytes_per_second": len(source) / min(seconds["copy"]),
        "layers": config.num_hidden_layers,
        "parameters_of_a_token": config.num_hidden_layers * (projections + experts + router),
        "head_parameters": hidden * config.vocab_size,
        "attention_flops_of_a_pair": 4 * heads * width * config.num_hidden_layers,
        "cache_bytes_of_a_token": 2 * 2 * kv_heads * width * config.num_hidden_layers,
    }


def attention(model: Path, repeats: int, shrink: int) -> dict[str, Any]:
    """The attention kernel by itself: 16 query and 4 KV heads of 128."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    import qwen3cp  # noqa: F401 - which defines the operators
    from qwen3cp.ops import settings

    torch.set_num_threads(1)
    length, new, cached = 8192 // shrink, 512 // shrink, 32768 // shrink
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        query, key, value = random_heads(length, dtype)
        fused = kernel(query, key, value)
        # [heads, tokens, head_dim], as torch takes them
        q, k, v = (x.transpose(0, 1)[None].contiguous() for x in (query, key, value))

        def with_float32_scores(call: Callable[[], Any] = fused) -> Any:
            with settings.override(float32_scores=True):
                return call()

        def torch_of_groups(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def torch_of_copies(q: Any = q, k: Any = k, v: Any = v) -> Any:
            copies = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            return scaled_dot_product_attention(q, *copies, is_causal=True)

        ways = {
            "default": fused,
            "torch, groups": torch_of_groups,
            "torch, copies": torch_of_copies,
        }
        if dtype == torch.bfloat16:
            ways["float32 scores"] = with_float32_scores
        seconds = in_turns(ways, repeats)
        fastest = min(
            (name for name in ways if name.startswith("torch")),
            key=lambda name: statistics.median(seconds[name]),
        )
        short = slice(0, min(length, 2048))
        part = kernel(query[short], key[short], value[short])
        copies = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        exact = scaled_dot_product_attention(
            *(x[:, :, short].double() for x in (q, *copies)), is_causal=True
        )
        for name in ways:
            if name.startswith("torch"):
                continue
            with settings.override(float32_scores=name == "float32 scores"):
                error = part().transpose(0, 1)[None].double() - exact
            torch_error = torch_of_groups(*(x[:, :, short] for x in (q, k, v))).double() - exact
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "scores": "float32" if name == "float32 scores" else str(dtype)[6:],
                    "seconds": seconds[name],
                    "torch_form": fastest,
                    "torch_seconds": seconds[fastest],
                    "error": float(error.norm() / exact.norm()),
                    "torch_error": float(torch_error.norm() / exact.norm()),
                }
            )
    query, key, value = random_heads(cached + new, torch.bfloat16)
    whole = kernel(query[:length], key[:length], value[:length])
    end = kernel(query[-new:], key, value)
    seconds = in_turns({"whole": whole, "end": end}, repeats)
    work = new * (cached + (new + 1) / 2) / (length * (length + 1) / 2)
    return {
        "length": length,
        "rows": rows,
        "end": {"new": new, "cached": cached, "work": work, "seconds": seconds},
    }


def random_heads(length: int, dtype: Any) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(length, HEADS, HEAD_DIM), *[(length, KV_HEADS, HEAD_DIM)] * 2]
    query, key, value = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return query, key, value


def kernel(query: Any, key: Any, value: Any) -> Callable[[], Any]:
    """Attention of the last tokens of [T, N, D] to all keys before them, in pages."""
    import torch

    from qwen3cp import ForwardPhase, PagedKVCache, ParallelContext

    new, total = len(query), len(key)
    cache = PagedKVCache(
        num_layers=1,
        num_pages=1 + -(-total // 128),
        kv_width=KV_HEADS * HEAD_DIM,
        dtype=key.dtype,
    )
    sequence = cache.new_sequence()
    if total > new:
        cache.reserve([sequence], [total - new])
        cache.commit([sequence], [total - new])
    plan = cache.plan([sequence], [new], ForwardPhase.PREFILL, ParallelContext.single())
    (call,) = plan.calls
    layer = cache.layer(0)
    pages = torch.tensor(sequence.pages)
    for part, values in ((layer.key, key), (layer.value, value)):
        rows = torch.zeros(len(pages) * 128, KV_HEADS * HEAD_DIM, dtype=values.dtype)
        rows[:total] = values.flatten(1)
        part[pages] = rows.view(len(pages), 128, -1)

    def run_it() -> Any:
        return torch.ops.npu.npu_fused_infer_attention_score(
            query,
            layer.key,
            layer.value,
            atten_mask=layer.causal_mask,
            actual_seq_lengths=call.query_ends,
            actual_seq_lengths_kv=call.kv_lengths,
            block_table=call.block_table,
            num_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            scale=HEAD_DIM**-0.5,
            input_layout="TND",
            sparse_mode=3,
            block_size=128,
        )[0]

    return run_it


def accuracy(model: Path, repeats: int, shrink: int) -> dict[str, Any]:
    """Relative L2 error of bfloat16 logits against transformers in float32, of 2,048 positions."""
    import torch
    from transformers import Qwen3MoeForCausalLM
    from transformers.utils import logging

    from qwen3cp import CPQwen3MoeForCausalLM
    from qwen3cp.ops import settings

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    ids = None
    found: dict[str, Any] = {}

    @torch.inference_mode()
    def logits_of(loaded: Any) -> torch.Tensor:
        nonlocal ids
        if ids is None:
            generator = torch.Generator().manual_seed(0)
            vocabulary = loaded.config.vocab_size
            ids = torch.randint(0, vocabulary, (1, 2048 // shrink), generator=generator)
        return loaded(ids).logits[0].float()

    exact = logits_of(Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32))
    ours = CPQwen3MoeForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for name, float32_scores in (("bfloat16 scores", False), ("float32 scores", True)):
        with settings.override(float32_scores=float32_scores):
            error = logits_of(ours) - exact
        found[name] = float(error.norm() / exact.norm())
    del ours
    theirs = Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    found["transformers"] = float((logits_of(theirs) - exact).norm() / exact.norm())
    return {"positions": 2048 // shrink, "errors": found}


class SlowWork:
    """A collective over a link that takes `seconds` more, beside whatever the rank does."""

    def __init__(self, work: Any, seconds: float) -> None:
        self._work, self._arrives = work, time.perf_counter() + seconds

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._arrives - time.perf_counter()))


def overlap(model: Path, repeats: int, shrink: int) -> dict[str, Any] | None:
    """On each of two CP ranks: prefills with the gather of keys and values slowed artificially.

    With a delay, what arrives at its time while the queries are projected; and the same delay where
    the gather is waited for at once, for comparison.
    """
    import torch
    import torch.distributed as dist

    from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext, collectives

    torch.set_num_threads(1)
    ctx = ParallelContext.from_world(cp_size=2, backend="gloo")
    loaded = CPQwen3MoeForCausalLM.from_pretrained(model, parallel_context=ctx, device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, loaded.config.vocab_size, (4096 // shrink,), generator=generator)
    gather = collectives._all_gather_into

    def prefill(delay: float, at_once: bool) -> tuple[float, list[tuple[float, float]]]:
        """Seconds; and of each layer how long the gather was in flight beside the queries, and
        how long it was waited for."""

        def slowed(*args: Any, **kwargs: Any) -> Any:
            work = gather(*args, **kwargs)
            if not kwargs.get("async_op"):
                return work
            work = SlowWork(work, delay)
            if at_once:
                work.wait()
            return work

        cache = loaded.new_kv_cache(max_tokens=len(ids))
        sequence = cache.new_sequence()
        collectives._all_gather_into = slowed
        try:
            dist.barrier()
            with collectives.time_collectives() as spans:
                start = time.perf_counter()
                loaded.prefill(cache, [sequence], [ids])
                seconds = time.perf_counter() - start
        finally:
            collectives._all_gather_into = gather
        of_gathers = [span for span in spans if span.what.startswith("kv_gather")]
        layers = list(zip(of_gathers[::2], of_gathers[1::2], strict=True))
        return seconds, [(w.start - s.end, w.end - w.start) for s, w in layers]

    prefill(0.0, False)
    beside = [window for window, _ in prefill(0.0, False)[1]]
    window = torch.tensor(statistics.median(beside))
    dist.broadcast(window, 0)
    delays = {
        "none": 0.0,
        "half": float(window) / 2,
        "all": float(window),
        "twice": 2 * float(window),
    }
    seconds: dict[str, list[float]] = {}
    waited: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, delay in delays.items():
            for at_once in (False, True):
                took, layers = prefill(delay, at_once)
                key = f"{name}, at once" if at_once else name
                seconds.setdefault(key, []).append(took)
                waited.setdefault(key, []).append(sum(wait for _, wait in layers))
    found = {
        "tokens": len(ids),
        "layers": loaded.config.num_hidden_layers,
        "window": float(window),
        "delays": delays,
        "seconds": seconds,
        "waited": waited,
    }
    rank = dist.get_rank()
    dist.destroy_process_group()
    return found if rank == 0 else None


ALONE: dict[str, Callable[[Path, int, int], dict[str, Any] | None]] = {
    "limits": limits,
    "attention": attention,
    "accuracy": accuracy,
    "overlap": overlap,
}


# --------------------------------------------------------------------------------------- tables


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown, by the name of its place in the pages."""
    makers: dict[str, tuple[Callable[[dict[str, Any]], str], tuple[str, ...]]] = {
        "machine": (machine_line, ("limits",)),
        "transformers": (transformers_table, ("single",)),
        "scaling": (scaling_table, ("cp", "tp", "chunks")),
        "memory": (memory_table, ("cp",)),
        "attention": (attention_table, ("attention",)),
        "accuracy": (accuracy_table, ("accuracy",)),
        "parts": (parts_table, ("single", "limits")),
        "arithmetic": (arithmetic_table, ("single", "limits")),
        "overlap": (overlap_table, ("overlap",)),
    }
    return {
        name: make(results)
        for name, (make, needs) in makers.items()
        if all(need in results for need in needs)
    }


def filled(page: str, found: dict[str, str]) -> str:
    """The page with the tables between its `<!-- table NAME -->` and `<!-- end -->`."""

    def put(match: re.Match[str]) -> str:
        name = match[1]
        return (
            f"<!-- table {name} -->\n\n{found[name]}\n\n<!-- end -->" if name in found else match[0]
        )

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", put, page, flags=re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result_of(run: dict[str, Any], way: str, prompt: int) -> dict[str, Any]:
    (found,) = (r for r in run["results"] if (r["way"], r["prompt_tokens"]) == (way, prompt))
    return found


def ratio_of(run: dict[str, Any], measure: str, way: str, against: str, prompt: int) -> str:
    (found,) = (
        r["ratio"]
        for r in run["ratios"]
        if (r["measure"], r["way"], r["against"], r["prompt_tokens"])
        == (measure, way, against, prompt)
    )
    return spread(found["median"], found["low"], found["high"])


def spread(median: float, low: float, high: float) -> str:
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def spread_of(samples: list[float]) -> str:
    return spread(statistics.median(samples), min(samples), max(samples))


def prompts_of(run: dict[str, Any]) -> list[int]:
    return sorted({r["prompt_tokens"] for r in run["results"]})


def machine_line(results: dict[str, Any]) -> str:
    found = results["limits"]
    machine = found["machine"]
    trials = [name for name, step in results.items() if step["shrink"] > 1]
    return (
        f"{machine['name']}, {machine['cores']} cores, of which a rank uses "
        f"{machine['threads']}; Python {machine['python']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}. One core multiplies bfloat16 matrices at "
        f"{found['flops_per_second'] / 1e9:.0f} GFLOP/s and copies "
        f"{found['bytes_per_second'] / 1e9:.0f} GB/s."
        + f"\n\n**With shorter prompts, as a trial of the script: {', '.join(trials)}.**"
        * bool(trials)
    )


ONE = "cp=1 tp=1 bfloat16"


def transformers_table(results: dict[str, Any]) -> str:
    run = results["single"]
    rows = []
    theirs = "transformers bfloat16"
    for prompt in prompts_of(run):
        other = result_of(run, theirs, prompt)
        for way, scores in ((ONE, "bfloat16"), (f"{ONE}, float32 scores", "float32")):
            mine = result_of(run, way, prompt)
            rows.append(
                [
                    f"{prompt:,}",
                    scores,
                    f"{mine['prefill_tokens_per_second']['median']:.0f}",
                    f"{other['prefill_tokens_per_second']['median']:.0f}",
                    ratio_of(run, "prefill", way, theirs, prompt),
                    f"{mine['seconds_per_token']['median'] * 1e3:.1f}",
                    f"{other['seconds_per_token']['median'] * 1e3:.1f}",
                    ratio_of(run, "decode", way, theirs, prompt),
                ]
            )
    header = ["prompt", "scores", "prefill, tokens/s", "transformers", "ratio"]
    return markdown([*header, "ms a decoded token", "transformers", "ratio"], rows)


def scaling_table(results: dict[str, Any]) -> str:
    rows = []
    for step, two in (("cp", "cp=2 tp=1 bfloat16"), ("tp", "cp=1 tp=2 bfloat16")):
        run = results[step]
        (prompt,) = prompts_of(run)
        copies = f"{ONE}, 2 copies"
        cells = [
            f"{result_of(run, way, prompt)['prefill_tokens_per_second']['median']:.0f}"
            for way in (ONE, copies, two)
        ]
        of_one = ratio_of(run, "prefill", two, ONE, prompt)
        of_copies = ratio_of(run, "prefill", two, copies, prompt)
        rows.append([f"{step}=2", f"{prompt:,}", *cells, of_one, of_copies])
    run = results["chunks"]
    (prompt,) = prompts_of(run)
    whole, chunked = (r["way"] for r in run["results"])
    chunk = run["results"][1]["settings"]["chunk_tokens"]
    table = markdown(
        ["", "prompt", "one rank", "two copies of it", "two ranks", "to one rank", "to the copies"],
        rows,
    )
    return (
        f"{table}\n\nIn chunks of {chunk:,} tokens, cp=2 prefills {prompt:,} tokens at "
        f"{ratio_of(run, 'prefill', chunked, whole, prompt)} of its speed in one piece."
    )


def memory_table(results: dict[str, Any]) -> str:
    run = results["memory"]
    (prompt,) = prompts_of(run)
    rows, most = [], []
    for way, name in ((ONE, "cp=1"), ("cp=2 tp=1 bfloat16", "cp=2")):
        ranks = result_of(run, way, prompt)["ranks"]
        most.append(max(rank["prefill_grown_bytes"] for rank in ranks))
        held = [ranks[0][f"{what}_bytes"] / 2**20 for what in ("parameter", "cache")]
        share = f"{most[-1] / most[0]:.2f}"
        rows.append([name, *(f"{x:.0f}" for x in (*held, most[-1] / 2**20)), share])
    return markdown(["", "parameters, MiB", "cache, MiB", "beyond them, MiB", "of cp=1"], rows)


def attention_table(results: dict[str, Any]) -> str:
    found = results["attention"]
    rows = []
    for row in found["rows"]:
        ratios = [b / a for a, b in zip(row["seconds"], row["torch_seconds"], strict=True)]
        rows.append(
            [
                row["dtype"],
                row["scores"],
                f"{statistics.median(row['seconds']) * 1e3:.0f}",
                f"{statistics.median(row['torch_seconds']) * 1e3:.0f}",
                spread_of(ratios),
                f"{row['error']:.1e}",
                f"{row['torch_error']:.1e}",
            ]
        )
    header = ["dtype", "scores", "ms", "torch, ms", "ratio", "error", "error of torch"]
    end = found["end"]
    times = end["seconds"]
    to_work = [b / (a * end["work"]) for a, b in zip(times["whole"], times["end"], strict=True)]
    return (
        f"{markdown(header, rows)}\n\n{end['new']:,} new tokens after {end['cached']:,} cached "
        f"ones, bfloat16: {statistics.median(times['end']) * 1e3:.0f} ms, which is "
        f"{spread_of(to_work)} times what their share of the work would take at the speed of the "
        f"{found['length']:,} tokens."
    )


def accuracy_table(results: dict[str, Any]) -> str:
    found = results["accuracy"]
    errors = found["errors"]
    rows = [
        [name, f"{error:.2e}", f"{error / errors['transformers']:.2f}"]
        for name, error in errors.items()
    ]
    return markdown(["logits in bfloat16", "relative L2 error", "to transformers"], rows)


PARTS = ("attention", "experts", "projections", "other", "host")


def parts_table(results: dict[str, Any]) -> str:
    run, layers = results["single"], results["limits"]["layers"]
    rows = []
    for prompt in prompts_of(run):
        found = result_of(run, ONE, prompt)
        for measure, shares in found["shares"].items():
            whole = "seconds_to_first_token" if measure == "prefill" else "seconds_per_token"
            host = shares["host"] * found[whole]["median"] / layers * 1e6
            cells = [f"{shares[part] * 100:.0f} %" for part in PARTS]
            calls = f"{found['operators'][measure] / layers:.0f}"
            rows.append([measure, f"{prompt:,}", *cells, calls, f"{host:.0f}"])
    header = ["", "prompt", *PARTS, "operator calls a layer", "host, us a layer"]
    return markdown(header, rows)


def arithmetic_table(results: dict[str, Any]) -> str:
    run, found = results["single"], results["limits"]
    rows = []
    for prompt in prompts_of(run):
        mine = result_of(run, ONE, prompt)
        flops = 2 * (prompt * found["parameters_of_a_token"] + found["head_parameters"])
        flops += found["attention_flops_of_a_pair"] * prompt * (prompt + 1) / 2
        limit = prompt * found["flops_per_second"] / flops
        rate = mine["prefill_tokens_per_second"]["median"]
        parameters = found["parameters_of_a_token"] + found["head_parameters"]
        num_bytes = 2 * parameters + prompt * found["cache_bytes_of_a_token"]
        least = num_bytes / found["bytes_per_second"] * 1e3
        step = mine["seconds_per_token"]["median"] * 1e3
        cells = [f"{rate:.0f}", f"{limit:.0f}", f"{rate / limit * 100:.0f} %"]
        cells += [f"{step:.1f}", f"{least:.1f}", f"{least / step * 100:.0f} %"]
        rows.append([f"{prompt:,}", *cells])
    header = ["prompt", "prefill, tokens/s", "limit", "reached"]
    return markdown([*header, "ms a decoded token", "limit", "reached"], rows)


def overlap_table(results: dict[str, Any]) -> str:
    found = results["overlap"]
    layers = found["layers"]
    rows = []
    for name, delay in found["delays"].items():
        cells = [f"{delay * 1e3:.1f}"]
        for key in (name, f"{name}, at once"):
            seconds = statistics.median(found["seconds"][key])
            cells.append(f"{seconds * 1e3:.0f}")
        waited = statistics.median(found["waited"][name]) / layers
        rows.append([*cells, f"{waited * 1e3:.1f}"])
    header = ["delay of the gather, ms a layer", "prefill, ms", "waited for at once, ms"]
    return markdown([*header, "waited after the queries, ms a layer"], rows)


if __name__ == "__main__":
    typer.run(main)
