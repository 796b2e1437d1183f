"""Saving from several ranks, cutting for them, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.errors import CheckpointError, InputError, ParallelConfigError, Qwen3CPError
from qwen3cp.weights import CheckpointIndex, shard
from tests.models import random_ids, save_random
from tests.ranks import context, run

TOPOLOGIES = [(1, 1, "tp"), (2, 2, "tp"), (1, 4, "tp"), (2, 2, "ep"), (4, 1, "ep"), (1, 2, "ep")]
MANIFEST = "qwen3cp-shards.json"


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return save_random(
        tmp_path_factory.mktemp("saving") / "checkpoint", attention_bias=True, mlp_only_layers=[1]
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    index = CheckpointIndex.read(folder)
    return {k: v for name in index.files for k, v in load_file(folder / name).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


def save(cp: int, tp: int, path: Path, out: Path, moe: str, options: dict[str, Any]) -> int:
    model = CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=context(cp, tp, moe=moe), dtype=torch.float32
    )
    model.save_pretrained(out, **options)
    return len(list(out.glob("*.safetensors")))


@pytest.mark.parametrize("topology", [*TOPOLOGIES, (2, 2, "tied")], ids=str)
def test_what_is_saved_is_what_was_loaded(ranks, source, tmp_path, topology):
    cp, tp, moe = topology
    if moe == "tied":
        moe = "tp"
        source = save_random(tmp_path / "tied", tie_word_embeddings=True)
    out = tmp_path / "out"
    counts = run(ranks, (cp, tp), save, source, out, moe, dict(max_shard_size="300KB"))
    assert set(counts) == {len(list(out.glob("model-0*-of-0*.safetensors")))} and counts[0] > 2
    assert_equal(tensors_of(out), tensors_of(source))

    expected = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs, info = cast(Any, AutoModelForCausalLM).from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs) is Qwen3MoeForCausalLM and theirs.dtype == torch.float32
    ids = random_ids(0, 9, vocab_size=203)[0][None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, expected(ids).logits)
    ours = CPQwen3MoeForCausalLM.from_pretrained(out).state_dict()
    assert_equal(ours, CPQwen3MoeForCausalLM.from_pretrained(source).state_dict())


def test_files_are_as_transformers_writes_them(source, tmp_path):
    """Index, metadata, config and generation config."""
    CPQwen3MoeForCausalLM.from_pretrained(source).save_pretrained(
        tmp_path / "ours", max_shard_size=500_000
    )
    Qwen3MoeForCausalLM.from_pretrained(source).save_pretrained(
        tmp_path / "theirs", max_shard_size="500KB"
    )
    ours, theirs = (
        json.loads((tmp_path / who / "model.safetensors.index.json").read_text())
        for who in ("ours", "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (
            json.loads((tmp_path / who / name).read_text()) for who in ("ours", "theirs")
        )
        assert ours == theirs
    for path in (tmp_path / "ours").glob("*.safetensors"):
        assert path.stat().st_size < 550_000
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_a_small_model_is_one_file(source, tmp_path):
    model = CPQwen3MoeForCausalLM.from_pretrained(source, dtype="bfloat16")
    model.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert model.config.architectures == ["Qwen3MoeForCausalLM"]
    assert {x.dtype for x in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}


def test_saving_replaces_the_checkpoint_and_keeps_the_rest(source, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    (out / "tokenizer.json").write_text("{}")
    (out / "notes").mkdir()
    (out / "notes" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(out)
    before = tensors_of(out)
    model = CPQwen3MoeForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "link")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "notes"),
    }
    assert (out / "notes" / "a.txt").read_text() == "a"
    assert_equal(tensors_of(out), before)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "link"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(push_to_hub=True), "push_to_hub"),
        (dict(state_dict={}), "state_dict"),
        (dict(max_shard_size="5 apples"), "5 apples"),
        (dict(max_shard_size=0), "max_shard_size"),
        (dict(max_shard_size="0GB"), "0GB"),
        (dict(max_shard_size=True), "True"),
    ],
)
def test_arguments_that_cannot_be_honoured(source, tmp_path, options, words):
    model = CPQwen3MoeForCausalLM.from_pretrained(source)
    with pytest.raises(InputError, match=words):
        model.save_pretrained(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        CPQwen3MoeForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_described_rank_cannot_be_saved(source, tmp_path):
    ctx = ParallelContext.describe(0, tp_size=2)
    model = CPQwen3MoeForCausalLM.from_pretrained(source, parallel_context=ctx)
    with pytest.raises(ParallelConfigError, match="without the other ranks"):
        model.save_pretrained(tmp_path / "out")


# --------------------------------------------------------------------------------- interruptions


def save_on_a_full_disk(
    cp: int, tp: int, path: Path, out: Path, limit: int, moe: str
) -> tuple[str, str]:
    """No file of rank 0 may grow beyond the limit, as on a disk that is full then."""
    import resource

    ctx = context(cp, tp, moe=moe) if cp * tp > 1 else ParallelContext.single()
    model = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype="float32")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ctx.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        model.save_pretrained(out, max_shard_size="300KB")
    except Qwen3CPError as error:
        return type(error).__name__, str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    return "saved", ""


@pytest.mark.parametrize("limit", [0, 1000, 200_000])
@pytest.mark.parametrize("topology", [(1, 1, "tp"), (2, 2, "tp"), (2, 1, "ep")], ids=str)
def test_a_full_disk_stops_every_rank_and_changes_nothing(ranks, source, tmp_path, topology, limit):
    cp, tp, moe = topology
    out = Path(shutil.copytree(source, tmp_path / "out"))
    outcomes = run(ranks, (cp, tp), save_on_a_full_disk, source, out, limit, moe)
    for rank, (kind, words) in enumerate(outcomes):
        assert kind == "CheckpointError" and "File too large" in words, (rank, kind, words)
        assert words.startswith("rank 0 stopped") == (rank > 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_equal(tensors_of(out), tensors_of(source))
    new = run(ranks, (cp, tp), save_on_a_full_disk, source, tmp_path / "new", limit, moe)
    assert {kind for kind, _ in new} == {"CheckpointError"}
    assert not (tmp_path / "new").exists()
    # and the same ranks can save once there is room
    assert run(ranks, (cp, tp), save_on_a_full_disk, source, tmp_path / "new", 2**40, moe)[0] == (
        "saved",
        "",
    )
    assert_equal(tensors_of(tmp_path / "new"), tensors_of(source))


def test_no_room_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(CheckpointError, match="needs 0.00 GB"):
        CPQwen3MoeForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="are free"):
        shard(str(source), tmp_path / "cut", tp_size=2)
    assert not list(tmp_path.iterdir())


SAVE_SLOWLY = """
import signal, sys, time
from pathlib import Path
from qwen3cp import CPQwen3MoeForCausalLM
from qwen3cp.weights import safetensors_file, shard

