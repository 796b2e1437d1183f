"""The documentation: commands and code run, numbers are recomputed, names and links exist."""

import importlib
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from qwen3cp import (
    CPQwen3MoeDecoderLayer,
    ForwardPhase,
    ForwardPlan,
    PagedKVCache,
    ParallelContext,
    cli,
)
from qwen3cp.collectives import all_reduce_bytes
from qwen3cp.config import OPERATORS
from qwen3cp.eval.statistics import (
    difference_interval,
    documents_needed,
    share_interval,
    standard_error,
)
from qwen3cp.ops import RULES, SCHEMAS
from qwen3cp.parallel import AllReduceForm
from qwen3cp.planner.dry_run import dry_run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted((ROOT / "tests" / "assets").rglob("README.md"))]
CHECKPOINT = "tests/assets/tiny-qwen3-moe"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of the bash blocks, and the README's two make targets."""
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.split("\n")]
    targets = re.findall(r"^    (make \w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [*targets, *filter(None, lines)]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGINT")  # set by the launcher: restore


# ------------------------------------------------------------------------------ commands and code


def test_readme_shows_the_two_targets():
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_command(command, tmp_path, monkeypatch, capfd):
    """Runs it; or, where that takes a device or another environment, says what stands in for it."""
    words = shlex.split(command)
    if words[0] == "make":
        assert command in (ROOT / ".ci" / "run").read_text().splitlines()
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:3] == ["pip", "install", "-e"]:  # `make setup` installs in the same way
        target = re.fullmatch(r"(\.)(?:\[(.*)\])?", words[3])
        assert target is not None, command
        project, extras = target.groups()
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert project == "." and len(words) == 4
        assert not extras or set(extras.split(",")) <= set(declared["optional-dependencies"])
    elif words[:2] == ["qwen3cp", "generate"]:
        stdout = stdout_of(words, monkeypatch, capfd)
        assert stdout == " 12 + 15 = <<12+15=27>>27\n#### 27\n"
    elif words[:2] == ["qwen3cp", "report-comm"]:
        stdout = stdout_of(words, monkeypatch, capfd)
        assert stdout.count("%,") == 4 * 2  # two reductions in each of four layers
        assert "the likeliest token agrees in" in stdout
    elif words[:2] in (["qwen3cp", "check"], ["qwen3cp", "shard"], ["qwen3cp", "make-random"]):
        if words[1] != "check":
            assert words[3].startswith("/tmp/")
            words[3] = str(tmp_path / "out")
        stdout = stdout_of(words, monkeypatch, capfd)
        assert stdout.startswith(f"{words[2]} is whole: " if words[1] == "check" else words[3])
    elif words[:2] == ["qwen3cp", "plan"]:
        page = None
        if "--html" in words:
            place = words.index("--html") + 1
            assert words[place].startswith("/tmp/")
            page = Path(words[place]).name
            words[place] = str(tmp_path / page)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        stdout = stdout_of(words, monkeypatch, capfd)
        assert "predicted" in stdout
        assert page is None or (tmp_path / page).read_text().startswith("<!doctype html>")
    elif words[:2] == ["qwen3cp", "bench"]:
        stdout = stdout_of(words, monkeypatch, capfd)
        shown = "transformers bfloat16" if "--against" in words else "cp=2 tp=1 bfloat16"
        assert f"{shown} " in stdout
    elif words[:2] == ["qwen3cp", "doctor"]:
        assert "a small model: prefill and decode run on the CPU" in stdout_of(
            words, monkeypatch, capfd
        )
    elif words[:2] == ["qwen3cp", "eval"]:  # which the comparison of its output runs
        assert any(c.startswith("qwen3cp compare") and words[-1] in c for c in commands())
    elif words[:2] == ["qwen3cp", "compare"]:
        for i, folder in ((2, "a"), (3, "b")):  # the runs of the page's other commands
            (other,) = (c for c in commands() if c.endswith(f" --output_path {words[i]}"))
            words[i] = str(evaluate_two(shlex.split(other), tmp_path / folder))
        words[5] = str(tmp_path / "page.html")
        stdout = stdout_of(words, monkeypatch, capfd)
        assert "no answer turned right or wrong" in stdout and Path(words[5]).exists()
    elif words[0] == "torchrun" and "qwen3cp.eval" in words:
        torchrun_evaluates(words, tmp_path)
    elif words[0] == "torchrun":  # made for 8 NPUs: here 2 CPU ranks, and the bundled checkpoint
        assert words[1:6] == ["--nproc-per-node", "8", "-m", "qwen3cp.cli", "generate"]
        assert words[7:11] == ["--cp", "2", "--tp", "4"]
        words[2], words[6], words[10] = "2", CHECKPOINT, "1"
        words.remove("--chat")  # which the bundled checkpoint has no template for
        torchrun = str(Path(sys.executable).parent / "torchrun")
        done = subprocess.run(
            [torchrun, *words[1:], "--max-new-tokens", "4"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "cp=2 tp=1" in done.stderr
        assert done.stdout.endswith("\n")
    else:
        pytest.fail(f"this test does not know how to run {command!r}")


def stdout_of(words: list[str], monkeypatch, capfd) -> str:
    """Of a qwen3cp command, run in this process."""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    stdout, stderr = capfd.readouterr()
    assert (ended.value.code or 0) == 0, stderr
    return stdout


def evaluate_two(words: list[str], folder: Path) -> Path:
    """Runs `qwen3cp eval` on two documents; returns where the results are."""
    words = [*words]
    assert words[-2] == "--output_path" and words[words.index("--limit") + 1] == "20"
    words[words.index("--limit") + 1], words[-1] = "2", str(folder)
    run_words([sys.executable, "-m", "qwen3cp.cli", *words[1:]])
    return folder


def torchrun_evaluates(words: list[str], folder: Path) -> None:
    """Made for NPUs and their checkpoints: here two CPU ranks, the bundled one, one document in
    GSM8K's form."""
    at = words.index("-m")
    assert words[at + 1] == "qwen3cp.eval"
    given = [word for word in words[at + 2 :] if word != "--log_samples"]
    options = dict(zip(given[::2], given[1::2], strict=True))
    ranks = int(words[words.index("--nproc-per-node") + 1])
    nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    assert int(options["--cp"]) * int(options["--tp"]) == ranks * nodes
    assert options["--model"].startswith("Qwen/Qwen3-") and options["--tasks"] == "gsm8k"
    question = {"question": "A tram has 4 seats. How many are two trams'?", "answer": "#### 8"}
    for name in ("train", "test"):
        lines = (json.dumps({**question, "number": i}) + "\n" for i in range(6))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    if "--moe" in options:
        return  # the same command with more ranks
    options |= {"--model": CHECKPOINT, "--dtype": "float32", "--cp": "2", "--tp": "1"}
    options |= {"--data-dir": str(folder), "--output_path": str(folder), "--limit": "1"}
    given = [word for option in options.items() for word in option]
    torchrun = str(Path(sys.executable).parent / "torchrun")
    run_words([torchrun, "--nproc-per-node", "2", "-m", "qwen3cp.eval", "--log_samples", *given])
    assert len(list(folder.rglob("samples_gsm8k_*.jsonl"))) == 1


def run_words(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks(page, capsys):
    """All blocks of a page, one after another, as a reader would run them."""
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), names)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert printed.count("#### 27\n") == 2  # by generate() and by the loop
        cache = names["cache"]
        assert isinstance(cache, PagedKVCache) and cache.num_free_pages == cache.num_pages - 1
    if page.name == "context-parallel.md":
        assert capsys.readouterr().out == "{} 0\n"


def test_options_of_the_first_run_exist(request):
    """The one command of docs/npu.md; tests/test_npu_suite.py runs it on CPU ranks."""
    text = (ROOT / "docs" / "npu.md").read_text()
    options = set(re.findall(r" --(npu-[a-z0-9-]+)", text))
    assert options == {"npu-report", "npu-model", "npu-gsm8k"}
    for option in (*options, "npu-device"):
        request.config.getoption(f"--{option}")


# ------------------------------------------------------------------------------- files and names


def test_file_tree_of_the_readme():
    text = (ROOT / "README.md").read_text()
    shown, folders = {}, {}
    for line in text.split("## Files\n")[1].strip("\n").splitlines():
        entry = re.fullmatch(r"    ( *)(\S+(?: -> \S+)?)(?: +(.*))?", line)
        assert entry is not None, line
        indent, name, comment = entry.groups()
        depth = len(indent) // 2
        path = "".join(folders[d] for d in range(depth)) + name
        if name.endswith("/"):
            folders[depth] = name
        assert comment or "->" in name, f"{path} has no comment"
        shown[path] = comment
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    real = set()
    for file in listed:
        path = Path(file)
        if path.parts[0] == "tests":
            real.add("tests/")
        elif path.parts[0].startswith(".") or not (path.exists() or path.is_symlink()):
            continue
        elif path.parts[:2] == ("eval", "tasks") and len(path.parts) > 3:  # a file for each task
            real.add(f"{'/'.join(path.parts[:3])}/")
        elif path.is_symlink():
            real.add(f"{file} -> {path.readlink()}")
        else:
            real.add(file)
            real |= {f"{parent}/" for parent in path.parents if str(parent) != "."}
    assert sorted(shown) == sorted(real)


def test_structure_has_a_line_for_each_module():
    named = re.findall(r"^- `(.*?)`: \S.*\.$", (ROOT / "docs/structure.md").read_text(), re.M)
    real = [
        str(path.relative_to(ROOT if folder != "qwen3cp" else ROOT / "qwen3cp"))
        for folder in ("qwen3cp", "weights", "eval")
        for path in (ROOT / folder).rglob("*.py")
        if "weights" not in path.relative_to(ROOT / folder).parts[:-1]
        and "eval" not in path.relative_to(ROOT / folder).parts[:-1]
    ]
    assert sorted(named) == sorted(real)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_exist(page):
    text = page.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\((.*?)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        else:
            assert "://" not in target
            assert (page.parent / target).exists(), target


def test_environment_variables_are_documented():
    sources = [*(ROOT / "qwen3cp").rglob("*.py"), *(ROOT / "weights").rglob("*.py")]
    read = set(re.findall(r"QWEN3CP_[A-Z0-9_]+", "".join(s.read_text() for s in sources)))
    table = re.findall(r"^\| `(QWEN3CP_\w+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert set(table) == read


def test_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    readme = (ROOT / "README.md").read_text()
    for package in ("torch", "torch_npu", "transformers", "safetensors", "accelerate"):
        assert f"{package} {pinned[package]}" in readme


# ------------------------------------------------------------------------------- numbers and calls


def plan(new: list[int], cached: list[int], rank: int, num_pages: int = 50) -> ForwardPlan:
    pages = [-(-(n + c) // 128) for n, c in zip(new, cached, strict=True)]
    tables = [list(range(1 + sum(pages[:i]), 1 + sum(pages[: i + 1]))) for i in range(len(new))]
    return ForwardPlan.build(
        new,
        cached_lengths=cached,
        block_tables=tables,
        num_pages=num_pages,
        phase=ForwardPhase.PREFILL,
        cp_rank=rank,
        cp_size=2,
    )


def runs(tokens: torch.Tensor) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    found: list[list[int]] = []
    for token in tokens.tolist():
        if found and found[-1][1] == token - 1:
            found[-1][1] = token
        else:
            found.append([token, token])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def test_worked_examples():
    text = (ROOT / "docs" / "context-parallel.md").read_text()
    examples = [([13], [0], "**13 tokens on 2 ranks.**"), ([13, 9], [0, 5], "**13 and 9 tokens")]
    for new, cached, title in examples:
        table = text.split(title)[1]
        for rank in range(2):
            (call,) = (p := plan(new, cached, rank)).calls
            lengths = torch.tensor(call.query_ends).diff(prepend=torch.tensor([0])).tolist()
            cells = [str(rank), runs(p.local_indices), ", ".join(map(str, lengths))]
            row = " | ".join([*cells, ", ".join(map(str, call.kv_lengths))])
            assert f"| {row} |\n" in table
    plans = [plan([13, 9], [0, 5], rank) for rank in range(2)]
    assert [p.num_rows for p in plans] == [11, 11]
    assert " | ".join(runs(p.local_indices) for p in plans) in text
    assert "for rank 0 above 4, 8, 11" in text and plans[0].calls[0].query_ends == [4, 8, 11]
    assert "plain lengths, 4, 12, 13" in text and plans[0].calls[0].kv_lengths == [4, 12, 13]
    alone = plan([13], [0], 1)
    assert (alone.num_rows, alone.padded_rows) == (6, 7)
    assert [plan([1], [0], rank).num_rows for rank in range(2)] == [1, 0]


def test_page_sum_example():
    """A cache that just holds 1,000 tokens: 9 pages with page 0."""
    by_rank = [plan([1000], [0], rank, num_pages=9) for rank in range(2)]
    counted = [[-(-n // 128) for c in p.calls for n in c.kv_lengths] for p in by_rank]
    assert counted == [[2, 8], [6]]
    assert [p.num_attention_calls for p in by_rank] == [2, 1]


def test_bytes_of_the_gather():
    text = (ROOT / "docs" / "context-parallel.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for cp, tp, mebibytes in (map(int, row) for row in rows):
        width = 4 // tp * 128
        assert (cp - 1) * (131072 // cp) * 2 * width * 2 == mebibytes << 20
    assert 131072 * (4 * 128) * 2 * 2 == 256 << 20  # K and V of all ranks, copied


def test_bytes_of_int8_sums():
    text = (ROOT / "docs" / "int8-communication.md").read_text()
    names: dict[str, AllReduceForm] = {
        "exact, bfloat16 ring": "exact",
        "one-shot": "int8_one_shot",
        "two-step": "int8_two_step",
    }
    groups = 24 * 100  # which 2, 3, 4 and 8 ranks divide
    for name, form in names.items():
        (cells,) = re.findall(rf"^\| {name} \|.*?\|(.*)\|$", text, re.MULTILINE)
        for cell, num_ranks in zip(cells.split("|"), (2, 3, 4, 8), strict=True):
            sent = all_reduce_bytes(form, groups, 128, 2, num_ranks) / (groups * 128)
            assert float(cell) == pytest.approx(sent, abs=0.005)
    # two reductions of 131072 / 2 rows of 2048 over 4 ranks; the gather of one KV head
    assert 2 * all_reduce_bytes("exact", 131072 // 2, 2048, 2, 4) == 768 << 20
    assert 131072 // 2 * 2 * 128 * 2 == 32 << 20


def test_expert_bytes_of_a_rank():
    text = (ROOT / "docs" / "expert-parallel.md").read_text()
    for name, layers, hidden, width in (("30B", 48, 2048, 768), ("235B", 94, 4096, 1536)):
        ((tp, ep),) = re.findall(rf"^\| Qwen3-{name}-.*? \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
        experts = layers * 128 * 3 * hidden * width * 2 / 1e9
        assert float(tp) == pytest.approx(experts / 2, abs=0.06)
        assert float(ep) == pytest.approx(experts / 4, abs=0.06)


def test_times_of_int8_sums():
    """Of 65,536 rows of 4,096 values, by the formulas of the page."""
    text = (ROOT / "docs" / "int8-communication.md").read_text()
    values, memory = 65536 * 4096, 0.6 * 1.6 * 2**40
    rows = re.findall(r"^\| .*?(\d+) ranks.*?\| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 6
    for num_ranks, link, cells in ((int(n), float(link), c) for n, link, c in rows):
        passes: dict[AllReduceForm, float] = {
            "exact": 0,
            "int8_two_step": 7 + 5 / num_ranks,
            "int8_one_shot": 5 + 3 * num_ranks,
        }
        for cell, (form, per_value) in zip(cells.split("|"), passes.items(), strict=True):
            sent = all_reduce_bytes(form, 65536, 4096, 2, num_ranks)
            seconds = sent / (0.7 * link * 1e9) + per_value * values / memory
            assert float(cell) == pytest.approx(seconds * 1e3, rel=0.02)
    (limits,) = re.findall(r"that is (\d+), (\d+) and (\d+) GB/s", text)
    for num_ranks, limit in zip((2, 4, 8), limits, strict=True):
        pays_below = (num_ranks - 1) / num_ranks * memory / (3.5 + 2.5 / num_ranks)
        assert pays_below / 1e9 == pytest.approx(float(limit), abs=0.6)
    (limits,) = re.findall(r"pays below (\d+), (\d+) and (\d+) GB/s", text)
    for num_ranks, limit in zip((2, 4, 8), limits, strict=True):
        pays_below = (num_ranks - 1) / num_ranks * memory / (23.5 + 6.5 / num_ranks)
        assert pays_below / 1e9 == pytest.approx(float(limit), abs=0.6)


def test_accuracy_of_int8_communication_is_what_was_measured(monkeypatch):
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("int8_accuracy")
    rows = json.loads((folder / "int8_accuracy.json").read_text())
    assert module.table(rows) in (ROOT / "docs" / "int8-communication.md").read_text()
    assert {row["problems"] for row in rows} == {400}
    named = [(row["cp"], row["tp"], row["comm"]) for row in rows]
    assert named == [
        (*topology, name)
        for topology, settings in module.SETTINGS.items()
        for name in ("exact", *settings)
    ]


def test_performance_is_what_was_measured(monkeypatch):
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("performance")
    results = json.loads((folder / "performance.json").read_text())
    assert set(results) == set(module.STEPS)
    found = module.tables(results)
    places = set()
    for page in module.PAGES:
        text = page.read_text()
        assert text == module.filled(text, found)
        places |= set(re.findall(r"<!-- table (\w+) -->", text))
    assert places == set(found)


def test_host_overhead_is_what_was_measured(monkeypatch):
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("host_overhead")
    results = json.loads((folder / "host_overhead.json").read_text())
    assert module.table(results) in (ROOT / "docs" / "compile.md").read_text()


def test_accuracy_of_word_problems_is_what_was_measured(monkeypatch):
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("word_problems")
    rows = json.loads((folder / "word_problems.json").read_text())
    assert module.table(rows) in (ROOT / "docs" / "evaluation.md").read_text()
    assert [row["run"] for row in rows] == list(module.RUNS)
    for row in rows:
        assert row["problems"] == sum(row["of_kind"].values()) == rows[0]["problems"]
        assert sum(row["right_of_kind"].values()) == row["right"]
        assert row["right"] == rows[0]["right"] + row["gained"] - row["lost"]


def test_what_gsm8k_can_tell():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    errors = re.findall(r"^\| (\d+) % \| (\d+) \| ([\d.]+) \| ([\d.]+) to ([\d.]+) \|$", text, re.M)
    assert len(errors) == 3
    for share, count, error, low, high in errors:
        right, n = round(int(share) * int(count) / 100), int(count)
        assert float(error) == pytest.approx(100 * standard_error(right, n), abs=0.005)
        ends = [100 * end for end in share_interval(right, n)]
        assert [float(low), float(high)] == pytest.approx(ends, abs=0.05)
    alone = re.findall(r"^\| ([\d.]+) \| (\d+) \|$", text, re.M)
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    for points, count in alone:
        assert int(count) == math.ceil(2 * 0.92 * 0.08 * (100 * z / float(points)) ** 2)
    paired = re.findall(r"^\| (\d+) % \| (\d*) ?\| (\d*) ?\| (\d*) ?\|$", text, re.M)
    assert len(alone) == 3 and len(paired) == 5
    for share, *cells in paired:
        for points, cell in zip((0.5, 1, 3), cells, strict=True):
            if points <= int(share):
                assert int(cell) == documents_needed(points / 100, int(share) / 100)
            else:
                assert cell == ""
    assert "no more than 15 % of the answers turn" in text and "no more than 1.6 % do" in text
    assert documents_needed(0.03, 0.15) <= 1319 < documents_needed(0.03, 0.16)
    assert documents_needed(0.01, 0.016) <= 1319 < documents_needed(0.01, 0.018)
    for gained, lost, count in ((0, 0, 100), (0, 0, 1319), (6, 7, 1319)):
        low, high = (100 * end for end in difference_interval(gained, lost, count))
        assert f"{low:+.2f} to {high:+.2f}" in text


def test_planning_is_what_was_predicted(monkeypatch):
    """The tables are those of the results; and some cells are predicted again."""
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("planning")
    results = json.loads((folder / "planning.json").read_text())
    text = (ROOT / "docs" / "planning.md").read_text()
    for name, table in module.tables(results).items():
        assert f"\n\n{table}\n\n" in text, name
    for name, sentence in module.sentences(results).items():
        assert sentence in text, name
    for name, devices, prompt in (("30B", 8, "128k"), ("30B", 4, "1M"), ("235B", 16, "128k")):
        cells = [
            row
            for row in results["cells"]
            if (row["model"], row["prompt"]) == (name, module.PROMPTS[prompt])
            and row["cp_size"] * row["tp_size"] == devices
        ]
        for row in (min(cells, key=lambda row: row.get("ttft", 1e9)), cells[0]):
            sizes = {n: row[n] for n in ("cp_size", "tp_size", "moe")}
            again = module.cell(name, module.Layout(**sizes), row["prompt"], {})
            assert same(again, row)
    assert same(module.int8_gain(), results["int8_gain"])
    assert results["efficiencies"] == module.Efficiencies().to_dict()


def same(one: object, other: object) -> bool:
    """Whether two documents hold the same, numbers within rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-6)
    return one == other


def test_numbers_of_the_dry_run(monkeypatch):
    """The page shows what was measured; the plans are made again."""
    folder = ROOT / "docs" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("dry_run")
    results = json.loads((folder / "dry_run.json").read_text())
    text = (ROOT / "docs" / "dry-run.md").read_text()
    assert module.measured_table(results["measured"]) in text
    assert module.plans_table(results["plans"]) in text
    chosen = [0, 6, -2]
    assert [module.plan(*module.PLANS[i]) for i in chosen] == [results["plans"][i] for i in chosen]
    assert f"{results['plans'][0]['usable_bytes'] / 2**30:.1f} are counted as usable" in text
    config = module.random_config()
    parameters = dry_run(config, prompt=1, decode=False).num_parameters
    size = f"{parameters / 1e6:.0f} M parameters"
    assert size in text and size in str(module.__doc__)


def test_what_the_check_exchanges():
    assert len(plan([13], [0], 0).digest) + 1 == 17  # and the status


def test_calls_of_a_layer_are_those_of_the_model():
    text = (ROOT / "docs" / "npu.md").read_text()
    section = text.split("## The calls of one layer")[1].split("\n## ")[0]
    numbered = re.findall(r"^\d+\. (.*)$", section, re.MULTILINE)
    named = [name for line in numbered for name in re.findall(r"`(npu_\w+)`", line)]
    assert set(named) == set(OPERATORS)
    assert set(OPERATORS) <= set(SCHEMAS)


def test_how_operators_are_verified():
    """A row for each operator of the model, with how many rules it has and where it is tested."""
    row = r"^\| `(npu_\w+)` \| torch_npu \| (\d+) \| `(.*?)` \| \S.* \|$"
    rows = re.findall(row, (ROOT / "docs" / "npu.md").read_text(), re.MULTILINE)
    assert sorted(op for op, *_ in rows) == sorted(OPERATORS)
    for op, count, tests in rows:
        assert int(count) == sum(rule.op == op for rule in RULES.values()), op
        assert f"npu.{op}" in (ROOT / tests).read_text()


def test_the_page_of_rules_is_what_its_script_writes(tmp_path, monkeypatch):
    script = ROOT / "docs" / "npu_rules.py"
    written = tmp_path / "npu-rules.md"
    monkeypatch.setattr(sys, "argv", [str(script), str(written)])
    runpy.run_path(str(script), run_name="__main__")
    assert written.read_text() == (ROOT / "docs" / "npu-rules.md").read_text()


def test_calls_of_a_layer_come_in_that_order(monkeypatch):
    """A layer is run with every operator recorded."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "npu":
                called.append(func.name().removeprefix("npu::"))
            return func(*args, **(kwargs or {}))

    config = Qwen3MoeConfig.from_pretrained(CHECKPOINT)
    ctx = ParallelContext.single()
    layer = CPQwen3MoeDecoderLayer(config, 0, parallel_context=ctx)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cache = PagedKVCache(num_layers=1, num_pages=2, kv_width=256, dtype=torch.float32)
    p = cache.plan([cache.new_sequence()], [5], ForwardPhase.PREFILL, ctx)
    cos, sin = Qwen3MoeRotaryEmbedding(config)(torch.zeros(1), p.positions[None])
    rows = torch.randn(5, config.hidden_size)
    with ctx.forward(ForwardPhase.PREFILL), Record():
        layer(
            rows,
            rows,
            plan=p,
            kv=cache.layer(0),
            position_embeddings=(cos.unsqueeze(2), sin.unsqueeze(2)),
        )
    assert called == [
        "npu_add_rms_norm",
        *("npu_rms_norm", "npu_rotary_mul"),  # keys
        *("npu_rms_norm", "npu_rotary_mul"),  # queries
        "npu_scatter_nd_update_",
        "npu_fused_infer_attention_score",
        "npu_add_rms_norm",
        "npu_moe_gating_top_k_softmax",
        "npu_moe_init_routing_v2",
        *("npu_grouped_matmul", "npu_swiglu", "npu_grouped_matmul"),
        "npu_moe_token_unpermute",
    ]


@pytest.mark.parametrize("name", ["zigzag", "int8_all_reduce", "planning_curves", "planning_split"])
def test_the_figure_is_what_its_script_draws(tmp_path, monkeypatch, name):
    script = ROOT / "docs" / "figures" / f"{name}.py"
    drawn = tmp_path / f"{name}.svg"
    monkeypatch.setattr(sys, "argv", [str(script), str(drawn)])
    runpy.run_path(str(script), run_name="__main__")
    assert drawn.read_text() == script.with_suffix(".svg").read_text()


# ------------------------------------------------------------------------------------- language


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_plain(page):
    text = page.read_text()
    assert "—" not in text and "TODO" not in text
    assert not re.search(r"\b(blazing|seamless|powerful|cutting-edge|leverage)\b", text, re.I)
