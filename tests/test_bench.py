"""`qwen3cp bench`: what it measures is right, whatever the times are."""

from __future__ import annotations

import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.stats import hmean
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig

from qwen3cp import CommConfig, ForwardPhase, ParallelContext, cli, collectives
from qwen3cp.benchmark import engines, meters
from qwen3cp.benchmark.engines import OurEngine, TransformersEngine
from qwen3cp.benchmark.meters import PARTS, MemoryMeter, PartTimer
from qwen3cp.benchmark.report import Episode, Measured, Report, pairs
from qwen3cp.benchmark.runner import num_steps, run_benchmark
from qwen3cp.benchmark.ways import Settings, Way, Workload, ways_of
from qwen3cp.errors import ParallelConfigError
from tests.conftest import CHECKPOINT
from tests.models import load, random_ids

MODEL = str(CHECKPOINT)
LAYERS, KV_WIDTH, HIDDEN = 4, 256, 256
ROOT = Path(__file__).parent.parent
SMALL = Workload(batch_size=2, prompt_tokens=12, new_tokens=3)


def settings_of(*ways: Way, **changes: Any) -> Settings:
    values: dict[str, Any] = dict(
        model=MODEL,
        ways=ways,
        workloads=(SMALL,),
        repeats=2,
        threads=1,
        seed=0,
        parts=False,
        timeout=None,
    )
    return Settings(**{**values, **changes})


@pytest.fixture
def bench(capsys, monkeypatch):
    """bench(*arguments) -> (exit code, stdout, stderr), in this process."""
    monkeypatch.setattr(logging.getLogger("qwen3cp"), "handlers", [])

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qwen3cp", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


# ------------------------------------------------------------------------------- the whole command


SPREAD = {"median", "low", "high", "samples"}
RESULT = {
    "way",
    "settings",
    "batch_size",
    "prompt_tokens",
    "new_tokens",
    "seconds_to_first_token",
    "prefill_tokens_per_second",
    "seconds_per_token",
    "decode_tokens_per_second",
    "ranks",
    "shares",
    "operators",
    "experts",
    "logits_difference",
    "logits_against",
}


def check_document(document: dict[str, Any], repeats: int) -> None:
    """What holds of every document: its names, and what its numbers have to do with each other."""
    assert set(document) == {"machine", "model", "repeats", "seed", "results", "ratios"}
    assert document["machine"]["torch"] == torch.__version__
    assert document["repeats"] == repeats
    rates: dict[Any, list[float]] = {}
    for result in document["results"]:
        assert set(result) == RESULT
        key = (result["way"], result["batch_size"], result["prompt_tokens"])
        copies = result["settings"]["copies"]
        tokens = {"prefill": result["prompt_tokens"], "decode": 1}
        for measure, name in (
            ("prefill", "seconds_to_first_token"),
            ("decode", "seconds_per_token"),
        ):
            seconds, rate = result[name], result[f"{measure}_tokens_per_second"]
            if result["new_tokens"] == 0 and measure == "decode":
                assert seconds is None and rate is None
                continue
            assert set(seconds) == set(rate) == SPREAD
            assert len(seconds["samples"]) == repeats and min(seconds["samples"]) > 0
            assert seconds["median"] == statistics.median(seconds["samples"])
            assert (seconds["low"], seconds["high"]) == (
                min(seconds["samples"]),
                max(seconds["samples"]),
            )
            of_all = copies * result["batch_size"] * tokens[measure]
            assert rate["samples"] == pytest.approx([of_all / s for s in seconds["samples"]])
            rates[(measure, *key)] = rate["samples"]
        assert len(result["ranks"]) == result["settings"]["cp"] * result["settings"]["tp"] * copies
        for rank in result["ranks"]:
            assert rank["parameter_bytes"] > 0 and rank["cache_bytes"] > 0
            assert rank["prefill_grown_bytes"] >= 0
            assert rank["peak_resident_bytes"] > rank["parameter_bytes"]
            assert rank["peak_device_bytes"] is None
        for shares in (result["shares"] or {}).values():
            assert tuple(shares) == PARTS
            assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    for ratio in document["ratios"]:
        workload = (ratio["batch_size"], ratio["prompt_tokens"])
        mine = rates[(ratio["measure"], ratio["way"], *workload)]
        theirs = rates[(ratio["measure"], ratio["against"], *workload)]
        expected = [a / b for a, b in zip(mine, theirs, strict=True)]
        assert ratio["ratio"]["samples"] == pytest.approx(expected)
        assert ratio["ratio"]["median"] == pytest.approx(statistics.median(expected))


