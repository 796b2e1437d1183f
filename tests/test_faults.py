"""A rank that is killed ends the others, soon and with a message that says what happened."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from qwen3cp.errors import CommunicationError
from tests.models import load, random_ids
from tests.ranks import Ranks

TIMEOUT = 10.0  # of a collective, in seconds


def die_in_a_layer(cp: int, tp: int, path: Path, victim: int, layer: int, step: str) -> str:
    """Rank `victim` kills itself when it comes to `layer`, in a prefill or a decode step."""
    model = load(path, cp, tp)
    cache = model.new_kv_cache(max_tokens=512)
    sequence = cache.new_sequence()
    (prompt,) = random_ids(0, 300)
    if step == "decode":
        model.prefill(cache, [sequence], [prompt])
    if model.parallel_context.rank == victim:
        module = model.model.layers[layer]
        module.register_forward_pre_hook(lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    length, free = sequence.length, cache.num_free_pages
    try:
        for _ in range(3):
            if step == "prefill":
                model.prefill(cache, [sequence], [prompt])
            else:
                model.decode(cache, [sequence], [1])
    finally:
        assert (sequence.length, cache.num_free_pages) == (length, free)
    return "finished"


@pytest.mark.parametrize(
    ("cp", "tp", "step"), [(2, 1, "prefill"), (1, 2, "decode"), (2, 2, "prefill")]
)
def test_a_killed_rank_ends_the_others_within_the_timeout(checkpoint, cp, tp, step):
    size = cp * tp
    draw = random.Random(size)
    victim, layer = draw.randrange(size), draw.randrange(4)
    ranks = Ranks(size, timeout=TIMEOUT)
    try:
        ranks.run(load_only, cp, tp, checkpoint)
        started = time.monotonic()
        ranks.start(die_in_a_layer, cp, tp, checkpoint, victim, layer, step)
        outcomes = ranks.collect(timeout=3 * TIMEOUT)
        elapsed = time.monotonic() - started
    finally:
        ranks.close()
    assert isinstance(outcomes[victim], EOFError), outcomes[victim]
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert isinstance(outcome, CommunicationError), (rank, outcome)
            assert f"cp_rank {rank // tp}, tp_rank {rank % tp}" in str(outcome)
            assert "Another rank has probably ended" in str(outcome)
    assert elapsed < 2 * TIMEOUT


def load_only(cp: int, tp: int, path: Path) -> bool:
    load(path, cp, tp)
    return torch.distributed.is_initialized()


def hang_in_a_layer(path: Path) -> str:
    model = load(path, 2, 1)
    if model.parallel_context.rank == 1:
        module = model.model.layers[1]
        module.register_forward_pre_hook(lambda *args: time.sleep(25))
    cache = model.new_kv_cache(max_tokens=64)
    model.prefill(cache, [cache.new_sequence()], [[1, 2, 3]])
    return "finished"


def test_a_rank_that_hangs_ends_the_others_after_the_timeout():
    from tests.conftest import CHECKPOINT

    ranks = Ranks(2, timeout=5.0)
    try:
        ranks.run(load_only, 2, 1, CHECKPOINT)
        started = time.monotonic()
        ranks.start(hang_in_a_layer, CHECKPOINT)
        assert ranks._pipes[0].poll(20), "rank 0 still waits"
        outcome = ranks._pipes[0].recv()
        elapsed = time.monotonic() - started
    finally:
        ranks.close()
    assert isinstance(outcome, CommunicationError), outcome
    assert "kv_gather" in str(outcome)
    assert elapsed < 20
