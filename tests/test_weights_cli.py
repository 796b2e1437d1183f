"""`qwen3cp check`, `shard` and `make-random`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext, cli
from qwen3cp.errors import CheckpointError, InputError, UnsupportedConfigError
from qwen3cp.weights import CheckpointIndex, make_random


@pytest.fixture
def run(monkeypatch, capfd):
    """run(words) -> (exit code, stdout, stderr)"""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwen3cp", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    ("cp", "tp", "moe"), [(1, 1, "tp"), (2, 2, "tp"), (1, 4, "ep"), (3, 1, "ep")]
)
def test_check_says_what_loading_does(run, checkpoint, cp, tp, moe, dtype):
    options = ("--cp", cp, "--tp", tp, "--moe", moe, "--dtype", dtype)
    code, out, _ = run("check", checkpoint, *options, "--json")
    report = json.loads(out)
    assert code == 0 and report["num_tensors"] == len(CheckpointIndex.read(checkpoint).tensors)
    assert report["dtypes"] == ["bfloat16"] and report["num_files"] == 6
    assert len(report["ranks"]) == cp * tp
    for rank, told in enumerate(report["ranks"]):
        model = CPQwen3MoeForCausalLM.from_pretrained(
            checkpoint,
            parallel_context=ParallelContext.describe(rank, cp_size=cp, tp_size=tp, moe=moe),
            dtype=dtype,
        )
        assert model.load_report is not None
        assert told["bytes_to_read"] == model.load_report.bytes_read
        assert told["bytes_spanned"] >= told["bytes_to_read"]
        assert (told["bytes_spanned"] == told["bytes_to_read"]) == (tp == 1)
        assert told["num_parameters"] == sum(p.numel() for p in model.parameters())
        assert told["parameter_bytes"] == sum(p.nbytes for p in model.parameters())


def test_check_in_words(run, checkpoint):
    code, out, _ = run("check", checkpoint, "--tp", 2)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5
    assert lines[0].startswith(f"{checkpoint} is whole: one tensor per expert, ")


def test_check_says_what_is_wrong(run, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "model-00002-of-00006.safetensors").unlink()
    code, out, error = run("check", folder)
    assert code == 2 and out == ""
    assert error.startswith("error: ") and "model-00002-of-00006.safetensors" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tp", 3), "num_key_value_heads = 4 cannot be divided"),
        (("--cp", 0), "cp_size must be a positive integer"),
        (("--moe", "dp"), "--moe must be tp or ep, got 'dp'"),
        (("--dtype", "float99"), "float99"),
    ],
)
@pytest.mark.parametrize("command", ["check", "shard"])
def test_wrong_options(run, checkpoint, tmp_path, command, words, message):
    out = (tmp_path / "out",) if command == "shard" else ()
    code, stdout, error = run(command, checkpoint, *out, *words)
    assert code == 2 and stdout == ""
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_shard_then_check_then_generate(run, checkpoint, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = run("shard", checkpoint, out, "--tp", 2, "--cp", 2, "--moe", "ep")
    assert code == 0 and stdout.startswith(f"{out}: ") and "cp=2 tp=2 moe=ep" in stdout
    code, stdout, _ = run("check", out, "--tp", 2, "--cp", 2, "--moe", "ep")
    assert code == 0 and "cut by qwen3cp shard" in stdout
    code, _, error = run("check", out)
    assert code == 2
    assert f"`qwen3cp shard {checkpoint} OUT --tp 1 --cp 1 --moe tp`" in error

    one = tmp_path / "one"
    assert run("shard", checkpoint, one)[0] == 0
    words = ("--prompt-file", "docs/examples/prompt.txt", "--max-new-tokens", 8)
    assert run("generate", one, *words)[:2] == run("generate", checkpoint, *words)[:2]


# --------------------------------------------------------------------------------- make-random


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    names = CheckpointIndex.read(folder).files
    return {name: x for file in names for name, x in load_file(folder / file).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_make_random(run, checkpoint, tmp_path, dtype):
    """What transformers loads, with nothing missing; the same for the same seed alone."""
    code, stdout, _ = run(
        "make-random", checkpoint / "config.json", tmp_path / "a", "--dtype", dtype
    )
    assert code == 0 and "parameters" in stdout
    theirs, info = cast(Any, Qwen3MoeForCausalLM).from_pretrained(
        tmp_path / "a", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()) and str(theirs.dtype) == f"torch.{dtype}"
    if dtype != "float16":
        ours = CPQwen3MoeForCausalLM.from_pretrained(tmp_path / "a").state_dict()
        assert all(torch.equal(ours[name], x) for name, x in theirs.state_dict().items())
    a = tensors_of(tmp_path / "a")
    for name, x in a.items():
        x, mean = x.float(), 1.0 if "norm" in name else 0.0
        assert abs(x.mean() - mean) < 0.01 and 0.015 < x.std() < 0.025

    again = ("make-random", checkpoint, tmp_path / "b", "--dtype", dtype)
    assert run(*again, "--max-shard-size", "1MB")[0] == 0
    b = tensors_of(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert run("make-random", checkpoint, tmp_path / "c", "--dtype", dtype, "--seed", 1)[0] == 0
    c = tensors_of(tmp_path / "c")
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(tie_word_embeddings=True),
        dict(attention_bias=True, mlp_only_layers=[0]),
        dict(decoder_sparse_step=2, num_experts=3),
    ],
    ids=str,
)
def test_make_random_of_other_configs(tmp_path, overrides):
    sizes = dict(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=2,
        num_experts_per_tok=1,
    )
    config = Qwen3MoeConfig(**{**sizes, **overrides})
    make_random(config, tmp_path / "out", dtype=torch.float32, max_shard_size="20KB")
    theirs, info = cast(Any, Qwen3MoeForCausalLM).from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ours = CPQwen3MoeForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(ours[name], x) for name, x in theirs.state_dict().items())


def test_make_random_refuses(run, checkpoint, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, error = run("make-random", checkpoint, tmp_path)
    assert code == 2 and "not an empty folder" in error
    config = Qwen3MoeConfig.from_pretrained(checkpoint)
    with pytest.raises(InputError, match="float64"):
        make_random(config, tmp_path / "out", dtype=torch.float64)
    config.hidden_act = "gelu"
    with pytest.raises(UnsupportedConfigError, match="gelu"):
        make_random(config, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ------------------------------------------------------------------------------------- the hub


def cached_repository(checkpoint: Path, cache: Path, *left_out: str) -> None:
    """A hub cache as downloads leave it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    snapshot = folder / "snapshots" / commit
    blobs = folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.glob("*.*"):
        if path.name not in left_out and path.name != "README.md":
            shutil.copy(path, blobs / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")


def test_a_hub_id_in_the_cache(checkpoint, tmp_path):
    cached_repository(checkpoint, tmp_path)
    model = CPQwen3MoeForCausalLM.from_pretrained(
        "someone/tiny", cache_dir=tmp_path, local_files_only=True, dtype="float32"
    )
    expected = CPQwen3MoeForCausalLM.from_pretrained(checkpoint, dtype="float32").state_dict()
    assert all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("config.json", "'someone/tiny' is neither a folder nor"),
        ("model.safetensors.index.json", "someone/tiny has neither"),
        ("model-00003-of-00006.safetensors", "lacks files of its index: model-00003"),
    ],
)
def test_a_hub_id_that_is_not_all_in_the_cache(checkpoint, tmp_path, lost, words):
    cached_repository(checkpoint, tmp_path, lost)
    with pytest.raises(CheckpointError, match=words):
        CPQwen3MoeForCausalLM.from_pretrained(
            "someone/tiny", cache_dir=tmp_path, local_files_only=True
        )


