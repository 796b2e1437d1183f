"""`qwen3cp eval`: its errors, its files, several ranks, a run that is killed."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from qwen3cp import cli
from qwen3cp.eval import lm as lm_module

ROOT = Path(__file__).parent.parent.parent
CHECKPOINT = "tests/assets/tiny-qwen3-moe"
RUN = ["--model", CHECKPOINT, "--dtype", "float32", "--tasks", "word_problems_short"]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT")  # set by the launcher: restore


def call(monkeypatch, capfd, *arguments: str) -> tuple[int, str, str]:
    """In this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["qwen3cp", "eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    stdout, stderr = capfd.readouterr()
    code = ended.value.code or 0
    assert isinstance(code, int)
    return code, stdout, stderr


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qwen3cp.eval", *arguments]


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


def samples_of(folder: Path) -> list[str]:
    """The lines of the one samples file."""
    (path,) = files(folder, "samples_*.jsonl")
    return path.read_text().splitlines()


# --------------------------------------------------------------------------------------- errors


ERRORS = {
    "unknown task": (["--tasks", "no_such_task"], "no_such_task"),
    "no task": ([], "there is no task: pass --tasks"),
    "unknown option": ([*RUN[4:], "--no_such", "1"], "unrecognized arguments: --no_such"),
    "missing data": (["--tasks", "gsm8k", "--data-dir", "tests"], "gsm8k"),
    "data for no task": ([*RUN[4:], "--data-dir", "tests"], "--data-dir"),
    "no number": ([*RUN[4:], "--limit", "many"], "--limit"),
    "negative limit": ([*RUN[4:], "--limit", "-1"], "--limit"),
    "few shots": ([*RUN[4:], "--num_fewshot", "-2"], "--num_fewshot"),
    "samples without a folder": ([*RUN[4:], "--log_samples"], "--output_path"),
    "a file for a folder": ([*RUN[4:], "--output_path", "README.md/x"], "--output_path"),
    "samples of no task": ([*RUN[4:], "--samples", '{"other": [1]}'], "--samples names 'other'"),
    "bad samples": ([*RUN[4:], "--samples", "nothing"], "--samples"),
    "generation": ([*RUN[4:], "--gen_kwargs", "num_beams=4"], "beam_search"),
    "unknown generation": ([*RUN[4:], "--gen_kwargs", "warmth=4"], "warmth"),
    "model argument": ([*RUN[4:], "--model_args", "no_such=1"], "no_such"),
    "batch size": ([*RUN[4:], "--batch_size", "none"], "batch_size"),
    "chat": ([*RUN[4:], "--apply_chat_template"], "has no chat template"),
    "turns": ([*RUN[4:], "--fewshot_as_multiturn"], "apply_chat_template"),
    "another model": ([*RUN[4:], "-M", "hf"], "runs qwen3cp"),
    "config": ([*RUN[4:], "--config", "nowhere.yaml"], "nowhere.yaml"),
    "cp": ([*RUN[4:], "--cp", "0"], "--cp must be positive"),
    "int8": ([*RUN[4:], "--int8", "never"], "--int8 must be one of"),
    "cache": ([*RUN[4:], "--cache-tokens", "0"], "--cache-tokens"),
    "room": ([*RUN[4:], "--gen_kwargs", "max_gen_toks=99999"], "leaves no room for a prompt"),
    "room given": (
        [*RUN[4:], "--model_args", "max_length=50"],
        "max_gen_toks=64 leaves no room for a prompt: the model allows 50 tokens",
    ),
    "no number of tokens": ([*RUN[4:], "--gen_kwargs", "max_gen_toks=many"], "gen_kwargs"),
    "device": ([*RUN[4:], "--device", "cuda:3"], "device must be cpu or npu"),
}


@pytest.mark.parametrize("arguments, said", ERRORS.values(), ids=ERRORS)
def test_errors(arguments, said, monkeypatch, capfd):
    """One line, exit code 2, before the model loads."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(lm_module.CPQwen3MoeForCausalLM, "from_pretrained", load)
    code, stdout, stderr = call(monkeypatch, capfd, "--model", CHECKPOINT, *arguments)
    assert code == 2, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0], stderr
    assert "Traceback" not in stderr and stdout == ""


def test_no_model(monkeypatch, capfd):
    code, _, stderr = call(monkeypatch, capfd, "--tasks", "word_problems")
    assert code == 2 and stderr == "error: there is no model: pass --model DIR\n"
    code, _, stderr = call(monkeypatch, capfd, "--model", "nowhere", *RUN[4:])
    assert code == 2 and "there is no folder nowhere" in stderr


def test_errors_of_several_ranks_come_once_and_before_they_start(monkeypatch, capfd):
    monkeypatch.setattr("qwen3cp.launch.start_ranks", lambda *args: pytest.fail("started"))
    code, _, stderr = call(
        monkeypatch, capfd, "--model", CHECKPOINT, "--cp", "2", "--tasks", "no_such_task"
    )
    assert code == 2 and stderr.count("error: ") == 1


def test_help_names_both_kinds_of_options(monkeypatch, capfd):
    code, stdout, _ = call(monkeypatch, capfd, "--help")
    assert code == 0
    for option in ("--model", "--cp", "--tp", "--dp", "--data-dir", "--num_fewshot", "--use_cache"):
        assert option in stdout


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """The folder of a run on one rank, of a YAML file and options; its stdout."""
    folder = tmp_path_factory.mktemp("one")
    config = folder / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": "qwen3cp",
                "model_args": {"pretrained": CHECKPOINT, "dtype": "float32", "max_length": 600},
                "tasks": ["word_problems_short"],
                "num_fewshot": 1,
            }
        )
    )
    options = ["--config", str(config), "--limit", "10", "--log_samples"]
    done = subprocess.run(
        command(*options, "--output_path", str(folder / "out")),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out", options, done


def test_files_of_a_run(run_of):
    folder, _, done = run_of
    (results_file,) = files(folder, "results_*.json")
    results = json.loads(results_file.read_text())
    config = results["config"]
    assert config["model"] == results["model_source"] == "qwen3cp"
    assert results["model_name"] == CHECKPOINT
    assert config["topology"] == {"cp": 1, "tp": 1, "dp": 1, "moe": "tp"}
    assert config["comm"]["kv_gather"] == "exact" and "torch" in config["versions"]
    assert config["truncated_documents"] == 0
    assert config["batch_size"] == "auto"
    assert results["n-samples"]["word_problems_short"]["effective"] == 10
    assert results["results"]["word_problems_short"]["exact_match,strict-match"] >= 0.8
    assert "|word_problems_short|" in done.stdout
    samples = [json.loads(line) for line in samples_of(folder)]
    assert len(samples) == 20  # two filters
    (tokens_file,) = files(folder, "logprobs_word_problems_short_*.jsonl")
    lines = [json.loads(line) for line in tokens_file.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(10))
    for line in lines:
        (request,) = line["requests"]
        assert len(request["tokens"]) == len(request["logprobs"]) > 5
        assert max(request["logprobs"]) <= 0
        assert line["doc_hash"] == samples[line["doc_id"]]["doc_hash"]


def wait_for(condition, process, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(run_of, tmp_path):
    """All processes of two replicas are killed half way; what they had answered is used."""
    folder, options, _ = run_of
    cache = tmp_path / "answers"
    options = [*options, "--use_cache", str(cache), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(*options, "--dp", "2", "--batch_size", "1"),
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    database = Path(f"{cache}_rank0.db")

    def num_answers() -> int:
        if not database.exists():
            return 0
        try:
            with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
                return connection.execute("select count(*) from unnamed").fetchone()[0] // 2
        except sqlite3.OperationalError:
            return 0

    try:
        wait_for(lambda: num_answers() >= 3, process)
    finally:
        kill_all(process)
    before = num_answers()
    assert 3 <= before < 10
    assert not files(tmp_path, "results_*.json")

    done = subprocess.run(
        command(*options), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert samples_of(tmp_path / "out") == samples_of(folder)
    shown = re.findall(r"(\d+)/(\d+) \[.*pages\]", done.stderr)
    assert int(shown[-1][1]) == 10 - before  # documents that were left
    (tokens,) = files(tmp_path / "out", "logprobs_*.jsonl")
    assert all(json.loads(line)["requests"][0] for line in tokens.read_text().splitlines())


def kill_all(process: subprocess.Popen) -> None:
    """The launcher and its ranks, which are in sessions of their own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in [*map(int, children), process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_ranks_of_its_own(run_of, tmp_path):
    """cp x tp x dp ranks: the same samples, written once; one bar."""
    folder, options, _ = run_of
    done = subprocess.run(
        command(*options, "--cp", "2", "--dp", "2", "--output_path", str(tmp_path)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert samples_of(tmp_path) == samples_of(folder)
    (results_file,) = files(tmp_path, "results_*.json")
    results = json.loads(results_file.read_text())
    assert results["config"]["topology"] == {"cp": 2, "tp": 1, "dp": 2, "moe": "tp"}
    assert done.stdout.count("|word_problems_short|") == 1
    assert done.stderr.count("Documents: 100%") >= 1
    assert done.stderr.count("Documents:   0%|          | 0/10 [00:00<?, ?doc/s]") == 1


@pytest.mark.slow
def test_under_torchrun(run_of, tmp_path):
    folder, options, _ = run_of
    torchrun = str(Path(sys.executable).parent / "torchrun")
    done = subprocess.run(
        [torchrun, "--nproc-per-node", "2", *command(*options)[1:], "--tp", "2"]
        + ["--output_path", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert samples_of(tmp_path) == samples_of(folder)
    assert len(files(tmp_path, "results_*.json")) == 1
