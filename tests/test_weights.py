"""Loading: bit-exact slices of every form, nothing missing or left over, damage named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext
from qwen3cp.errors import CheckpointError, InputError, Qwen3CPError, UnsupportedConfigError
from qwen3cp.weights import CheckpointIndex
from tests.models import load, save_random
from tests.ranks import context, run

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Biases, a dense layer, fewer KV heads than TP ranks, a vocabulary that does not divide."""
    return save_random(
        tmp_path_factory.mktemp("weights") / "checkpoint",
        attention_bias=True,
        mlp_only_layers=[1],
    )


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def expected_share(whole: dict[str, torch.Tensor], cp_rank: int, cp: int, tp_rank: int, tp: int):
    """What a rank must hold, cut by hand out of transformers' parameters."""
    heads, kv_heads, head_dim, experts_width, dense_width = 4, 2, 64, 48, 64

    def rows(x: torch.Tensor, parts: int, part: int) -> torch.Tensor:
        return x.chunk(parts, 0)[part]

    share = {}
    for name, x in whole.items():
        if name == "lm_head.weight":
            size = -(-len(x) // (cp * tp))
            rank = cp_rank * tp + tp_rank
            x = x[rank * size : (rank + 1) * size]
        elif ".q_proj." in name:
            x = rows(x, tp, tp_rank)
        elif ".k_proj." in name or ".v_proj." in name:
            by_head = x.view(kv_heads, head_dim, -1)
            if tp <= kv_heads:
                mine = by_head[tp_rank * kv_heads // tp : (tp_rank + 1) * kv_heads // tp]
            else:
                mine = by_head[tp_rank * kv_heads // tp][None]
            x = mine.reshape(-1, *x.shape[1:])
        elif name.endswith("o_proj.weight"):
            width = heads * head_dim // tp
            x = x[:, tp_rank * width : (tp_rank + 1) * width]
        elif name.endswith("experts.gate_up_proj"):
            gate, up = x[:, :experts_width], x[:, experts_width:]
            width = experts_width // tp
            part = slice(tp_rank * width, (tp_rank + 1) * width)
            x = torch.cat((gate[:, part], up[:, part]), 1)
        elif name.endswith("experts.down_proj"):
            width = experts_width // tp
            x = x[:, :, tp_rank * width : (tp_rank + 1) * width]
        elif name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
            x = rows(x, tp, tp_rank)
        elif name.endswith("mlp.down_proj.weight"):
            width = dense_width // tp
            x = x[:, tp_rank * width : (tp_rank + 1) * width]
        share[name] = x
    return share


def compare_parameters(cp: int, tp: int, path: Path, whole: dict[str, torch.Tensor]) -> int:
    model = load(path, cp, tp)
    ctx = model.parallel_context
    expected = expected_share(whole, ctx.cp_rank, cp, ctx.tp_rank, tp)
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert torch.equal(parameter, expected[name]), name
    assert model.config.num_attention_heads == 4, "the config stays that of the whole model"
    return sum(p.numel() for p in ours.values())


@pytest.mark.parametrize("form", ["per expert", "fused"])
@pytest.mark.parametrize("topology", [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (4, 1)], ids=str)
def test_parameters_are_slices_of_transformers(ranks, source, tmp_path, topology, form):
    reference = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32)
    whole = {name: p.detach() for name, p in reference.named_parameters()}
    path = source
    if form == "fused":
        path = tmp_path / "fused"
        reference.save_pretrained(path, save_original_format=False)
        names = CheckpointIndex.read(path).file_of
        assert "model.layers.0.mlp.experts.gate_up_proj" in names
    run(ranks, topology, compare_parameters, path, whole)


def bytes_read(cp: int, tp: int, path: Path) -> tuple[int, int, int]:
    """(bytes read, bytes of the parameters by the loader's account, and by ours)"""
    model = CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=context(cp, tp), dtype=torch.float32
    )
    report = model.load_report
    assert report is not None
    return report.bytes_read, report.parameter_bytes, sum(p.nbytes for p in model.parameters())


def test_a_rank_reads_exactly_its_parameters(ranks, source):
    results = ranks(4).run(bytes_read, 2, 2, source)
    assert all(read == counted == held for read, counted, held in results)
    whole = sum(p.nbytes for p in Qwen3MoeForCausalLM.from_pretrained(source).parameters())
    assert all(held < 0.75 * whole for _, _, held in results)


def load_sharing(cp: int, tp: int, path: Path, moe: str) -> tuple[int, int, int, int]:
    """(bytes read, received, of the parameters, of those that no other CP rank holds)"""
    ctx = context(cp, tp, moe=moe)
    model = CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=ctx, dtype=torch.float32, share_reads=True
    )
    alone = ParallelContext.describe(ctx.rank, cp_size=cp, tp_size=tp, moe=ctx.moe)
    expected = CPQwen3MoeForCausalLM.from_pretrained(
        path, parallel_context=alone, dtype=torch.float32
    )
    own = 0
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        if name == "lm_head.weight" or (moe == "ep" and ".experts." in name):
            own += ours.nbytes
    report = model.load_report
    assert report is not None
    return report.bytes_read, report.bytes_received, report.parameter_bytes, own