def test_only_the_files_that_are_needed_are_downloaded(checkpoint, tmp_path, monkeypatch):
    """The hub's two calls, recorded."""
    from qwen3cp.weights import index

    cached_repository(checkpoint, tmp_path)
    asked: list[object] = []
    for name in ("hf_hub_download", "snapshot_download"):
        real = getattr(index, name)

        def record(*args: object, real=real, **kwargs: object) -> object:
            asked.append((*args[1:], kwargs.get("allow_patterns"), kwargs.get("revision")))
            return real(*args, **kwargs, local_files_only=True)

        monkeypatch.setattr(index, name, record)
    CPQwen3MoeForCausalLM.from_pretrained("someone/tiny", cache_dir=tmp_path, revision="main")
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert asked == [
        ("config.json", None, "main"),
        ("generation_config.json", None, commit),
        ("model.safetensors.index.json", None, commit),
        (CheckpointIndex.read(checkpoint).files, commit),
    ]


# ------------------------------------------------------------------------------------ progress


def test_progress_shows_bytes_and_rate(checkpoint, capfd):
    CPQwen3MoeForCausalLM.from_pretrained(checkpoint, progress=True)
    shown = capfd.readouterr().err
    assert "reading weights: 100%" in shown and "B/s" in shown
    CPQwen3MoeForCausalLM.from_pretrained(checkpoint)  # no terminal
    assert "reading" not in capfd.readouterr().err


def test_the_benchmark_runs(checkpoint):
    script = Path(__file__).parents[1] / "docs" / "benchmarks" / "load.py"
    ways = ["tp=1", "tp=2, one rank alone", "cp=2, share_reads"]
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(checkpoint), "--repeats", "1"]
        + ["--ways", *ways],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]]
    assert rows == [f"| {way}" for way in ways]
