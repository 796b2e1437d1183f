"""The report on int8 communication, against errors and logits computed here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3cp import CommConfig, error_report
from qwen3cp.comm_report import CommunicationReport
from qwen3cp.errors import InputError, ParallelConfigError
from tests.models import load, random_ids, save_random
from tests.ranks import run

LENGTHS = (50, 1, 7)
VOCABULARY = 203


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("reported") / "checkpoint", hidden_size=128)


def report(cp: int, tp: int, path: Path, comm: CommConfig, lengths=LENGTHS) -> CommunicationReport:
    model = load(path, cp, tp)
    before = model.parallel_context.comm
    result = error_report(model, random_ids(7, *lengths, vocab_size=VOCABULARY), comm=comm)
    assert model.parallel_context.comm is before and model.parallel_context.phase is None
    return result


def compared_logits(cp: int, tp: int, path: Path, comm: CommConfig) -> tuple[float, float, float]:
    """(mean KL, largest KL, agreement) of all positions, from transformers' own interface."""
    model = load(path, cp, tp)
    divergences, agree = [], []
    for ids in random_ids(7, *LENGTHS, vocab_size=VOCABULARY):
        exact = model(ids[None]).logits[0].double()
        with model.parallel_context.communication(comm):
            rounded = model(ids[None]).logits[0].double()
        p, q = exact.softmax(-1), rounded.softmax(-1)
        divergences.append((p * (p.log() - q.log())).sum(-1))
        agree.append(exact.argmax(-1) == rounded.argmax(-1))
    kl = torch.cat(divergences)
    return float(kl.mean()), float(kl.max()), float(torch.cat(agree).double().mean())


TWO_STEP = CommConfig(all_reduce="int8_two_step", kv_gather="int8", skip_layers=[1])


@pytest.mark.parametrize("topology", [(1, 2), (2, 1), (2, 2), (4, 1)], ids=str)
def test_logits_are_compared_at_every_position(ranks, small, topology):
    reports = run(ranks, topology, report, small, TWO_STEP)
    expected = run(ranks, topology, compared_logits, small, TWO_STEP)[0]
    for ours in reports:
        assert ours == reports[0]
        assert ours.num_positions == sum(LENGTHS)
        assert ours.kl_mean == pytest.approx(expected[0], rel=0.02)
        assert ours.kl_max == pytest.approx(expected[1], rel=0.02)
        assert ours.top1_agreement == pytest.approx(expected[2])
        assert 0 < ours.kl_mean < ours.kl_max < 1


def test_every_message_of_every_layer_is_reported(ranks, small):
    for topology, names in (
        ((1, 2), ["attention", "mlp"]),
        ((2, 1), ["kv_gather"]),
        ((2, 2), ["attention", "mlp", "kv_gather"]),
    ):
        (ours, *_) = run(ranks, topology, report, small, TWO_STEP)
        places = [(m.layer, m.message) for m in ours.messages]
        assert places == [(layer, name) for layer in range(3) for name in names]
        for message in ours.messages:
            if message.layer == 1:
                assert (message.form, message.relative_error) == ("exact", 0)
            else:
                form = "int8" if message.message == "kv_gather" else "int8_two_step"
                assert message.form == form
                assert 1e-3 < message.relative_error < 0.03
            assert 2 < message.outlier_ratio < 30


def keys_of_the_first_layer(cp: int, tp: int, path: Path) -> torch.Tensor:
    """Keys and values with exact communication, [tokens of all prompts, heads, head_dim]."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(num_pages=8)
    prompts = random_ids(7, *LENGTHS, vocab_size=VOCABULARY)
    sequences = [cache.new_sequence() for _ in prompts]
    model.prefill(cache, sequences, prompts)
    both = [torch.cat(cache.read(sequence, 0)) for sequence in sequences]
    return torch.cat(both).reshape(-1, 2, 64)


def test_errors_and_outliers_of_the_gather(ranks, small):
    heads = keys_of_the_first_layer(1, 1, small).double()
    step = heads.abs().amax(-1, keepdim=True) / 127
    expected = ((heads / step).round() * step - heads).norm() / heads.norm()
    ratio = heads.abs().max() / heads.square().mean().sqrt()
    for ours in run(ranks, (4, 1), report, small, CommConfig(kv_gather="int8")):
        first = ours.messages[0]
        assert (first.layer, first.message) == (0, "kv_gather")
        assert first.relative_error == pytest.approx(float(expected), rel=1e-2)
        assert first.outlier_ratio == pytest.approx(float(ratio), rel=1e-4)


def report_with_outlier(cp: int, tp: int, path: Path, group_size: int | None) -> Any:
    """One output channel of the first layer's experts 100 times as large."""
    model = load(path, cp, tp)
    layer: Any = model.model.layers[0]
    weight = layer.mlp.experts.down_proj
    before = weight.data.clone()
    weight.data[:, 5] *= 100
    try:
        return report(cp, tp, path, CommConfig(all_reduce="int8_one_shot", group_size=group_size))
    finally:
        weight.data.copy_(before)


