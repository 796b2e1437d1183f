"""Damage wherever hypothesis puts it: an error that names it, or the values as they were."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.errors import CheckpointError, CommunicationError, InputError, Qwen3CPError
from qwen3cp.weights import CheckpointIndex, make_random, shard
from qwen3cp.weights.reader import FileReader
from qwen3cp.weights.safetensors_file import read_header
from tests.models import save_random
from tests.ranks import Ranks, context

INDEX = "model.safetensors.index.json"
MANIFEST = "qwen3cp-shards.json"
many = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Files(dict[str, bytes]):
    """Files of a folder, by name. hypothesis prints what a test is called with."""

    def __repr__(self) -> str:
        return f"Files of {len(self)}"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Of several small files."""
    folder = tmp_path_factory.mktemp("faults")
    sizes = dict(num_hidden_layers=1, num_experts=3, hidden_size=32, vocab_size=60)
    model = Qwen3MoeForCausalLM.from_pretrained(save_random(folder / "one", **sizes))
    model.save_pretrained(folder / "several", max_shard_size="40KB")
    return folder / "several"


@pytest.fixture(scope="module")
def files(source) -> Files:
    return Files({path.name: path.read_bytes() for path in source.iterdir()})


@pytest.fixture(scope="module")
def cut_files(source, tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("faults") / "cut"
    shard(str(source), folder, tp_size=2)
    return Files({path.name: path.read_bytes() for path in folder.iterdir()})


@contextlib.contextmanager
def folder_of(files: dict[str, bytes]):
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def load(folder: Path, tp: int = 1) -> dict[str, torch.Tensor]:
    ctx = ParallelContext.describe(0, tp_size=tp)
    model = CPQwen3MoeForCausalLM.from_pretrained(folder, parallel_context=ctx, dtype=torch.float32)
    return model.state_dict()


@pytest.fixture(scope="module")
def expected(source) -> dict[str, torch.Tensor]:
    return load(source)


def assert_refused_or_equal(files: dict[str, bytes], expected: dict[str, torch.Tensor]) -> None:
    with folder_of(files) as folder:
        try:
            found = load(folder)
        except Qwen3CPError as error:
            assert isinstance(error, CheckpointError), error
            return
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def weights_of(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


def header_bytes(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@many
@given(st.data())
def test_truncated_anywhere(files, data):
    name = data.draw(st.sampled_from(weights_of(files)))
    length = data.draw(st.integers(0, len(files[name]) - 1))
    with folder_of({**files, name: files[name][:length]}) as folder:
        with pytest.raises(CheckpointError, match=name):
            load(folder)


@many
@given(st.data())
def test_bytes_appended(files, data):
    name = data.draw(st.sampled_from(weights_of(files)))
    extra = data.draw(st.binary(min_size=1, max_size=20))
    with folder_of({**files, name: files[name] + extra}) as folder:
        with pytest.raises(CheckpointError, match=name):
            load(folder)


@settings(many, max_examples=250)
@given(st.data())
def test_header_bytes_flipped(files, expected, data):
    name = data.draw(st.sampled_from(weights_of(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header_bytes(files[name]) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    assert_refused_or_equal({**files, name: bytes(content)}, expected)


@many
@given(st.data())
def test_index_bytes_flipped(files, expected, data):
    content = bytearray(files[INDEX])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert_refused_or_equal({**files, INDEX: bytes(content)}, expected)


@settings(many, max_examples=100)
@given(st.data())
def test_any_byte_of_shards_flipped(cut_files, data):
    """Whatever rank 0 reads, the values are the right ones or it says so."""
    with folder_of(cut_files) as folder:
        right = load(folder, 2)
    name = data.draw(st.sampled_from([*weights_of(cut_files), MANIFEST, "config.json"]))
    content = bytearray(cut_files[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with folder_of({**cut_files, name: bytes(content)}) as folder:
        try:
            found = load(folder, 2)
        except Qwen3CPError as error:
            assert isinstance(error, CheckpointError), error
            return
    assert all(torch.equal(found[key], x) for key, x in right.items())


def rewrite(folder: Path, name: str, change: Any) -> None:
    """Changes the tensors of one file."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata={"format": "pt"})


@many
@given(st.data())
def test_a_tensor_dropped_renamed_reshaped_or_retyped(source, files, data):
    weight_map = json.loads(files[INDEX])["weight_map"]
    tensor = data.draw(st.sampled_from(sorted(weight_map)))
    how = data.draw(st.sampled_from(["drop", "rename", "reshape", "transpose", "integers"]))
    in_index = data.draw(st.booleans())
    new = f"{tensor}x"
    with folder_of(files) as folder:

        def change(tensors: dict[str, torch.Tensor]) -> None:
            x = tensors.pop(tensor)
            if how == "rename":
                tensors[new] = x
            elif how == "reshape":
                tensors[tensor] = x.reshape(-1)[:-1].clone()
            elif how == "transpose":
                tensors[tensor] = x.reshape(1, *x.shape)
            elif how == "integers":
                tensors[tensor] = x.view(torch.int32)

        rewrite(folder, weight_map[tensor], change)
        if in_index and how in ("drop", "rename"):
            index = json.loads(files[INDEX])
            file = index["weight_map"].pop(tensor)
            if how == "rename":
                index["weight_map"][new] = file
            (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=tensor.replace(".", r"\.")):
            load(folder)


@many
@given(st.data())
def test_two_files_swapped(files, data):
    first, second = data.draw(
        st.lists(st.sampled_from(weights_of(files)), min_size=2, max_size=2, unique=True)
    )
    swapped = {**files, first: files[second], second: files[first]}
    with (
        folder_of(swapped) as folder,
        pytest.raises(CheckpointError, match=r"model-0.*(has|lacks)"),
    ):
        load(folder)


def test_a_tensor_in_two_files(source, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    tensor, x = next(iter(load_file(tmp_path / names[0]).items()))
    rewrite(tmp_path, names[1], lambda tensors: tensors.update({tensor: x}))
    with pytest.raises(CheckpointError, match=rf"{names[1]} has {tensor}, .* into {names[0]}"):
        load(tmp_path)


def test_a_tensor_that_the_index_does_not_know(source, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    name = min(path.name for path in tmp_path.glob("*.safetensors"))
    rewrite(tmp_path, name, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=f"{name} has extra, which .* does not know"):
        load(tmp_path)


BROKEN_HEADERS = {
    "twice": ('{"a": %s, "a": %s}', "'a' is there twice"),
    "a gap": ('{"a": {"dtype": "U8", "shape": [7], "data_offsets": [1, 8]}}', "follows a gap"),
    "overlap": (
        '{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},'
        ' "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}',
        "overlaps",
    ),
    "too long": ('{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}', "cut short"),
    "too short": ('{"a": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}}', "tensors end"),
    "shape": ('{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 8]}}', "has 8 bytes"),
    "negative": ('{"a": {"dtype": "U8", "shape": [-8], "data_offsets": [0, 8]}}', r"shape \[-8\]"),
    "no number": ('{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 8]}}', "True"),
    "dtype": ('{"a": {"dtype": "U7", "shape": [8], "data_offsets": [0, 8]}}', "dtype 'U7'"),
    "entry": ('{"a": 3}', "a lacks dtype"),
    "list": ("[]", "not a JSON object"),
    "deep": ("[" * 100_000, "not JSON"),
    "metadata": ('{"__metadata__": 3}', "__metadata__"),
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_headers_that_do_not_describe_the_file(tmp_path, name):
    text, words = BROKEN_HEADERS[name]
    header = text.replace("%s", '{"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}').encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=f"{path}.*{words}"):
        read_header(path)


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=5,
    )
)
def test_headers_of_the_safetensors_library(tensors):
    values = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(values, path)
        header = read_header(path)
    assert {name: (x.dtype, list(x.shape)) for name, x in header.items()} == tensors


@pytest.mark.parametrize("where", ["../a.safetensors", "/a.safetensors", "..", "a/b.safetensors"])
def test_files_outside_the_folder(source, tmp_path, where):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / INDEX).read_text())
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = where
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{tensor} into .*, not in the folder"):
        CheckpointIndex.read(tmp_path)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_by_name(source, tmp_path, pickle):
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / pickle).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"not pickles such as {pickle}"):
        load(tmp_path)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / INDEX).read_text())
    tensor = next(iter(index["weight_map"]))
    index["weight_map"][tensor] = pickle
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{pickle}.*only safetensors"):
        load(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(source, tmp_path, monkeypatch):
    """After its header was checked: the read itself says so."""
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    name = max(path.name for path in tmp_path.glob("*.safetensors"))
    read = CheckpointIndex.read

    def read_then_shrink(folder: Path) -> CheckpointIndex:
        index = read(folder)
        os.truncate(folder / name, (folder / name).stat().st_size - 100)
        return index

    monkeypatch.setattr(CheckpointIndex, "read", read_then_shrink)
    with pytest.raises(CheckpointError, match=f"in .*{name} cannot be read: .*cut short"):
        load(tmp_path)


# ------------------------------------------------------------------------------- several ranks


def load_on_ranks(cp: int, tp: int, folders: list[Path], share: bool, how: str) -> tuple:
    """(error, message, seconds) of this rank, which loads its own folder."""
    ctx = context(cp, tp)
    if how == "unchecked":
        ctx = context(cp, tp, comm=CommConfig(check_plan=False))
    start = time.monotonic()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if how == "reading" and ctx.rank == 1:
                patch.setattr(FileReader, "read_into", fail_to_read)
            CPQwen3MoeForCausalLM.from_pretrained(
                folders[ctx.rank], parallel_context=ctx, dtype="float32", share_reads=share
            )
    except Qwen3CPError as error:
        return type(error), str(error), time.monotonic() - start
    return None, "", time.monotonic() - start


def fail_to_read(reader: Any, copies: Any) -> int:
    raise CheckpointError("the disk is broken")


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("how", ["header", "reading", "missing", "unchecked"])
def test_a_rank_that_fails_stops_all_with_its_reason(ranks, source, tmp_path, how, share):
    folders = [source] * 4
    words = "the disk is broken"
    if how in ("header", "unchecked"):
        folders[1] = Path(shutil.copytree(source, tmp_path / "damaged"))
        path = max(folders[1].glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
        words = "cut short"
    elif how == "missing":
        folders[1] = tmp_path / "nothing"
        words = "neither a folder nor a hub repository"
    outcomes = ranks(4).run(load_on_ranks, 2, 2, folders, share, how)
    for rank, (kind, message, seconds) in enumerate(outcomes):
        assert kind is CheckpointError and words in message, (rank, kind, message)
        assert message.startswith("rank 1 stopped this call") == (rank != 1)
        assert seconds < 60, "half of the timeout of a collective"


def test_ranks_that_load_different_models(ranks, source, tmp_path):
    other = save_random(tmp_path / "other", num_hidden_layers=1)
    folders = [source, other, source, source]
    for kind, message, _ in ranks(4).run(load_on_ranks, 2, 2, folders, True, "different"):
        assert kind is InputError and "ranks [1] were given other values of config" in message


def die_while_loading(cp: int, tp: int, path: Path, share: bool) -> tuple:
    ctx = context(cp, tp)
    if ctx.rank == 1:
        FileReader.read_into = lambda self, copies: os._exit(1)
    return load_on_ranks(cp, tp, [path, path], share, "dies")


@pytest.mark.parametrize("share", [False, True])
def test_a_rank_that_dies_while_loading(source, share):
    mine = Ranks(2)
    try:
        first, _ = mine.outcomes(die_while_loading, 2, 1, source, share)
    finally:
        mine.close()
    kind, message, seconds = first
    assert kind is CommunicationError and seconds < 60, message


# -------------------------------------------------------------------------------------- memory


LOAD_AND_WATCH = """
import sys, threading, time
import torch
from qwen3cp import CommConfig, CPQwen3MoeForCausalLM, ParallelContext

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10

folder, tp, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
ctx = ParallelContext.describe(0, tp_size=tp)
before, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, anonymous())
thread = threading.Thread(target=watch)
thread.start()
model = CPQwen3MoeForCausalLM.from_pretrained(folder, parallel_context=ctx, dtype=dtype)
stop.set()
thread.join()
print(max(peak, anonymous()) - before, model.load_report.parameter_bytes)
"""


@pytest.mark.slow
def test_memory_while_loading(tmp_path):
    """A checkpoint of 4.1 GB: the parameters, and little more, at TP 1 and for one rank of two."""
    import subprocess
    import sys

    sizes: dict[str, Any] = dict(
        vocab_size=32_000,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=68,
        num_experts_per_tok=8,
    )
    folder = tmp_path / "checkpoint"
    plan = make_random(Qwen3MoeConfig(**sizes), folder, max_shard_size="1GB")
    assert plan.num_bytes > 4e9
    try:
        for tp in (1, 2):
            done = subprocess.run(
                [sys.executable, "-c", LOAD_AND_WATCH, str(folder), str(tp), "bfloat16"],
                cwd=Path(__file__).parents[1],
                check=True,
                capture_output=True,
                text=True,
            )
            grown, held = map(int, done.stdout.split())
            assert plan.num_bytes / tp <= held <= plan.num_bytes / tp + 0.2e9
            assert grown <= held + 300e6, (tp, grown, held)
    finally:
        shutil.rmtree(folder)