@pytest.mark.parametrize("moe", ["tp", "ep"])
@pytest.mark.parametrize("topology", [(2, 1), (4, 1), (2, 2)], ids=str)
def test_shared_reads_take_every_byte_once(ranks, source, topology, moe):
    cp, tp = topology
    told = run(ranks, topology, load_sharing, source, moe)
    assert all(read + received == held for read, received, held, _ in told)
    for tp_rank in range(tp):
        column = told[tp_rank::tp]
        shared = column[0][2] - column[0][3]
        assert sum(read - own for read, _, _, own in column) == shared
        assert max(read - own for read, _, _, own in column) < 1.7 * shared / cp, "evenly"


def test_tied_head_shares_the_embeddings_storage(tmp_path):
    path = save_random(tmp_path / "tied", tie_word_embeddings=True)
    model = CPQwen3MoeForCausalLM.from_pretrained(path, dtype="float32")
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert head.data_ptr() == embedding.data_ptr()
    assert torch.equal(head, embedding)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        ("torch.bfloat16", torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype_argument(checkpoint, given, expected):
    model = CPQwen3MoeForCausalLM.from_pretrained(checkpoint, dtype=given)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.dtype == expected
    assert not model.training


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def file_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


GATE = "model.layers.0.mlp.experts.3.gate_proj.weight"


def drop_tensor_and_name(folder: Path) -> None:
    edit_tensors(file_of(folder, GATE), lambda t: t.pop(GATE))
    edit_json(folder / INDEX, lambda v: v["weight_map"].pop(GATE))


def reshape(folder: Path) -> None:
    edit_tensors(file_of(folder, GATE), lambda t: t.update({GATE: t[GATE][:-1].clone()}))


def retype(folder: Path) -> None:
    edit_tensors(file_of(folder, GATE), lambda t: t.update({GATE: t[GATE].to(torch.int8)}))


def truncate(folder: Path) -> None:
    path = file_of(folder, GATE)
    path.write_bytes(path.read_bytes()[:-1000])


def add_tensor(folder: Path) -> None:
    edit_json(folder / INDEX, lambda v: v["weight_map"].update(extra="a.safetensors"))
    save_file({"extra": torch.zeros(1)}, folder / "a.safetensors")


def add_layer(folder: Path) -> None:
    edit_json(folder / "config.json", lambda v: v.update(num_hidden_layers=4))


def leave_folder(folder: Path) -> None:
    edit_json(folder / INDEX, lambda v: v["weight_map"].update({GATE: "../a.safetensors"}))


def other_head_dim(folder: Path) -> None:
    edit_json(folder / "config.json", lambda v: v.update(head_dim=128))


def head_dim_left_out(folder: Path) -> None:
    """transformers then takes hidden_size / heads = 24, which the checkpoint was not made with."""
    edit_json(folder / "config.json", lambda v: v.pop("head_dim"))


DAMAGE = {
    "shard missing": (
        lambda f: file_of(f, GATE).unlink(),
        CheckpointError,
        "lacks files of its index: model-0",
    ),
    "tensor missing": (drop_tensor_and_name, CheckpointError, GATE),
    "tensor missing in its file": (
        lambda f: edit_tensors(file_of(f, GATE), lambda t: t.pop(GATE)),
        CheckpointError,
        f"lacks tensors of the index: {GATE}",
    ),
    "tensor unexpected": (add_tensor, CheckpointError, "no place for: extra"),
    "misshaped": (reshape, CheckpointError, r"gate_proj.* has the shape \(47, 96\).*\(48, 96\)"),
    "integers": (retype, CheckpointError, "gate_proj.* is torch.int8"),
    "truncated": (truncate, CheckpointError, "cannot be read as safetensors"),
    "more layers than tensors": (add_layer, CheckpointError, "lacks .*model.layers.3"),
    "outside the folder": (leave_folder, CheckpointError, "not in the folder"),
    "another head_dim": (other_head_dim, CheckpointError, "has the shape"),
    "no head_dim": (head_dim_left_out, UnsupportedConfigError, "head_dim is 24"),
    "index is no JSON": (
        lambda f: (f / INDEX).write_text("{"),
        CheckpointError,
        "not a safetensors index",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "no config.json"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        CheckpointError,
        "not JSON",
    ),
    "another model": (
        lambda f: edit_json(f / "config.json", lambda v: v.update(model_type="qwen3")),
        UnsupportedConfigError,
        "model_type 'qwen3'",
    ),
    "quantised": (
        lambda f: edit_json(
            f / "config.json", lambda v: v.update(quantization_config={"quant_method": "gptq"})
        ),
        UnsupportedConfigError,
        "gptq",
    ),
    "sliding window": (
        lambda f: edit_json(
            f / "config.json", lambda v: v.update(use_sliding_window=True, sliding_window=64)
        ),
        UnsupportedConfigError,
        "use_sliding_window",
    ),
    "no weights": (
        lambda f: [p.unlink() for p in (*f.glob("*.safetensors"), f / INDEX)],
        CheckpointError,
        "only safetensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(copy, name):
    damage, error, words = DAMAGE[name]
    damage(copy)
    with pytest.raises(error, match=words):
        CPQwen3MoeForCausalLM.from_pretrained(copy, dtype="float32")


def test_the_index_is_trusted_over_the_folder(copy):
    """A stale shard beside the index does not count."""
    save_file({GATE: torch.zeros(1)}, copy / "model-00099-of-00099.safetensors")
    CPQwen3MoeForCausalLM.from_pretrained(copy, dtype="float32")


def test_a_single_file_needs_no_index(copy, source):
    tensors = {}
    for path in copy.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (copy / INDEX).unlink()
    tensors["model.rotary_emb.inv_freq"] = torch.zeros(32)  # old checkpoints hold it
    save_file(tensors, copy / "model.safetensors")
    ours = CPQwen3MoeForCausalLM.from_pretrained(copy, dtype="float32").state_dict()
    expected = CPQwen3MoeForCausalLM.from_pretrained(source, dtype="float32").state_dict()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(dtype=torch.float16), UnsupportedConfigError, "float16"),
        (dict(dtype="float99"), InputError, "float99"),
        (dict(device_map="auto"), InputError, "device_map"),
    ],
)
def test_wrong_arguments(checkpoint, options, error, words):
    with pytest.raises(error, match=words):
        CPQwen3MoeForCausalLM.from_pretrained(checkpoint, **options)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a hub repository"):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        CPQwen3MoeForCausalLM.from_pretrained("nobody/nothing", local_files_only=True)


def load_where_one_rank_fails(path: Path, damaged: Path) -> tuple[str, str]:
    ctx = context(2, 1)
    try:
        CPQwen3MoeForCausalLM.from_pretrained(
            damaged if ctx.rank == 1 else path, parallel_context=ctx, dtype=torch.float32
        )
    except Qwen3CPError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def test_a_rank_that_fails_to_load_stops_all(ranks, source, copy):
    truncate(copy)
    first, second = ranks(2).run(load_where_one_rank_fails, source, copy)
    assert first[0] == second[0] == "CheckpointError"
    assert first[1].startswith("rank 1 stopped this call") and "safetensors" in first[1]