def test_against_transformers(bench, tmp_path):
    output, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    lists = ["--prompt-tokens=8,20", "--batch-size=2", "--dtype=float32,bfloat16"]
    code, stdout, stderr = bench(
        MODEL, *lists, "--new-tokens=2", "--repeats=2", "--against=transformers", "--json",
        f"--output={output}", f"--plot={plot}",
    )  # fmt: skip
    assert code == 0, stderr
    document = json.loads(stdout)
    assert json.loads(output.read_text()) == document
    assert plot.read_text().startswith("<?xml")
    check_document(document, 2)
    assert [(r["way"], r["batch_size"], r["prompt_tokens"]) for r in document["results"]] == [
        (way, 2, length)
        for length in (8, 20)
        for way in (
            "cp=1 tp=1 float32",
            "transformers float32",
            "cp=1 tp=1 bfloat16",
            "transformers bfloat16",
        )
    ]
    for result in document["results"]:
        ours = result["way"].startswith("cp")
        dtype = result["settings"]["dtype"]
        assert set(result["shares"]) == set(result["operators"]) == {"prefill", "decode"}
        assert (result["experts"] is None) is ours
        if ours:  # the same computation, on the same prompts
            assert result["logits_against"] == f"transformers {dtype}"
            assert 0 < result["logits_difference"] < (1e-4 if dtype == "float32" else 0.1)
        else:
            chosen = result["experts"]["chosen"]
            for phase in ("prefill", "decode"):
                seconds = result["experts"]["seconds"][phase]
                assert set(seconds) == {"eager", "grouped_mm", "batched_mm"}
                assert chosen[phase] == min(seconds, key=seconds.__getitem__)
    parameters = {r["way"]: r["ranks"][0]["parameter_bytes"] for r in document["results"]}
    for dtype in ("float32", "bfloat16"):  # the embedding is tied to the head in neither or both
        assert parameters[f"cp=1 tp=1 {dtype}"] == parameters[f"transformers {dtype}"]
    against = {(r["way"], r["against"]) for r in document["ratios"]}
    assert against == {
        ("cp=1 tp=1 float32", "transformers float32"),
        ("cp=1 tp=1 bfloat16", "transformers bfloat16"),
        ("cp=1 tp=1 bfloat16", "cp=1 tp=1 float32"),
    }


def test_table(bench):
    code, stdout, stderr = bench(
        MODEL, "--prompt-tokens=8", "--batch-size=1,2", "--new-tokens=0", "--repeats=1",
        "--float32-scores", "--chunk-tokens=0,3", "--dtype=bfloat16",
    )  # fmt: skip
    assert code == 0, stderr
    assert "cp=1 tp=1 bfloat16, chunks of 3, float32 scores" in stdout
    assert "share of the time" in stdout and "tokens/s against each other" in stdout
    assert "decode" not in stdout  # there was none