# which a shell switches off for what it runs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
write = safetensors_file.SafetensorsWriter.write
def slow(self, values):
    print("writing", flush=True)
    time.sleep(0.02)
    write(self, values)
safetensors_file.SafetensorsWriter.write = slow
how, source, out = sys.argv[1:]
if how == "save":
    CPQwen3MoeForCausalLM.from_pretrained(source).save_pretrained(out, max_shard_size="200KB")
else:
    shard(source, Path(out), tp_size=2)
"""


@pytest.mark.parametrize(
    ("how", "number", "after"),
    [
        ("save", signal.SIGKILL, 1),
        ("save", signal.SIGKILL, 60),
        ("save", signal.SIGINT, 30),
        ("shard", signal.SIGKILL, 30),
        ("shard", signal.SIGINT, 1),
    ],
)
def test_killed_while_writing(source, tmp_path, how, number, after):
    """Nothing at the target that was not there; what was there is unchanged."""
    old = Path(shutil.copytree(source, tmp_path / "old")) if how == "save" else tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_SLOWLY, how, str(source), str(old)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    for _ in range(after):
        assert process.stdout.readline()
    process.send_signal(number)
    process.wait(60)
    process.stdout.close()
    assert process.returncode != 0
    if how == "save":
        assert_equal(tensors_of(old), tensors_of(source))
    else:
        assert not old.exists()
    left = [path for path in tmp_path.iterdir() if path != old]
    if number == signal.SIGINT:
        assert left == []
    for path in left:  # hidden, and no checkpoint
        assert path.name.startswith(f".{old.name}.partial-")
        with pytest.raises(CheckpointError):
            CPQwen3MoeForCausalLM.from_pretrained(path)


def save_where_one_rank_dies(cp: int, tp: int, path: Path, out: Path) -> tuple[str, float]:
    ctx = context(cp, tp)
    model = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype="float32")
    if ctx.rank == 1:
        os._exit(1)
    start = time.monotonic()
    try:
        model.save_pretrained(out)
    except Qwen3CPError as error:
        return type(error).__name__, time.monotonic() - start
    return "saved", 0.0


def test_a_rank_that_dies_leaves_nothing(source, tmp_path):
    from tests.ranks import Ranks

    mine = Ranks(2)
    try:
        first, _ = mine.outcomes(save_where_one_rank_dies, 1, 2, source, tmp_path / "out")
    finally:
        mine.close()
    assert first[0] == "CommunicationError"
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------- cut for ranks


def cut(source: Path, out: Path, cp: int, tp: int, moe: Any) -> Path:
    shard(str(source), out, cp_size=cp, tp_size=tp, moe=moe)
    return out


def load_cut(cp: int, tp: int, source: Path, folder: Path, moe: str, share: bool) -> int:
    ctx = context(cp, tp, moe=moe)
    ours, expected = (
        CPQwen3MoeForCausalLM.from_pretrained(
            path, parallel_context=ctx, dtype="float32", share_reads=share
        )
        for path in (folder, source)
    )
    assert_equal(ours.state_dict(), expected.state_dict())
    assert ours.load_report is not None
    return ours.load_report.bytes_read


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES[1:], ids=str)
def test_shards_are_what_the_ranks_hold(ranks, source, tmp_path, topology, share):
    cp, tp, moe = topology
    folder = cut(source, tmp_path / "cut", cp, tp, moe)
    read = run(ranks, (cp, tp), load_cut, source, folder, moe, share)
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    whole = sum(x.nbytes for x in tensors_of(source).values())
    if moe == "ep":  # nothing but attention is there more than once
        assert written < 1.4 * whole
    if not share:
        assert all(count < written for count in read)


def test_shards_hold_what_several_ranks_share_once(source, tmp_path):
    one = cut(source, tmp_path / "one", 1, 2, "tp")
    many = cut(source, tmp_path / "many", 4, 2, "tp")
    sizes = [sum(p.stat().st_size for p in x.glob("*.safetensors")) for x in (one, many)]
    assert sizes[1] < 1.02 * sizes[0]  # headers


@pytest.mark.parametrize("other", [(1, 2, "tp"), (2, 1, "tp"), (2, 2, "ep")], ids=str)
def test_another_topology_is_refused_with_the_command(source, tmp_path, other):
    folder = cut(source, tmp_path / "cut", 2, 2, "tp")
    cp, tp, moe = other
    ctx = ParallelContext.describe(0, cp_size=cp, tp_size=tp, moe=moe)
    command = f"qwen3cp shard {source} OUT --tp {tp} --cp {cp} --moe {moe}"
    with pytest.raises(CheckpointError, match=command):
        CPQwen3MoeForCausalLM.from_pretrained(folder, parallel_context=ctx)


def test_shards_are_not_cut_again(source, tmp_path):
    folder = cut(source, tmp_path / "cut", 1, 2, "tp")
    with pytest.raises(InputError, match="was cut for ranks already"):
        cut(folder, tmp_path / "again", 1, 4, "tp")
    with pytest.raises(InputError, match="not an empty folder"):
        cut(source, folder, 1, 2, "tp")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_files(folder: Path) -> None:
    """Those of rank 0 and 1: all names and shapes are the same."""
    first, second = sorted(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)[:2]
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


CUT_DAMAGE = {
    "a byte": (
        lambda f: [flip_last_byte(p) for p in f.glob("*.safetensors")],
        "checksum is wrong",
    ),
    "swapped files": (swap_files, "does not have the tensors|checksum is wrong"),
    "manifest edited": (lambda f: edit_json(f / MANIFEST, tp_size=1), "was changed since"),
    "manifest of the future": (lambda f: edit_json(f / MANIFEST, format=2), "format 2"),
    "manifest no JSON": (lambda f: (f / MANIFEST).write_text("{"), "not a manifest"),
    "config edited": (lambda f: edit_json(f / "config.json", rms_norm_eps=1e-5), "not that of"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "a file missing": (
        lambda f: [p.unlink() for p in f.glob("*.safetensors")],
        r"lacks the file shard-.*\(with ",
    ),
    "cut short": (
        lambda f: [p.write_bytes(p.read_bytes()[:-1]) for p in f.glob("*.safetensors")],
        "cut short",
    ),
}


@pytest.mark.parametrize("name", CUT_DAMAGE)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_damaged_shards_are_named(source, tmp_path, name, dtype):
    damage, words = CUT_DAMAGE[name]
    folder = cut(source, tmp_path / "cut", 1, 2, "tp")
    ctx = ParallelContext.describe(1, tp_size=2)
    CPQwen3MoeForCausalLM.from_pretrained(folder, parallel_context=ctx, dtype=dtype)
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        CPQwen3MoeForCausalLM.from_pretrained(folder, parallel_context=ctx, dtype=dtype)
