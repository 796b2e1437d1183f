"""`qwen3cp plan`: its tables, its JSON, and how it refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwen3cp import cli
from qwen3cp.planner.command import ranges
from qwen3cp.planner.counts import DryRun
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.models import read_model

TINY = str(Path(__file__).parents[1] / "assets" / "tiny-qwen3-moe")


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def plan(capsys, monkeypatch) -> Callable[..., Result]:
    """Runs `qwen3cp plan ...` in this process."""
    monkeypatch.setattr(logging.getLogger("qwen3cp"), "handlers", [])

    def call(*arguments: Any) -> Result:
        monkeypatch.setattr(sys, "argv", ["qwen3cp", "plan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def test_json_is_the_dry_run(plan):
    options = [
        "--cp",
        2,
        "--tp",
        2,
        "--moe",
        "ep",
        "--exchange",
        "all_to_all",
        "--int8",
        "two_step",
    ]
    sizes = ["--prompt", 300, "--chunk", 128, "--batch", 2, "--new-tokens", 200]
    result = plan(TINY, *options, *sizes, "--hardware", "a2", "--json")
    assert (result.code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    run = DryRun.from_dict(document["dry_run"])
    assert (run.cp_size, run.tp_size, run.moe) == (2, 2, "ep")
    assert (run.prompt, run.chunk, run.batch, run.new_tokens) == (300, 128, 2, 200)
    assert run.dtype == "bfloat16"
    assert (run.comm["all_reduce"], run.comm["exchange"]) == ("int8_two_step", "all_to_all")
    assert run == dry_run(
        read_model(TINY)[0],
        model=TINY,
        cp_size=2,
        tp_size=2,
        moe="ep",
        comm=cli_comm(run),
        prompt=300,
        chunk=128,
        batch=2,
        new_tokens=200,
    )
    (kind, *_) = run.ranks
    assert kind.kv_bytes == 4 * 2 * (1 + 2 * 4) * 128 * 2 * 64 * 2  # 4 pages a sequence
    assert document["fit"]["fits"] is True
    assert document["hardware"]["name"] == "a2"
    assert document["prediction"]["ttft_seconds"] > 0


def cli_comm(run: DryRun) -> Any:
    from qwen3cp import CommConfig

    return CommConfig(**run.comm)


def test_tables(plan):
    result = plan(TINY, "--cp", 2, "--tp", 2, "--prompt", 300, "--chunk", 20)
    assert (result.code, result.stderr) == (0, "")
    text = result.stdout
    lines = text.splitlines()
    assert lines[0].startswith(f"{TINY} (its config.json): 0.01 G parameters")
    assert max(map(len, lines[1:])) <= 120
    assert any("│ 0-1 " in line for line in lines) and any("│ 2-3 " in line for line in lines)
    names = ("parameters", "KV cache", "activations", "TFLOP", "MB a layer", "kv_gather", "cp of 2")
    assert all(name in text for name in names)
    assert text.count("prefill 1") == 3  # from 100, 120 and 140 on: the next are left out
    assert "│ ... " in text and "prefill 280 to 300" in text and "prefill, all" in text
    assert "\nfits on a3: rank " in text
    assert "decode after 300" in text
    assert "assumed: kernels' workspace" in text


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        (["Qwen/Qwen3-30B-A3B", "--tp", 4, "--prompt", 262144, "--chunk", 131072], "fits"),
        (["Qwen/Qwen3-30B-A3B", "--cp", 4, "--prompt", 262144, "--chunk", 131072], "does not fit"),
        (["Qwen/Qwen3-30B-A3B", "--tp", 4, "--prompt", 1048576, "--chunk", 524288], "does not fit"),
        (["Qwen/Qwen3-235B-A22B", "--cp", 4, "--tp", 4, "--prompt", 131072], "does not fit"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else x,
)
def test_full_models_fit_or_do_not_with_numbers(plan, monkeypatch, arguments, verdict):
    """Without a network, and with a warning: these are more positions than the config has."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "qwen3cp.planner.dry_run._kinds_of_layers",
        lambda config, *_: [[0], list(range(1, config.num_hidden_layers))],
    )
    result = plan(*arguments)
    assert result.code == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if " on a3: rank " in line)
    assert line.startswith(f"{verdict} on a3: rank 0 needs ")
    assert "GiB" in line and "of 64.0 GiB" in line
    assert "(the config that comes with this package)" in result.stdout
    prompt = arguments[arguments.index("--prompt") + 1]
    assert f"warning: {prompt + 1} tokens are beyond the 40960 positions" in result.stdout