def test_two_ranks(tmp_path):
    """Started here: CP, copies of one rank, and nothing left of any of them."""
    output = tmp_path / "bench.json"
    marker = f"QWEN3CP_TEST_{os.getpid()}"
    arguments = ["--cp=1,2", "--copies=2", "--prompt-tokens=9", "--new-tokens=2", "--repeats=2"]
    done = subprocess.run(
        [sys.executable, "-m", "qwen3cp.cli", "bench", MODEL, *arguments, f"--output={output}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, marker: "1"},
    )
    assert done.returncode == 0, done.stderr
    assert processes_with(marker) == []
    document = json.loads(output.read_text())
    check_document(document, 2)
    one, copies, two = document["results"]
    names = ["cp=1 tp=1 bfloat16", "cp=1 tp=1 bfloat16, 2 copies", "cp=2 tp=1 bfloat16"]
    assert [r["way"] for r in (one, copies, two)] == names
    assert [len(r["ranks"]) for r in (one, copies, two)] == [1, 2, 2]
    assert {(r["way"], r["against"]) for r in document["ratios"]} == {
        (names[1], names[0]),
        (names[2], names[0]),
        (names[2], names[1]),
    }
    assert one["ranks"][0]["prefill_communication"] == {}
    for rank in two["ranks"]:
        gathered = rank["prefill_communication"]["kv_gather"]
        assert gathered == 5 * 2 * KV_WIDTH * 2 * LAYERS  # the other's 5 rows, in bfloat16
        assert "kv_gather" not in rank["decode_communication"]
        assert rank["decode_communication"]["check"] == 17
    assert "cp=2 tp=1 bfloat16" in done.stdout and "kv_gather" in done.stdout


def processes_with(marker: str) -> list[str]:
    """Those that have inherited a variable of this environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{marker}=1".encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:  # another user's, or ended
            pass
    return found


def test_under_torchrun(tmp_path):
    torchrun = str(Path(sys.executable).parent / "torchrun")
    done = subprocess.run(
        [torchrun, "--nproc-per-node", "2", "-m", "qwen3cp.cli", "bench", MODEL, "--tp=1,2"]
        + ["--prompt-tokens=8", "--new-tokens=0", "--repeats=1", "--no-parts", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    check_document(document, 1)
    assert [r["way"] for r in document["results"]] == ["cp=1 tp=1 bfloat16", "cp=1 tp=2 bfloat16"]


def in_all_ways(cp: int, tp: int) -> dict[str, Any] | None:
    """On ranks that have a group already."""
    ways = ways_of(
        dtypes=["bfloat16"],
        cp=[1, cp],
        tp=[1, tp],
        moe=["tp", "ep"],
        comm=[CommConfig(), CommConfig(all_reduce="int8_two_step", kv_gather="int8")],
        chunk_tokens=[0],
        float32_scores=[False],
        copies=1,
        transformers=False,
    )
    report = run_benchmark(settings_of(*ways, repeats=1, parts=True))
    return None if report is None else report.to_dict()


def test_every_form_of_communication(ranks):
    document, *others = ranks(2).run(in_all_ways, 1, 2)
    assert others == [None]  # rank 0 alone has the report
    check_document(document, 1)
    by_way = {r["way"]: r for r in document["results"]}
    exact, int8 = by_way["cp=1 tp=2 bfloat16"], by_way["cp=1 tp=2 bfloat16, int8=two_step"]
    assert len(by_way) == 5 and "cp=1 tp=2 bfloat16, moe=ep" in by_way
    rows = SMALL.batch_size * SMALL.prompt_tokens
    # of a row, of which each of two ranks sums a half and receives the other
    for result, sent in ((exact, HIDDEN * 2), (int8, HIDDEN + 4)):
        moved = [rank["prefill_communication"]["all_reduce"] for rank in result["ranks"]]
        assert moved == [2 * LAYERS * rows * sent] * 2
        # in one step, which is exact
        (step,) = {rank["decode_communication"]["all_reduce"] for rank in result["ranks"]}
        assert step == 2 * LAYERS * SMALL.batch_size * HIDDEN * 2
        assert result["shares"]["prefill"]["collectives"] > 0
    assert 0 < int8["logits_difference"] < 0.2


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens=0"], "--prompt-tokens must be positive, got 0"),
        (["--prompt-tokens=8,,9"], "--prompt-tokens must be values such as a or a,b"),
        (["--prompt-tokens=many"], "--prompt-tokens must be whole numbers, got 'many'"),
        (["--prompt-tokens=8193"], "--prompt-tokens 8193: the model was made for 8192 tokens"),
        (["--new-tokens=-1"], "--new-tokens must not be negative, got -1"),
        (["--batch-size=-2"], "--batch-size must be positive, got -2"),
        (["--dtype=float16"], "--dtype must be one of auto, bfloat16, float32, got 'float16'"),
        (["--cp=0"], "--cp must be positive, got 0"),
        (["--tp=3"], "cannot be divided evenly by 3"),
        (["--moe=all", "--tp=2"], "--moe must be tp or ep, got 'all'"),
        (["--int8=three_step"], "--int8 must be one of exact, auto, one_shot, two_step"),
        (["--kv-gather=fp8"], "CommConfig(kv_gather='fp8')"),
        (["--exchange=post"], "CommConfig(exchange='post')"),
        (["--tp=2", "--int8=auto", "--skip-layers=9"], "names the layers [9]"),
        (["--tp=2", "--int8=auto", "--skip-layers=x"], "--skip-layers must be layer numbers"),
        (["--tp=2", "--int8=auto", "--group-size=100"], "does not divide hidden_size"),
        (["--chunk-tokens=1.5"], "--chunk-tokens must be whole numbers"),
        (["--copies=0"], "--copies must be positive, got 0"),
        (["--repeats=0"], "--repeats must be positive, got 0"),
        (["--threads=0"], "--threads must be positive, got 0"),
        (["--timeout=0"], "--timeout must be positive"),
        (["--against=vllm"], "--against must be transformers, got 'vllm'"),
        (["--plot=figure.txt"], "--plot must end in .svg, .png, .pdf"),
        (["--plot=/nowhere/figure.svg"], "there is no such folder"),
        (["--output=/nowhere/bench.json"], "there is no such folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(bench, monkeypatch, arguments, message):
    def unwanted(*_: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("qwen3cp.launch.start_ranks", unwanted)
    code, stdout, stderr = bench(MODEL, *arguments)
    assert (code, stdout) == (2, "")
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert message in line and stderr.strip().endswith(line)


def test_no_such_model(bench):
    code, _, stderr = bench("no/such/folder")
    assert code == 2 and "error: there is no folder no/such/folder" in stderr


def test_a_world_that_ways_do_not_fit_into(bench, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("qwen3cp.launch._is_first_to_report", lambda: True)
    code, _, stderr = bench(MODEL, "--cp=2")
    assert code == 2
    assert "does not fit into a world of 3 ranks: start 2, or change the sizes" in stderr


def test_ranks_that_cannot_load(tmp_path):
    """One line from all of them, and none left."""
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    marker = f"QWEN3CP_TEST_LOAD_{os.getpid()}"
    done = subprocess.run(
        [sys.executable, "-m", "qwen3cp.cli", "bench", str(tmp_path), "--cp=2"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, marker: "1"},
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "rror" in line]
    assert line.startswith(f"error: {tmp_path} has neither model.safetensors.index.json nor ")
    assert processes_with(marker) == []


# --------------------------------------------------------------------------------- ways and worlds


few = examples(max_examples=30)
sizes = st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=3, unique=True)


@few
@given(
    dtypes=st.lists(st.sampled_from(["bfloat16", "float32"]), min_size=1, unique=True),
    cp=sizes,
    tp=sizes,
    moe=st.lists(st.sampled_from(["tp", "ep"]), min_size=1, unique=True),
    int8=st.lists(st.sampled_from(["exact", "auto", "int8_one_shot"]), min_size=1, unique=True),
    kv=st.lists(st.sampled_from(["exact", "int8"]), min_size=1, unique=True),
    chunks=st.lists(st.sampled_from([0, 7, 2048]), min_size=1, unique=True),
    scores=st.lists(st.booleans(), min_size=1, unique=True),
    copies=st.integers(1, 3),
    transformers=st.booleans(),
)
def test_ways_are_all_combinations_that_differ(
    dtypes, cp, tp, moe, int8, kv, chunks, scores, copies, transformers
):
    ways = ways_of(
        dtypes=dtypes,
        cp=cp,
        tp=tp,
        moe=moe,
        comm=[CommConfig(all_reduce=a, kv_gather=g) for a in int8 for g in kv],
        chunk_tokens=chunks,
        float32_scores=scores,
        copies=copies,
        transformers=transformers,
    )
    assert len({way.name for way in ways}) == len(set(ways)) == len(ways)
    ours = [way for way in ways if way.engine == "qwen3cp"]
    assert len(ways) - len(ours) == len(dtypes) * transformers
    assert {(way.cp, way.tp) for way in ours} == {(c, t) for c in cp for t in tp}
    for way in ours:
        if way.tp == 1:
            assert way.comm.all_reduce == "exact"
        if way.cp == 1:
            assert way.comm.kv_gather == "exact"
        if way.num_ranks == 1:
            assert way.moe == "tp"
        if way.dtype == "float32":
            assert not way.float32_scores
        assert way.copies == 1 or way.num_ranks == 1
    settings = settings_of(*ways)
    settings.check_world(settings.num_ranks)  # all fit
    with pytest.raises(ParallelConfigError):
        settings.check_world(0 if settings.num_ranks == 1 else settings.num_ranks - 1)
    for way, other in pairs(ways):
        assert way != other and way.engine == "qwen3cp"
        if other.engine == "transformers":
            assert way.dtype == other.dtype


def test_steps_are_counted():
    told: list[str] = []
    settings = settings_of(Way(dtype="bfloat16"), Way(dtype="float32"), parts=True)
    run_benchmark(settings, told.append)
    assert len(told) == num_steps(settings) == 2 * (1 + 2 + 1)


def test_ways_take_turns():
    """None always follows the same."""
    told: list[str] = []
    ways = [Way(dtype="bfloat16", chunk_tokens=n) for n in (0, 5, 6)]
    run_benchmark(settings_of(*ways, repeats=3), told.append)
    timed = [what.split(": ")[0].split(", ")[1] for what in told if " of 3" in what]
    order = ["12 tokens", "chunks of 5", "chunks of 6"]
    assert timed == [order[(first + i) % 3] for first in range(3) for i in range(3)]


# ----------------------------------------------------------------------------------------- numbers


def episode(copy: int, prefill: float, steps: list[float], **changes: Any) -> Episode:
    values: dict[str, Any] = dict(
        copy=copy,
        prefill_seconds=prefill,
        step_seconds=steps,
        parameter_bytes=10,
        cache_bytes=20,
        grown_bytes={"prefill": 30, "decode": 5},
        peak_resident_bytes=100,
        peak_device_bytes=None,
        communication={"prefill": {}, "decode": {}},
        logits=torch.ones(2, 3),
    )
    return Episode(**{**values, **changes})


def measured(way: Way, *repeats: dict[int, Episode]) -> Measured:
    return Measured(
        way=way, workload=SMALL, repeats=list(repeats), shares=None, operators=None, experts=None
    )


times = st.floats(1e-4, 1e3)


@given(
    data=st.lists(st.tuples(times, st.lists(times, min_size=3, max_size=3)), min_size=8, max_size=8)
)
def test_times_of_ranks_and_copies(data):
    """Two repeats of two ranks each: as two copies, and as one of two ranks."""
    repeats = [data[0:2], data[2:4]]
    as_copies = [{r: episode(r, *each) for r, each in enumerate(ranks)} for ranks in repeats]
    as_one = [{r: episode(0, *each) for r, each in enumerate(ranks)} for ranks in data_pairs(data)]
    ways = Way(dtype="bfloat16", copies=2), Way(dtype="bfloat16", cp=2)
    report = Report.of(
        settings_of(*ways), [measured(ways[0], *as_copies), measured(ways[1], *as_one)]
    )
    copies, two = report.results
    rows, prompt = SMALL.batch_size, SMALL.prompt_tokens
    for i, ranks in enumerate(repeats):
        prefills = [prefill for prefill, _ in ranks]
        steps = [float(torch.tensor(s, dtype=torch.float64).median()) for _, s in ranks]
        # tokens of both copies by the time of each, added up
        rate = sum(rows * prompt / p for p in prefills)
        assert copies.prefill_tokens_per_second.samples[i] == pytest.approx(rate)
        assert copies.seconds_to_first_token.samples[i] == pytest.approx(hmean(prefills))
        assert copies.decode_tokens_per_second is not None
        assert copies.decode_tokens_per_second.samples[i] == pytest.approx(
            sum(rows / s for s in steps)
        )
    for i, ranks in enumerate(data_pairs(data)):
        slowest = max(prefill for prefill, _ in ranks)
        assert two.seconds_to_first_token.samples[i] == pytest.approx(slowest)
        step = statistics.median(max(both) for both in zip(*(s for _, s in ranks), strict=True))
        assert two.seconds_per_token is not None
        assert two.seconds_per_token.samples[i] == pytest.approx(step)
    (of_prefill,) = (r for r in report.ratios if r.measure == "prefill")
    assert (of_prefill.way, of_prefill.against) == (two.way, copies.way)
    expected = [
        a / b
        for a, b in zip(
            two.prefill_tokens_per_second.samples,
            copies.prefill_tokens_per_second.samples,
            strict=True,
        )
    ]
    assert of_prefill.ratio.samples == pytest.approx(expected)
    assert of_prefill.ratio.low <= of_prefill.ratio.median <= of_prefill.ratio.high


def data_pairs(data: list[Any]) -> list[list[Any]]:
    return [data[4:6], data[6:8]]


def test_memory_is_the_most_of_the_repeats():
    repeats = [
        {0: episode(0, 1.0, [1.0] * 3, grown_bytes={"prefill": n, "decode": None})}
        for n in (7, 9, 8)
    ]
    way = Way(dtype="bfloat16")
    (result,) = Report.of(settings_of(way), [measured(way, *repeats)]).results
    (rank,) = result.ranks
    assert (rank.prefill_grown_bytes, rank.decode_grown_bytes) == (9, None)


def test_logits_are_compared():
    ways = Way(dtype="bfloat16"), Way(dtype="bfloat16", engine="transformers")
    logits = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]])
    of_ways = [
        measured(way, {0: episode(0, 1.0, [1.0] * 3, logits=x)})
        for way, x in zip(ways, logits, strict=True)
    ]
    ours, theirs = Report.of(settings_of(*ways), of_ways).results
    assert ours.logits_difference == pytest.approx(4 / 3)
    assert ours.logits_against == theirs.way
    assert (theirs.logits_difference, theirs.logits_against) == (None, None)


# ------------------------------------------------------------------------------------------ meters


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells it")
def test_memory_beyond_what_was_held():
    held = torch.ones(32 << 20, dtype=torch.uint8)
    meter = MemoryMeter(torch.device("cpu"))
    meter.start()
    assert meter.grown_bytes is not None and meter.grown_bytes < 4 << 20
    for _ in range(2):
        torch.ones(64 << 20, dtype=torch.uint8)  # freed at once
    grown = meter.grown_bytes
    # the system counts pages of each thread apart, and adds them up a little late
    assert grown is not None and 63 << 20 < grown < 80 << 20
    assert meter.peak_resident_bytes is not None and meter.peak_resident_bytes > 96 << 20
    assert meter.peak_device_bytes is None
    meter.start()
    assert meter.grown_bytes < 4 << 20
    del held


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    meter = MemoryMeter(torch.device("cpu"))
    meter.start()
    assert meter.grown_bytes is None and meter.peak_resident_bytes is None
    bare = episode(0, 1.0, [1.0] * 3, grown_bytes={"prefill": None, "decode": None})
    way = Way(dtype="bfloat16")
    report = Report.of(settings_of(way), [measured(way, {0: bare})])
    assert "cp=1 tp=1 bfloat16" in report.to_table()


def test_parts_of_a_prefill(monkeypatch):
    """Every operator takes one second here: seconds are numbers of calls, counted by hand."""
    clock = iter(range(10**6))
    engine = OurEngine(MODEL, "bfloat16", ParallelContext.single())
    way = Way(dtype="bfloat16")
    prompts = torch.arange(24).view(2, 12)
    calls: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    run = engine.start(way, SMALL)
    with Record():
        run.prefill(prompts)
    run = engine.start(way, SMALL)
    timer = PartTimer(engine.model, engine.device)
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    with timer.measure():
        run.prefill(prompts)
    assert timer.num_operators == len(calls) == sum(timer.seconds.values())
    products = sum(name in ("aten.mm", "aten.linear") for name in calls)
    # of which the router's is a part of the experts
    assert timer.seconds["projections"] == products - LAYERS == 4 * LAYERS + 1
    assert timer.seconds["experts"] >= 7 * LAYERS
    assert timer.seconds["attention"] >= 6 * LAYERS
    assert timer.seconds["other"] >= 2 * LAYERS + 2  # norms of the residual; embedding
    assert timer.seconds["collectives"] == timer.seconds["host"] == 0
    shares = timer.shares(2 * len(calls))
    assert shares["host"] == pytest.approx(0.5) and sum(shares.values()) == pytest.approx(1)
    assert timer.shares(0.0)["host"] == 0  # a faster run than that with the timer
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in engine.model.modules())


def test_transformers_takes_its_fastest_experts(monkeypatch):
    engine = TransformersEngine(MODEL, "bfloat16")
    took = {"eager": 3.0, "grouped_mm": 2.0, "batched_mm": 1.0}
    monkeypatch.setattr(
        engines,
        "_seconds",
        lambda device, call: took[str(engine.model.config._experts_implementation)],
    )
    engine.choose_experts(torch.arange(40).view(1, 40))
    prefill, decode = ForwardPhase.PREFILL, ForwardPhase.DECODE
    assert engine.chosen == {prefill: "batched_mm", decode: "batched_mm"}
    monkeypatch.setattr(engines, "LARGEST_COPY", 0)  # it copies the weights of every row
    engine.choose_experts(torch.arange(40).view(1, 40))
    assert engine.chosen == {prefill: "grouped_mm", decode: "batched_mm"}
    assert set(engine.probed["prefill"]) == {"eager", "grouped_mm"}
    for phase, name in engine.chosen.items():
        engine.prepare(phase)
        assert engine.model.config._experts_implementation == name


# ----------------------------------------------------------------------------------------- overlap


def spans_of_a_prefill() -> list[tuple[str, bool]]:
    model = load(CHECKPOINT, 2, 1)
    cache = model.new_kv_cache(num_pages=3)
    with collectives.time_collectives() as spans:
        model.prefill(cache, [cache.new_sequence()], random_ids(0, 16))
    ends = [span.end for span in spans]
    in_order = all(s.start <= s.end for s in spans) and ends == sorted(ends)
    with collectives.record_communication() as log:  # outside: nothing is added
        model.prefill(cache, [cache.new_sequence()], random_ids(0, 1))
    assert len(spans) == len(ends) and log.records
    return [(span.what.split()[0], in_order) for span in spans]


def test_collectives_are_timed(ranks):
    for found in ranks(2).run(spans_of_a_prefill):
        kinds = [kind for kind, _ in found]
        # a gather is started, and waited for
        assert kinds == ["check", *["kv_gather"] * 2 * LAYERS, "logits", "logits"]
        assert all(in_order for _, in_order in found)


class LateGather:
    """Of a link so slow that nothing arrives before the queries of its layer are there."""

    def __init__(self, work: Any, queries: list[bool]) -> None:
        self._work, self._queries = work, queries

    def wait(self) -> None:
        assert self._queries.pop(), "the gather was waited for before the queries were projected"
        self._work.wait()


def prefill_over_a_slow_link() -> tuple[bool, int]:
    model = load(CHECKPOINT, 2, 1)
    queries: list[bool] = []
    waits = 0
    gather = collectives._all_gather_into

    def late(*args: Any, **kwargs: Any) -> Any:
        nonlocal waits
        work = gather(*args, **kwargs)
        if not kwargs.get("async_op"):
            return work
        waits += 1
        queries.append(False)
        return LateGather(work, queries)

    class Watch(TorchDispatchMode):
        """The second rotation of a layer is that of its queries."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if str(func.overloadpacket) == "npu.npu_rotary_mul" and queries:
                queries[-1] = True
            return out

    ids = random_ids(0, 37)
    cache = model.new_kv_cache(max_tokens=37)
    expected = model.prefill(cache, [cache.new_sequence()], ids)
    collectives._all_gather_into = late
    try:
        other = model.new_kv_cache(max_tokens=37)
        with Watch():
            logits = model.prefill(other, [other.new_sequence()], ids)
    finally:
        collectives._all_gather_into = gather
    return torch.equal(logits, expected), waits


def test_queries_are_ready_before_the_gather_is_waited_for(ranks):
    assert ranks(2).run(prefill_over_a_slow_link) == [(True, LAYERS)] * 2


# -------------------------------------------------------------------------- the documented results


@pytest.fixture
def performance(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "benchmarks"))
    return importlib.import_module("performance")


