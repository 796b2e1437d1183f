"""Parameters of every rank, topology and form on disk, against slices of transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from accelerate import init_empty_weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qwen3cp import CPQwen3MoeForCausalLM, ParallelContext, collectives
from qwen3cp.config import local_experts
from qwen3cp.errors import CheckpointError, ParallelConfigError, UnsupportedConfigError
from qwen3cp.parallel import ForwardPhase
from qwen3cp.weights import parameter_layout, shard
from qwen3cp.weights.quantised import dequantise, scale_shape
from tests.models import save_random

Moe = Literal["tp", "ep"]
BLOCK = 128
TOPOLOGIES: list[tuple[int, int, Moe]] = [
    *((1, tp, moe) for tp in (1, 2, 4, 8) for moe in ("tp", "ep")),
    *((cp, tp, moe) for cp, tp in ((2, 1), (3, 2), (2, 4), (5, 1)) for moe in ("tp", "ep")),
]
FORMS = ["per expert", "fused", "fp8", "cut"]


def checkpoint_of(folder: Path, **overrides: Any) -> Path:
    """8 heads over 4 KV heads, a dense layer, biases, and sizes that blocks of 128 divide."""
    sizes = dict(
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=11,
        num_hidden_layers=2,
        attention_bias=True,
        mlp_only_layers=[1],
    )
    return save_random(folder, **{**sizes, **overrides})


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("forms") / "checkpoint")


def to_fp8(folder: Path, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """What an -FP8 release is: scaled blocks of the linear layers, the rest in bfloat16."""
    out.mkdir()
    weight_map = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, x in load_file(path).items():
            if not name.endswith("_proj.weight"):
                tensors[name] = x.to(dtype)
                continue
            grid = scale_shape(tuple(x.shape), (BLOCK, BLOCK))
            scales = torch.empty(grid)
            quantised = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
            for i in range(grid[0]):
                for j in range(grid[1]):
                    at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
                    scales[i, j] = x[at].abs().max() / 448
                    quantised[at] = (x[at] / scales[i, j]).to(torch.float8_e4m3fn)
            tensors[name], tensors[f"{name}_scale_inv"] = quantised, scales
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def references(source, tmp_path_factory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """For each form a folder, and transformers' parameters of it."""
    folder = tmp_path_factory.mktemp("references")
    plain = Qwen3MoeForCausalLM.from_pretrained(source, dtype=torch.float32)
    plain.save_pretrained(folder / "fused", save_original_format=False)
    # transformers' own dequantisation, which takes only tensors that blocks divide
    fp8 = Qwen3MoeForCausalLM.from_pretrained(
        to_fp8(source, folder / "fp8"),
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
    )
    parameters = {name: p.detach() for name, p in plain.named_parameters()}
    return {
        "per expert": (source, parameters),
        "fused": (folder / "fused", parameters),
        "fp8": (folder / "fp8", {name: p.detach() for name, p in fp8.named_parameters()}),
        "cut": (source, parameters),
    }


