"""The command line: alone, under torchrun, and on ranks that it starts.

Under `accelerate launch` it runs in test_examples.py.
"""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import GenerationConfig

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, __version__, cli, launch
from qwen3cp.errors import CommunicationError, InputError, KVCacheFullError
from qwen3cp.launch import exit_code_of, start_ranks
from tests.conftest import CHECKPOINT

SHORT = "Question: There are 6 boxes with 12 toys each. How many toys are there in total?\nAnswer:"
LONGER = (
    "Question: Mia has 12 flowers. Mia finds 15 more and then loses 7. "
    "How many flowers does Mia have?\nAnswer:"
)
MODEL = str(CHECKPOINT)
BIN = Path(sys.executable).parent
GREEDY = ["--dtype", "float32", "--max-new-tokens", "24"]
SAMPLED = [*GREEDY, "--temperature", "1.2", "--top-k", "50", "--top-p", "0.95", "--seed", "7"]


class Result:
    """What one process, or one rank, printed."""

    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if "error" in line.lower()]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process: run(*arguments) -> Result."""
    monkeypatch.setattr(logging.getLogger("qwen3cp"), "handlers", [])

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["qwen3cp", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return call


def process(*command: str, stdin: str | None = None) -> Result:
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------ one process


def test_version_and_help(run):
    assert run("--version").stdout == f"{__version__}\n"
    shown = run("generate", "--help").stdout
    for option in ("--cp", "--tp", "--prompt-file", "--temperature", "--chat", "--json"):
        assert option in shown
    assert run().code == 2


def test_stdout_holds_the_answer_and_nothing_else(run):
    result = run("generate", MODEL, "--prompt", SHORT, *GREEDY)
    assert result.code == 0
    assert result.stdout.startswith(" 6 * 12 = <<6*12=72>>72\n#### 72\n")
    assert "cp=1 tp=1, float32 on cpu" in result.stderr
    assert re.search(
        r"24 prompt tokens, 2\d new .*first after \d+\.\d+ s, then \d+\.\d tokens/s", result.stderr
    )


def test_json_document(run):
    result = run("generate", MODEL, "--prompt", SHORT, "--prompt", LONGER, "--json", *GREEDY)
    assert result.code == 0
    document = json.loads(result.stdout)
    assert set(document) == {"model", "dtype", "device", "topology", "results"}
    assert document["topology"] == {"cp": 1, "tp": 1}
    assert (document["model"], document["dtype"], document["device"]) == (MODEL, "float32", "cpu")
    assert [one["prompt"] for one in document["results"]] == [SHORT, LONGER]
    for one in document["results"]:
        assert set(one) == {"prompt", "text", "token_ids", "num_tokens", "finish_reason", "timing"}
        assert one["num_tokens"] == len(one["token_ids"]) <= 24
        assert one["finish_reason"] in ("stop", "length")
        timing = one["timing"]
        assert 0 < timing["seconds_to_first_token"] < timing["seconds"]
        assert timing["tokens_per_second"] > 0


def test_a_batch_gives_what_each_prompt_gives_alone(run):
    together = run("generate", MODEL, "--prompt", SHORT, "--prompt", LONGER, "--json", *GREEDY)
    streamed = run("generate", MODEL, "--prompt", SHORT, "--prompt", LONGER, *GREEDY)
    texts = [one["text"] for one in json.loads(together.stdout)["results"]]
    assert streamed.stdout == "".join(f"{text}\n" for text in texts)


def test_finish_reasons(run, monkeypatch):
    at_limit = run("generate", MODEL, "--prompt", SHORT, "--json", "--max-new-tokens", "3")
    (one,) = json.loads(at_limit.stdout)["results"]
    assert (one["finish_reason"], one["num_tokens"]) == ("length", 3)
    assert one["timing"]["tokens_per_second"] > 0

    single = run("generate", MODEL, "--prompt", SHORT, "--json", "--max-new-tokens", "1")
    (one,) = json.loads(single.stdout)["results"]
    assert one["timing"]["tokens_per_second"] is None

    problem = next(
        p["question"]
        for p in map(json.loads, (CHECKPOINT / "problems-test.jsonl").read_text().splitlines())
        if p["question"].startswith("Noah has 12 eggs")
    )
    ended = run(
        "generate",
        MODEL,
        "--prompt",
        f"Question: {problem}\nAnswer:",
        "--json",
        *GREEDY,
        "--max-new-tokens",
        "64",
    )
    (one,) = json.loads(ended.stdout)["results"]
    assert one["finish_reason"] == "stop"
    assert one["token_ids"][-1] == 510 and "<|endoftext|>" not in one["text"]
    assert one["text"].endswith("#### 35")


def test_seeded_samples_repeat(run):
    arguments = ["generate", MODEL, "--prompt", "Question:", *SAMPLED]
    first, again, other = (run(*arguments, "--seed", seed) for seed in ("7", "7", "8"))
    assert first.stdout == again.stdout != other.stdout


def test_generation_config_decides_without_a_temperature(run, tmp_path):
    folder = copy_of_checkpoint(tmp_path)
    sampling = GenerationConfig(
        do_sample=True, temperature=1.7, top_k=100, top_p=0.99, eos_token_id=510, pad_token_id=510
    )
    sampling.save_pretrained(folder)
    arguments = ["--prompt", SHORT, *GREEDY, "--seed", "3"]
    greedy = run("generate", MODEL, *arguments)
    sampled = run("generate", str(folder), *arguments)
    assert sampled.stdout != greedy.stdout
    forced = run("generate", str(folder), *arguments, "--temperature", "0")
    assert forced.stdout == greedy.stdout
    assert "top_p" not in forced.stderr and "temperature" not in forced.stderr  # no warnings


def test_chat_template(run, tmp_path):
    folder = copy_of_checkpoint(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}Answer:"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    arguments = ["generate", str(folder), "--json", "--max-new-tokens", "2", "--prompt", "hello"]
    chat = run(*arguments, "--chat", "--system", "be brief")
    assert chat.code == 0
    raw = run(
        "generate",
        MODEL,
        "--json",
        "--max-new-tokens",
        "2",
        "--prompt",
        "system: be brief\nuser: hello\nAnswer:",
    )
    assert (
        json.loads(chat.stdout)["results"][0]["token_ids"]
        == json.loads(raw.stdout)["results"][0]["token_ids"]
    )
    assert json.loads(chat.stdout)["results"][0]["prompt"] == "hello"


def test_prompt_file(run, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(SHORT + "\n")
    from_file = run("generate", MODEL, "--prompt-file", str(file), *GREEDY)
    assert from_file.stdout == run("generate", MODEL, "--prompt", SHORT, *GREEDY).stdout


MISTAKES = {
    "no folder": (["/missing/folder", "--prompt", "a"], "there is no folder /missing/folder"),
    "not a checkpoint": (["docs", "--prompt", "a"], "docs has no config.json"),
    "empty prompt": ([MODEL, "--prompt", ""], "prompt 0 is empty"),
    "no prompt": ([MODEL], "there is no prompt"),
    "two sources": ([MODEL, "--prompt", "a", "--prompt-file", "b"], "not both"),
    "no prompt file": ([MODEL, "--prompt-file", "/missing/file"], "/missing/file"),
    "stdin twice": ([MODEL, "--prompt", "-", "--prompt", "-"], "read once"),
    "cp": ([MODEL, "--prompt", "a", "--cp", "0"], "--cp must be positive"),
    "tp": ([MODEL, "--prompt", "a", "--tp", "-1"], "--tp must be positive"),
    "max_new_tokens": ([MODEL, "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
    "temperature": ([MODEL, "--prompt", "a", "--temperature", "-1"], "--temperature"),
    "top_p": ([MODEL, "--prompt", "a", "--temperature", "1", "--top-p", "0"], "--top-p"),
    "top_k": ([MODEL, "--prompt", "a", "--temperature", "1", "--top-k", "0"], "--top-k"),
    "greedy top_p": ([MODEL, "--prompt", "a", "--top-p", "0.5"], "pass --temperature"),
    "timeout": ([MODEL, "--prompt", "a", "--timeout", "0"], "--timeout must be positive"),
    "dtype": ([MODEL, "--prompt", "a", "--dtype", "float16"], "auto, bfloat16, float32"),
    "no template": ([MODEL, "--prompt", "a", "--chat"], "no chat template"),
    "system": ([MODEL, "--prompt", "a", "--system", "b"], "pass --chat"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("cp", [1, 2])
def test_mistakes_are_one_line_and_exit_code_2(run, monkeypatch, mistake, cp):
    """With cp=2 the same, and where no rank is needed to see it, before any is started."""
    arguments, message = MISTAKES[mistake]
    if cp == 2:
        if mistake in ("cp", "tp", "greedy top_p", "no template"):
            return  # sizes that would be overwritten, and what needs the checkpoint
        arguments = [*arguments, "--cp", "2"]
        monkeypatch.setattr(launch, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    result = run("generate", *arguments)
    assert result.code == 2
    assert result.stdout == ""
    assert result.errors == [line for line in result.stderr.splitlines() if line]
    (line,) = result.errors
    assert line.startswith("error: ") and message in line


def test_settings_of_the_communication_reach_the_model(run, monkeypatch):
    seen = []

    def from_pretrained(*_, parallel_context, **__):
        seen.append(parallel_context.comm)
        raise InputError("seen")

    monkeypatch.setattr(CPQwen3MoeForCausalLM, "from_pretrained", from_pretrained)
    options = ["--int8", "auto", "--int8-kv", "--group-size", "64", "--min-bytes", "0"]
    with pytest.warns(UserWarning, match="kv_gather"):
        run("generate", MODEL, "--prompt", SHORT, *options, "--skip-layers", "0,3")
    run("report-comm", MODEL, "--prompt", SHORT, "--int8", "auto", "--tp", "1")
    assert seen == [
        CommConfig(
            all_reduce="auto", kv_gather="int8", group_size=64, min_bytes=0, skip_layers=[0, 3]
        ),
        CommConfig(all_reduce="auto"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--moe", "dp"], "--moe must be tp or ep, got 'dp'"),
        (["--exchange", "ring"], "CommConfig(exchange='ring'): it must be one of auto, all_gather"),
        (["--int8", "half"], "--int8 must be one of exact, auto, one_shot, two_step, got 'half'"),
        (["--group-size", "0"], "group_size must be a positive integer, got 0"),
        (["--min-bytes", "-1"], "min_bytes must be an integer of at least 0, got -1"),
        (["--skip-layers", "first"], "--skip-layers must be layer numbers such as 0,47"),
        (["--tp", "1"], "there is nothing to report: pass --int8 or --int8-kv"),
        (["--plot", "report.txt"], "--plot must end in .svg, .png, .pdf, got 'report.txt'"),
        (["--plot", "/no/such/folder/x.svg"], "there is no such folder"),
    ],
)
def test_mistakes_in_a_report(run, monkeypatch, options, message):
    monkeypatch.setattr(launch, "start_ranks", lambda *_: pytest.fail("ranks were started"))
    result = run("report-comm", MODEL, "--prompt", SHORT, *options)
    assert (result.code, result.stdout) == (2, "")
    (line,) = result.errors
    assert line.startswith("error: ") and message in line


def test_a_folder_without_weights_or_tokenizer(run, tmp_path):
    for name in ("model.safetensors.index.json", "tokenizer.json"):
        folder = copy_of_checkpoint(tmp_path / name)
        (folder / name).unlink()
        result = run("generate", str(folder), "--prompt", "a")
        assert result.code == 2
        assert len(result.errors) == 1 and str(folder) in result.errors[0]


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("QWEN3CP_LOG_LEVEL", "debug")
    result = run("generate", MODEL, "--prompt", "")
    assert result.code == 2
    assert "Traceback" in result.stderr and "error: prompt 0 is empty" in result.stderr


def test_log_level(run, monkeypatch):
    monkeypatch.setenv("QWEN3CP_LOG_LEVEL", "WARNING")
    assert run("generate", MODEL, "--prompt", SHORT, *GREEDY).stderr == ""
    monkeypatch.setenv("QWEN3CP_LOG_LEVEL", "LOUD")
    assert "LOUD is no log level" in run("generate", MODEL, "--prompt", SHORT, *GREEDY).stderr


def test_other_errors_have_a_traceback_and_exit_code_1(run, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(CPQwen3MoeForCausalLM, "from_pretrained", fail)
    result = run("generate", MODEL, "--prompt", "a")
    assert result.code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: RuntimeError: the disk is on fire"


def test_an_interrupted_rank_says_nothing(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(CPQwen3MoeForCausalLM, "from_pretrained", interrupt)
    result = run("generate", MODEL, "--prompt", "a")
    assert (result.code, result.stdout, result.stderr) == (130, "", "")


def test_exit_codes():
    assert exit_code_of(KVCacheFullError("full")) == 1
    assert exit_code_of(CommunicationError("lost")) == 1
    assert exit_code_of(ValueError("not ours")) == 1


# ---------------------------------------------------------------------------------- under torchrun

# Runs commands on a rank, one after another, in one world. The first of them finds none started.
DRIVER = """
import contextlib, io, json, os, sys
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from qwen3cp import cli