def test_outliers_show_and_groups_help(ranks, small):
    def first_layer(reports: list[CommunicationReport]) -> dict[str, tuple[float, float]]:
        first = (m for m in reports[0].messages if m.layer == 0)
        return {m.message: (m.relative_error, m.outlier_ratio) for m in first}

    one_shot = CommConfig(all_reduce="int8_one_shot")
    plain = first_layer(run(ranks, (1, 2), report, small, one_shot))
    whole = first_layer(run(ranks, (1, 2), report_with_outlier, small, None))
    groups = first_layer(run(ranks, (1, 2), report_with_outlier, small, 16))
    assert whole["attention"] == pytest.approx(plain["attention"])
    assert whole["mlp"][1] > 2 * plain["mlp"][1]
    assert groups["mlp"][0] < whole["mlp"][0]


@pytest.mark.parametrize("comm", [CommConfig(all_reduce="auto"), TWO_STEP])
def test_json_is_all_of_it(ranks, small, comm):
    ours = run(ranks, (1, 2), report, small, comm)[0]
    document = json.loads(ours.to_json())
    assert document["topology"] == {"cp": 1, "tp": 2}
    assert document["dtype"] == "float32"
    assert document["comm"]["all_reduce"] == comm.all_reduce
    assert document["comm"]["skip_layers"] == list(comm.skip_layers)
    assert len(document["messages"]) == 6
    assert document["messages"][0]["form"] == (
        "exact" if comm.all_reduce == "auto" else "int8_two_step"
    )
    assert document["kl_mean"] == ours.kl_mean


def test_mixed_forms_are_named(ranks, small):
    # 50 rows of 128 floats are above, 7 below
    comm = CommConfig(all_reduce="int8_one_shot", min_bytes=10_000)
    ours = run(ranks, (1, 2), report, small, comm)[0]
    assert {m.form for m in ours.messages} == {"mixed"}


def test_table(ranks, small):
    ours = run(ranks, (2, 2), report, small, TWO_STEP)[0]
    lines = ours.to_table().splitlines()
    header = next(line for line in lines if "layer" in line)
    assert header.index("attention") < header.index("mlp") < header.index("kv_gather")
    rows = [line for line in lines if "%," in line]
    assert len(rows) == 3
    for row, layer in zip(rows, range(3), strict=True):
        for message in (m for m in ours.messages if m.layer == layer):
            assert f"{message.relative_error:.3%}" in row
    assert f"{ours.kl_mean:.2e}" in lines[-2]
    assert f"{ours.top1_agreement:.2%}" in lines[-1]


@pytest.mark.parametrize("name", ["report.svg", "report.png"])
def test_plot(ranks, small, tmp_path, name):
    ours = run(ranks, (2, 2), report, small, TWO_STEP)[0]
    ours.plot(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    if name.endswith("svg"):
        assert content.count(b"<path") > 10 and b"</svg>" in content
    else:
        assert content.startswith(b"\x89PNG")


def test_plots_that_cannot_be_written(ranks, small, tmp_path):
    ours = run(ranks, (1, 2), report, small, TWO_STEP)[0]
    for path in (tmp_path / "none" / "x.svg", tmp_path / "x.nonsense"):
        with pytest.raises(InputError, match="cannot be written"):
            ours.plot(path)


def report_error_of(cp: int, tp: int, path: Path, comm: CommConfig, prompts: Any) -> str:
    model = load(path, cp, tp)
    with pytest.raises((InputError, ParallelConfigError)) as caught:
        error_report(model, prompts, comm=comm)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("comm", "prompts", "message"),
    [
        (CommConfig(), [[1]], "InputError: comm is exact"),
        (TWO_STEP, [], "InputError: error_report needs at least one prompt"),
        (TWO_STEP, [[1], []], "prompt 1"),
        (TWO_STEP, [[1, 999]], "999"),
        (CommConfig(all_reduce="auto", group_size=96), [[1]], "ParallelConfigError: .*group_size"),
        (CommConfig(kv_gather="int8", skip_layers=[3]), [[1]], "ParallelConfigError: .*layers"),
    ],
)
def test_mistakes_are_told_on_every_rank(ranks, small, comm, prompts, message):
    for error in run(ranks, (1, 2), report_error_of, small, comm, prompts):
        assert re.search(message, error)


def test_one_rank_has_nothing_to_report(small):
    ours = report(1, 1, small, CommConfig(all_reduce="int8_two_step"))
    assert ours.messages == []
    assert (ours.kl_mean, ours.top1_agreement) == (0, 1)
    assert math.isfinite(ours.kl_max) and "positions" in ours.to_table()