def slice_of(name: str, x: torch.Tensor, config: Any, ctx: ParallelContext) -> torch.Tensor:
    """This rank's part of a whole parameter, cut by hand."""
    tp, t, world = ctx.tp_size, ctx.tp_rank, ctx.cp_size * ctx.tp_size
    rank = ctx.cp_rank * tp + t
    if name == "lm_head.weight":
        size = math.ceil(config.vocab_size / world)
        return x[rank * size : (rank + 1) * size]
    if ".q_proj." in name:
        return x.chunk(tp)[t]
    if ".k_proj." in name or ".v_proj." in name:
        heads = x.view(config.num_key_value_heads, config.head_dim, -1)
        copies = max(1, tp // config.num_key_value_heads)
        return heads.repeat_interleave(copies, 0).chunk(tp)[t].reshape(-1, *x.shape[1:])
    if name.endswith("o_proj.weight"):
        return x.chunk(tp, 1)[t]
    if ".experts." in name:
        if ctx.moe == "ep":
            return x[rank * len(x) // world : (rank + 1) * len(x) // world]
        if name.endswith("gate_up_proj"):
            gate, up = x.chunk(2, 1)
            return torch.cat((gate.chunk(tp, 1)[t], up.chunk(tp, 1)[t]), 1)
        return x.chunk(tp, 2)[t]
    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return x.chunk(tp)[t]
    if name.endswith("mlp.down_proj.weight"):
        return x.chunk(tp, 1)[t]
    return x


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_parameters_are_slices_of_transformers(references, tmp_path, topology, form):
    cp, tp, moe = topology
    folder, whole = references[form]
    if form == "cut":
        folder = tmp_path / "cut"
        shard(str(references[form][0]), folder, cp_size=cp, tp_size=tp, moe=moe)
    for rank in range(cp * tp):
        ctx = ParallelContext.describe(rank, cp_size=cp, tp_size=tp, moe=moe)
        model = CPQwen3MoeForCausalLM.from_pretrained(
            folder, parallel_context=ctx, dtype=torch.float32
        )
        ours = dict(model.named_parameters())
        assert ours.keys() == whole.keys()
        for name, parameter in ours.items():
            expected = slice_of(name, whole[name], model.config, ctx)
            assert parameter.dtype == torch.float32 and torch.equal(parameter, expected), name
        report = model.load_report
        assert report is not None
        assert report.parameter_bytes == sum(p.nbytes for p in ours.values())
        if form != "fp8":
            assert report.bytes_read == report.parameter_bytes
        else:  # one byte an element, two where it is not quantised, and the scales
            assert 0.25 < report.bytes_read / report.parameter_bytes < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_other_dtypes_are_cast(source, tmp_path, stored, dtype):
    """As torch casts: every second tensor is stored in another dtype."""
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    tensors = {n: x.to(stored) if i % 2 else x for i, (n, x) in enumerate(sorted(tensors.items()))}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    ctx = ParallelContext.describe(1, tp_size=2)
    model = CPQwen3MoeForCausalLM.from_pretrained(tmp_path, parallel_context=ctx, dtype=dtype)
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            expected = slice_of(name, tensors[name], model.config, ctx).to(dtype)
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("tp", "moe"), [(1, "tp"), (2, "tp"), (4, "tp"), (3, "ep")])
def test_float8_slices_that_blocks_do_not_divide(tmp_path, tp, moe, fused):
    """Widths of 200 and 328: edge blocks are cut off, slices start inside blocks."""
    num_heads = 6 if tp == 3 else 4
    plain = checkpoint_of(
        tmp_path / "plain",
        hidden_size=200,
        moe_intermediate_size=328,
        intermediate_size=132,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2 if tp != 3 else 3,
        num_experts=3,
    )
    folder = to_fp8(plain, tmp_path / "fp8")
    whole = {}
    for path in folder.glob("*.safetensors"):
        whole |= load_file(path)
    if fused:
        fuse_fp8(folder, whole)
    values = {}
    for name, x in whole.items():
        scales = whole.get(f"{name}_scale_inv")
        if scales is not None:
            grid = scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
            x = x.float() * grid[..., : x.shape[-2], : x.shape[-1]]
        values[name] = x
    for rank in range(tp):
        ctx = ParallelContext.describe(rank, tp_size=tp, moe=moe)
        model = CPQwen3MoeForCausalLM.from_pretrained(
            folder, parallel_context=ctx, dtype=torch.bfloat16
        )
        for name, parameter in model.named_parameters():
            if ".experts." in name and not fused:
                prefix = name.rsplit(".", 1)[0]
                parts = []
                for e in range(3):
                    gate, up, down = (
                        values[f"{prefix}.{e}.{x}_proj.weight"] for x in ("gate", "up", "down")
                    )
                    parts.append(torch.cat((gate, up)) if "gate_up" in name else down)
                x = torch.stack(parts)
            else:
                x = values[name]
            expected = slice_of(name, x, model.config, ctx).to(torch.bfloat16)
            assert torch.equal(parameter, expected), name


def fuse_fp8(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Experts in one float8 tensor, whose blocks lie across the border of gate and up."""
    prefix = "model.layers.0.mlp.experts"
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("gate_up_proj", (3, 656, 200)), ("down_proj", (3, 200, 328))):
        for old in [n for n in tensors if n.startswith(f"{prefix}.") and ".weight" in n]:
            del tensors[old]
        values = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scales = torch.rand(scale_shape(shape, (BLOCK, BLOCK)), generator=generator)
        tensors[f"{prefix}.{name}"], tensors[f"{prefix}.{name}_scale_inv"] = values, scales
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


@given(st.data())
def test_dequantise_any_window(data):
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    block = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 16))
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    bottom = data.draw(st.integers(top + 1, rows))
    right = data.draw(st.integers(left + 1, columns))
    x = torch.arange(rows * columns).view(rows, columns).remainder(15).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_shape((rows, columns), block))
    got = dequantise(x[top:bottom, left:right], scales, block, top, left)
    for i in range(top, bottom):
        for j in range(left, right):
            scale = scales[i // block[0], j // block[1]]
            assert got[i - top, j - left] == x[i, j].float() * scale


# -------------------------------------------------------------------------------------- layout


@given(st.integers(0, 300), st.integers(1, 40))
def test_experts_are_divided_without_gaps(num_experts, world_size):
    parts = [local_experts(num_experts, rank, world_size) for rank in range(world_size)]
    assert [e for part in parts for e in part] == list(range(num_experts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


FULL_SIZES: dict[str, Any] = {
    "30B": (
        dict(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32),
        dict(intermediate_size=6144, moe_intermediate_size=768),
        18_867,
        30_532_122_624,
    ),
    "235B": (
        dict(hidden_size=4096, num_hidden_layers=94, num_attention_heads=64),
        dict(intermediate_size=12288, moe_intermediate_size=1536),
        36_945,
        235_093_634_560,
    ),
}


@pytest.mark.parametrize("size", FULL_SIZES)
@pytest.mark.parametrize("topology", [(1, 1, "tp"), (2, 4, "tp"), (3, 8, "ep")], ids=str)
def test_full_size_names_and_shapes_on_meta(size, topology):
    one, two, num_tensors, num_parameters = FULL_SIZES[size]
    sizes: dict[str, Any] = dict(
        vocab_size=151936,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        **one,
        **two,
    )
    config = Qwen3MoeConfig(**sizes)
    cp, tp, moe = topology
    covered, layout = 0, []
    sources: dict[str, tuple[int, ...]] = {}
    for rank in range(cp * tp):
        ctx = ParallelContext.describe(rank, cp_size=cp, tp_size=tp, moe=moe)
        layout = parameter_layout(config, ctx)
        sources |= {piece.source: piece.shape for p in layout for piece in p.pieces}
        covered += sum(p.numel for p in layout)
        assert all(p.numel == sum(piece.numel for piece in p.pieces) for p in layout)
        if rank in (0, cp * tp - 1):
            with init_empty_weights():
                model = CPQwen3MoeForCausalLM(config, parallel_context=ctx)
            shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
            assert {p.name: p.shape for p in layout} == shapes
    assert len(sources) == num_tensors
    assert sum(map(math.prod, sources.values())) == num_parameters
    if topology == (1, 1, "tp"):
        assert covered == num_parameters
        with torch.device("meta"):
            theirs = Qwen3MoeForCausalLM(config)
        shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert {p.name: p.shape for p in layout} == shapes


def test_numbers_of_the_page_on_weights():
    """Bytes to read, computed by hand: two bytes an element, down_proj and o_proj by columns."""
    text = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    hidden, vocab, layers, tp = 2048, 151936, 48, 4
    whole = vocab * hidden + hidden + layers * (2 * hidden + 2 * 128 + 128 * hidden)
    by_rows = vocab * hidden + layers * (4096 + 2 * 512 + 128 * 2 * 768) * hidden
    by_columns = layers * (4096 + 128 * 768) * hidden
    read = 2 * (whole + (by_rows + by_columns) // tp)
    assert f"a rank copies {read / 1e9:.2f} GB" in text
    after_the_last = layers * (4096 + 128 * 768) * (tp - 1) // tp  # of the last row's columns
    spanned = 2 * (whole + by_rows // tp + by_columns - after_the_last)
    assert f"out of {spanned / 1e9:.2f} GB" in text


def test_keys_and_values_share_a_storage(source):
    model = CPQwen3MoeForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for layer in cast(Any, model.model.layers):
        key, value = layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight
        assert key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
        assert value.data_ptr() == key.data_ptr() + key.nbytes


# ---------------------------------------------------------------------------- described ranks


def test_a_described_rank_cannot_run():
    ctx = ParallelContext.describe(3, cp_size=2, tp_size=2, moe="ep")
    assert (ctx.cp_rank, ctx.tp_rank, ctx.rank, ctx.world_size) == (1, 1, 3, 4)
    with pytest.raises(ParallelConfigError, match="no process groups"):
        with ctx.forward(ForwardPhase.DECODE):
            pass
    for call in (
        lambda: collectives.all_reduce(torch.ones(2, 4), ctx),
        lambda: collectives.all_reduce_world(torch.ones(2, 4), ctx, "all_reduce"),
        lambda: collectives.kv_gather(torch.ones(2, 1, 4), ctx, split=True),
    ):  # as layers that are called by hand would
        with pytest.raises(ParallelConfigError, match="no process groups"):
            call()
    with pytest.raises(ParallelConfigError, match="rank=4 is not in 0..3"):
        ParallelContext.describe(4, cp_size=2, tp_size=2)


def test_whole_experts_need_no_width_that_tp_divides(tmp_path):
    path = checkpoint_of(tmp_path / "odd", moe_intermediate_size=33)
    with pytest.raises(ParallelConfigError, match="moe_intermediate_size = 33"):
        CPQwen3MoeForCausalLM.from_pretrained(
            path, parallel_context=ParallelContext.describe(0, tp_size=2)
        )
    ctx = ParallelContext.describe(0, tp_size=2, moe="ep")
    model = CPQwen3MoeForCausalLM.from_pretrained(path, parallel_context=ctx, dtype="float32")
    assert cast(Any, model.model.layers[0]).mlp.experts.gate_up_proj.shape == (5, 66, 128)


def test_a_float8_checkpoint_is_saved_as_what_it_became(references, tmp_path):
    model = CPQwen3MoeForCausalLM.from_pretrained(references["fp8"][0], dtype="float32")
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    saved = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert saved.dtype == torch.float32
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, references["fp8"][1][name]), name


# ------------------------------------------------------------------------------ refused forms


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "compressed-tensors", "bitsandbytes", "ascend", "fbgemm_fp8"]
)
def test_quantised_forms_are_refused_by_name(source, tmp_path, method):
    edit_config(copied(source, tmp_path), quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedConfigError, match=rf"\({method}\).*block-wise FP8"):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "form"),
    [(".qweight", "GPTQ"), (".weight_packed", "compressed"), (".weight_offset", "W8A8")],
)
def test_quantised_tensors_are_refused_by_name(source, tmp_path, suffix, form):
    copied(source, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name.removesuffix(".weight") + suffix] = tensors.pop(name).to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedConfigError, match=rf"q_proj{suffix}.*{form}.*what loads"):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(weight_block_size=None), UnsupportedConfigError, "weight_block_size None"),
        (dict(activation_scheme="static"), UnsupportedConfigError, "static"),
        (dict(weight_block_size=[64, 64]), CheckpointError, "_scale_inv .* shape"),
    ],
)
def test_other_float8_forms_are_refused(references, tmp_path, change, error, words):
    copied(references["fp8"][0], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path, quantization_config={**config, **change})
    with pytest.raises(error, match=words):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path)


def test_float8_needs_its_scales(references, tmp_path):
    copied(references["fp8"][0], tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}.* has no {name}_scale_inv"):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(CheckpointError, match="float8"):
        CPQwen3MoeForCausalLM.from_pretrained(tmp_path)


def copied(source: Path, target: Path) -> Path:
    """The checkpoint in one file, which tests can change."""
    tensors = {}
    for path in source.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target
