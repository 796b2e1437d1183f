"""The examples in docs/examples, on two ranks, and the demo's comparison."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from qwen3cp import CPQwen3MoeForCausalLM
from tests.conftest import CHECKPOINT

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo")
LAST_STEP = {  # what each must print; the numbers are the answers to its questions
    "compiled_decode": ["#### 65", "#### 72", "graphs: 2, breaks: 0"],
    "custom_loop": ["#### 65", "#### 72", "#### 20", "free pages: 31 of 31"],
    "hf_generate": ["#### 65", "#### 72"],
    "fork_samples": ["405 tokens of prompt; 4 sequences of 16 pages use 7", "sample: "],
    "embed_attention": ["2 ranks against one, 24 rows: difference "],
    "embed_layer": ["150 of 300 rows here: difference "],
}

# Runs scripts on a rank, one after another, in one world that outlives them.
DRIVER = """
import contextlib, io, json, os, runpy, sys
import torch.distributed as dist
from qwen3cp import cli

output, *scripts = sys.argv[1:]
dist.init_process_group("gloo")
end = dist.destroy_process_group
dist.init_process_group = lambda *args, **kwargs: None
dist.destroy_process_group = lambda *args: None
results = {}
for script in scripts:
    sys.argv = script.split("\\t")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if sys.argv[0] == "qwen3cp":
            with contextlib.suppress(SystemExit):
                cli.main()
        else:
            runpy.run_path(script, run_name="__main__")
    results[script] = printed.getvalue()
json.dump(results, open(f"{output}.{os.environ['RANK']}", "w"))
end()
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[dict[str, str]]:
    """What every example prints on each of two ranks that `accelerate launch` has started.

    And what the command line does there, under the name "qwen3cp".
    """
    folder = tmp_path_factory.mktemp("examples")
    (folder / "driver.py").write_text(DRIVER)
    scripts = [str(EXAMPLES / f"{name}.py") for name in NAMES]
    command = ["qwen3cp", "generate", str(CHECKPOINT), "--cp", "2", "--prompt-file"]
    subprocess.run(
        [
            *(str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu"),
            *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
            *(str(folder / "driver.py"), str(folder / "output")),
            *scripts,
            "\t".join([*command, str(EXAMPLES / "prompt.txt")]),
        ],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    ranks = [json.loads((folder / f"output.{rank}").read_text()) for rank in range(2)]
    return [
        {Path(script.split("\t")[0]).stem: text for script, text in rank.items()} for rank in ranks
    ]


def test_every_example_is_known():
    assert sorted(LAST_STEP) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_example(printed, name):
    rank_0, rank_1 = (rank[name] for rank in printed)
    assert rank_1 == ""
    for expected in LAST_STEP[name]:
        assert expected in rank_0
    for difference in re.findall(r"difference (.*)", rank_0):
        assert float(difference) <= 2e-4
    if name == "fork_samples":
        assert rank_0.count("sample: ") == 4


def test_command_line_under_accelerate(printed):
    assert [rank["qwen3cp"] for rank in printed] == [" 12 + 15 = <<12+15=27>>27\n#### 27\n", ""]


@pytest.mark.parametrize("name", NAMES)
def test_example_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 75
    assert f"python docs/examples/{name}.py" in text
    assert f"torchrun --nproc-per-node 2 docs/examples/{name}.py" in text


# -------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def solved(demo):
    """The demo's first problem, solved on one rank: (tokenizer, problem, solution, logits)."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = CPQwen3MoeForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    problem = demo.choose_problems(tokenizer)[0]
    cache = model.new_kv_cache(max_tokens=256)
    solution = demo.solve(model, cache, tokenizer, problem, Console(quiet=True))
    assert (solution.pages_used, solution.pages_free) == (1, 1)
    assert cache.num_free_pages == 2
    return tokenizer, problem, solution, demo.prompt_logits(model, problem)


def test_demo_chooses_problems_by_length_alone(demo):
    problems = demo.choose_problems(AutoTokenizer.from_pretrained(CHECKPOINT))
    assert [p.kind for p in problems] == ["short"] * 4 + ["facts", "long"]
    assert len(problems[-1].ids) > 2000


def test_demo_accepts_what_is_right(demo, solved, capsys):
    _, problem, solution, logits = solved
    assert demo.compare(Console(), [problem], [solution], [logits])
    assert f"{len(solution.tokens)} equal, 0 differ" in capsys.readouterr().out
    assert demo.final_number(problem.answer) == "109"


@pytest.mark.parametrize("what", ["logits", "tokens"])
def test_demo_notices_a_difference(demo, solved, capsys, what):
    _, problem, solution, logits = solved
    tokens = list(solution.tokens)
    if what == "logits":
        logits = logits.clone()
        logits[5, 17] += 3e-4
    else:
        tokens[3] = (tokens[3] + 1) % 600
    changed = demo.Solution(tokens, 0.1, 0.1, 1, 1)
    assert not demo.compare(Console(), [problem], [changed], [logits])
    assert "MISMATCH" in capsys.readouterr().out