commands, output = json.load(open(sys.argv[1])), sys.argv[2]
rank = int(os.environ["RANK"])
results = {}
for name, by_rank in commands.items():
    sys.argv = ["qwen3cp", *by_rank[rank]]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            results[name] = [end.code or 0, out.getvalue(), err.getvalue()]
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dist.barrier()
    if rank == 0:  # the next command has an error of its own to print
        next(iter(rendezvous("env://")))[0].delete_key("qwen3cp/errors")
    dist.barrier()
json.dump(results, open(f"{output}.{rank}", "w"))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    """Several commands, one after another, on two ranks that torchrun has started."""
    folder = tmp_path_factory.mktemp("torchrun")
    broken = copy_of_checkpoint(folder / "broken")
    (broken / "model-00003-of-00006.safetensors").unlink()
    (folder / "empty.txt").write_text("\n")
    both = ["--prompt", SHORT, "--prompt", LONGER]
    cases = {
        "world size": ["generate", MODEL, "--cp", "4", "--prompt", SHORT],
        "text": ["generate", MODEL, "--cp", "2", *both, *GREEDY],
        "json": ["generate", MODEL, "--cp", "2", *both, *GREEDY, "--json"],
        "tensor parallel": ["generate", MODEL, "--tp", "2", *both, *GREEDY, "--json"],
        "samples": ["generate", MODEL, "--cp", "2", "--prompt", "Question:", *SAMPLED, "--json"],
        "empty file": ["generate", MODEL, "--cp", "2", "--prompt-file", f"{folder}/empty.txt"],
    }
    commands = {name: [arguments] * 2 for name, arguments in cases.items()}
    on_rank_1 = ["generate", str(broken), "--cp", "2", "--prompt", SHORT]
    commands["rank 1"] = [["generate", MODEL, *on_rank_1[2:]], on_rank_1]
    (folder / "commands.json").write_text(json.dumps(commands))
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    done = process(
        *(str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2"),
        *(str(driver), str(folder / "commands.json"), str(folder / "results")),
    )
    assert done.code == 0, done.stderr
    ranks = [json.loads(Path(f"{folder}/results.{rank}").read_text()) for rank in range(2)]
    return {name: [Result(*rank[name]) for rank in ranks] for name in commands}


def test_only_rank_0_speaks(under_torchrun, run):
    rank_0, rank_1 = under_torchrun["text"]
    alone = run("generate", MODEL, "--prompt", SHORT, "--prompt", LONGER, *GREEDY)
    assert (rank_0.code, rank_1.code) == (0, 0)
    assert rank_0.stdout == alone.stdout
    assert "cp=2 tp=1" in rank_0.stderr
    assert (rank_1.stdout, rank_1.stderr) == ("", "")


@pytest.mark.parametrize("case", ["json", "tensor parallel"])
def test_ranks_give_the_tokens_of_one(under_torchrun, run, case):
    rank_0, rank_1 = under_torchrun[case]
    document = json.loads(rank_0.stdout)
    assert rank_1.stdout == ""
    assert document["topology"] == ({"cp": 2, "tp": 1} if case == "json" else {"cp": 1, "tp": 2})
    alone = run("generate", MODEL, "--prompt", SHORT, "--prompt", LONGER, *GREEDY, "--json")
    keys = ("prompt", "text", "token_ids", "num_tokens", "finish_reason")
    assert [[one[key] for key in keys] for one in document["results"]] == [
        [one[key] for key in keys] for one in json.loads(alone.stdout)["results"]
    ]


def test_ranks_sample_what_one_samples(under_torchrun, run):
    alone = run("generate", MODEL, "--prompt", "Question:", *SAMPLED, "--json")
    ranks = under_torchrun["samples"][0]
    texts = [json.loads(r.stdout)["results"][0]["text"] for r in (ranks, alone)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "case, message",
    [
        ("world size", "cp_size=4 x tp_size=1 = 4 ranks, but the world has 2"),
        ("empty file", "prompt 0 is empty"),
        ("rank 1", "lacks files of its index: model-00003-of-00006.safetensors"),
    ],
)
def test_an_error_of_the_ranks_is_printed_once(under_torchrun, case, message):
    results = under_torchrun[case]
    assert [r.code for r in results] == [2, 2]
    assert [r.stdout for r in results] == ["", ""]
    (line,) = [line for r in results for line in r.errors]
    assert line.startswith("error: ") and message in line


# ---------------------------------------------------------------------------- ranks of its own


def test_own_ranks(run):
    """Prompts reach the ranks as they were given: from stdin, and with what a launcher expands."""
    odd = "a $$ ${local_rank} $HOME"
    ranks = process(
        *(str(BIN / "qwen3cp"), "generate", MODEL, "--cp", "2", *GREEDY, "--json"),
        *("--prompt", "-", "--prompt", odd),
        stdin=SHORT + "\n",
    )
    assert ranks.code == 0, ranks.stderr
    alone = run("generate", MODEL, "--prompt", SHORT, "--prompt", odd, *GREEDY, "--json")
    one, other = (json.loads(r.stdout)["results"] for r in (ranks, alone))
    assert [a["prompt"] for a in one] == [SHORT, odd]
    assert [a["token_ids"] for a in one] == [a["token_ids"] for a in other]
    assert len(ranks.stderr.splitlines()) == 2  # loading, and timing


def test_experts_on_own_ranks(tmp_path):
    """--stats, a plot and a placement of one run; the placement in another, with the same text."""
    placement, plot = tmp_path / "placement.json", tmp_path / "routing.png"
    command = [str(BIN / "qwen3cp"), "generate", MODEL, "--cp", "2", "--moe", "ep", *GREEDY]
    first = process(
        *command,
        *("--prompt", SHORT, "--stats", "--save-placement", str(placement)),
        *("--stats-plot", str(plot), "--exchange", "all_to_all"),
    )
    assert first.code == 0, first.stderr
    assert "moe=ep" in first.stderr and "busiest rank / mean" in first.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    orders = json.loads(placement.read_text())["layers"]
    assert len(orders) == 4 and all(sorted(order) == list(range(16)) for order in orders)
    second = process(*command, "--prompt", SHORT, "--expert-placement", str(placement))
    assert second.code == 0, second.stderr
    assert second.stdout == first.stdout and "#### 72" in first.stdout
    assert "busiest" not in second.stderr


def test_report_on_own_ranks(tmp_path):
    plot = tmp_path / "report.svg"
    command = [str(BIN / "qwen3cp"), "report-comm", MODEL, "--cp", "2", "--prompt", SHORT]
    done = process(*command, "--int8-kv", "--group-size", "128", "--json", "--plot", str(plot))
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["topology"] == {"cp": 2, "tp": 2}
    assert (report["comm"]["group_size"], report["comm"]["kv_gather"]) == (128, "int8")
    assert {m["message"]: m["form"] for m in report["messages"]} == {
        "attention": "int8_two_step",
        "mlp": "int8_two_step",
        "kv_gather": "int8",
    }
    assert plot.read_text().rstrip().endswith("</svg>")


@pytest.fixture
def launcher(monkeypatch):
    """Lets this process start ranks, which inherit its environment."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT")  # set by the launcher: restore
    monkeypatch.setattr(logging.getLogger("qwen3cp"), "handlers", [])


def test_own_ranks_that_fail(launcher, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["qwen3cp", "generate", MODEL, "--tp", "3", "--prompt", "a"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert stderr == "error: num_key_value_heads = 4 cannot be divided evenly by 3\n"


def test_a_killed_rank_is_named(launcher, tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    handler = signal.getsignal(signal.SIGINT)
    assert start_ranks(2, [str(script)]) == 1
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr() == ("", "error: rank 1 was ended by SIGKILL\n")


def test_interrupt_ends_all_ranks(launcher, tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "try:\n"
        "    with open(sys.argv[1] + os.environ['RANK'], 'w') as file:\n"
        "        file.write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    files = [tmp_path / f"pid{rank}" for rank in range(2)]

    def interrupt() -> None:
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert start_ranks(2, [str(script), str(tmp_path / "pid")]) == 128 + signal.SIGINT
    thread.join()
    assert not [file for file in files if Path(f"/proc/{file.read_text()}").exists()]
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------ help


def copy_of_checkpoint(parent: Path) -> Path:
    """A checkpoint whose files can be changed."""
    folder = parent / "checkpoint"
    shutil.copytree(CHECKPOINT, folder)
    return folder