@pytest.mark.slow
def test_the_largest_model_on_sixteen_ranks(plan):
    """All 94 layers of every kind of rank."""
    result = plan(
        "Qwen/Qwen3-235B-A22B",
        *("--cp", 4, "--tp", 4, "--moe", "ep", "--prompt", 131072, "--batch", 1),
        *("--chunk", 32768, "--dtype", "bfloat16", "--hardware", "a3", "--json"),
    )
    assert result.code == 0, result.stderr
    document = json.loads(result.stdout)
    run = DryRun.from_dict(document["dry_run"])
    assert [kind.ranks[0] for kind in run.ranks] == [0, 4, 8, 12]
    assert document["fit"]["fits"]
    layers = {layer for x in run.ranks[0].steps[0].operators for layer in x.layers}
    assert layers == set(range(94))
    assert run == dry_run(
        read_model("Qwen3-235B-A22B")[0],
        model="Qwen/Qwen3-235B-A22B",
        cp_size=4,
        tp_size=4,
        moe="ep",
        prompt=131072,
        chunk=32768,
        layers="distinct",
    )


def test_a_config_file_and_a_folder_are_the_same(plan, tmp_path):
    file = tmp_path / "some.json"
    shutil.copy(Path(TINY) / "config.json", file)
    runs = []
    for name in (TINY, file):
        result = plan(name, "--prompt", 64, "--json")
        assert result.code == 0, result.stderr
        document = json.loads(result.stdout)["dry_run"]
        del document["model"]
        runs.append(document)
    assert runs[0] == runs[1]


MISTAKES = [
    (["--tp", 3], "num_key_value_heads = 4 cannot be divided evenly by 3"),
    (["--tp", 16], "num_attention_heads = 8 cannot be divided evenly by 16"),
    (["--cp", 0], "--cp must be positive, got 0"),
    (["--moe", "dp"], "--moe must be tp or ep, got 'dp'"),
    (["--prompt", 0], "--prompt must be at least 1, got 0"),
    (["--chunk", -1], "--chunk must be at least 1, got -1"),
    (["--dtype", "float16"], "--dtype must be one of auto, bfloat16, float32, got 'float16'"),
    (["--skip-layers", "9", "--int8", "auto"], "names the layers [9]; the model has 0 to 3"),
    (["--hardware", "a9"], "'a9'"),
    (["--efficiencies", "/nowhere.json"], "/nowhere.json"),
    (["--search"], "--search and --devices go together"),
    (["--devices", 4], "--search and --devices go together"),
    (["--search", "--devices", 4, "--tp", 2, "--int8-kv"], "leave out --tp, --int8-kv"),
    (["--fit", "attention"], "belong to --calibrate"),
    (["--html", "/nowhere/plan.html"], "--html /nowhere/plan.html: there is no such folder"),
    (["--prompt", 2000000], "TND"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda x: str(x))
def test_a_mistake_is_one_line_and_exit_code_2(plan, options, message):
    sizes = [] if "--prompt" in options else ["--prompt", 64]
    result = plan(TINY, *sizes, *options)
    assert result.code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "there is nothing to plan: pass MODEL_OR_CONFIG"),
        ("no such model", "no such model"),
        (__file__, "is not JSON"),
    ],
)
def test_what_is_no_model_is_a_mistake(plan, monkeypatch, name, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = plan(*([] if name is None else [name]))
    assert result.code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_process_of_its_own():
    """From outside, as under torchrun: the ranks that are planned are not those that run it."""
    done = subprocess.run(
        [sys.executable, "-m", "qwen3cp.cli", "plan", TINY, "--cp", "2", "--prompt", "64"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", "WORLD_SIZE": "3"},
    )
    assert done.returncode == 0, done.stderr
    assert "fits on a3" in done.stdout


def test_ranges():
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