def test_tables_go_to_their_places(performance):
    page = "a\n<!-- table one -->\nold\n<!-- end -->\nb\n<!-- table two -->\n<!-- end -->\n"
    once = performance.filled(page, {"one": "| new |"})
    assert once.startswith("a\n<!-- table one -->\n\n| new |\n\n<!-- end -->\nb\n")
    assert once.endswith("<!-- table two -->\n<!-- end -->\n")
    assert performance.filled(once, {"one": "| new |"}) == once


def test_the_model_is_what_the_page_says():
    config = Qwen3MoeConfig.from_json_file(ROOT / "docs" / "benchmarks" / "random-324m.json")
    from qwen3cp.weights.whole import WholeCheckpoint

    numel = WholeCheckpoint.plan(config, torch.bfloat16, "5GB").numel
    assert round(numel / 1e6) == 324
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (6, 1024, 32000)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (16, 4, 128)
    assert (config.num_experts, config.num_experts_per_tok) == (32, 4)
    assert config.moe_intermediate_size == 384


def test_steps_of_the_script(performance, tmp_path):
    """Those that are not runs of `qwen3cp bench`, with short lengths."""
    found = performance.limits(CHECKPOINT, 1, 64)
    assert found["flops_per_second"] > 0 and found["layers"] == LAYERS
    found = performance.attention(CHECKPOINT, 1, 64)
    assert [(row["dtype"], row["scores"]) for row in found["rows"]] == [
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
    ]
    for row in found["rows"]:
        assert row["error"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert found["end"]["work"] == pytest.approx(8 * (512 + 4.5) / (128 * 129 / 2))
    errors = performance.accuracy(CHECKPOINT, 1, 16)["errors"]
    assert set(errors) == {"bfloat16 scores", "float32 scores", "transformers"}
    assert all(0 < error < 0.1 for error in errors.values())


@pytest.mark.slow
def test_the_script(performance, tmp_path):
    """All of it with lengths that say nothing: results, tables and pages."""
    output = tmp_path / "performance.json"
    done = subprocess.run(
        [sys.executable, performance.__file__, f"--model={MODEL}", "--shrink=256", "--repeats=1"]
        + [f"--output={output}", "--no-pages", "--steps=limits,single,overlap"],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert set(results) == {"limits", "single", "overlap"}
    assert set(performance.tables(results)) == {
        "machine",
        "transformers",
        "parts",
        "arithmetic",
        "overlap",
    }
    check_document_of_script = results["single"]
    assert {r["way"] for r in check_document_of_script["results"]} == {
        "cp=1 tp=1 bfloat16",
        "cp=1 tp=1 bfloat16, float32 scores",
        "transformers bfloat16",
    }
    overlap = results["overlap"]
    assert set(overlap["delays"]) == {"none", "half", "all", "twice"}
    assert all(len(seconds) == 1 for seconds in overlap["seconds"].values())
