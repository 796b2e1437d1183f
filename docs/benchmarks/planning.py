"""The tables of docs/planning.md: predicted times of both models on 4 to 32 dies of an A3.

    python docs/benchmarks/planning.py [OUTPUT]

Takes some minutes of one core, and no weights. Everything is predicted from dry runs.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm
from transformers import Qwen3MoeConfig

from qwen3cp.parallel import CommConfig
from qwen3cp.planner.calibrate import calibrate, evaluate, published_points, run_point
from qwen3cp.planner.cost import SPLIT, fit, predict
from qwen3cp.planner.dry_run import dry_run
from qwen3cp.planner.hardware import HARDWARE, Efficiencies
from qwen3cp.planner.models import KNOWN_MODELS, known_config
from qwen3cp.planner.search import CHUNKS, Layout, layouts
from qwen3cp.planner.topology import Topology, why_illegal

MODELS = {"30B": KNOWN_MODELS[0], "235B": KNOWN_MODELS[1]}
PROMPTS = {"8k": 2**13, "32k": 2**15, "128k": 2**17, "256k": 2**18, "1M": 2**20}
DEVICES = (4, 8, 16, 32)
A3 = HARDWARE["a3"]
GIB, MIB = 2**30, 2**20
# dense, of the model of SGLang pull request 20520, as a Qwen3-MoE with no layer of experts
QWEN3_32B = cast(Any, Qwen3MoeConfig)(
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    mlp_only_layers=list(range(64)),
    decoder_sparse_step=1,
)

Row = dict[str, Any]


def config_of(name: str) -> Qwen3MoeConfig:
    config = known_config(MODELS[name])
    assert config is not None
    return config


def cell(name: str, layout: Layout, prompt: int, models: dict) -> Row:
    """With the largest chunks that fit; the least that is needed where none do."""
    row: Row = {"model": name, **asdict(layout), "prompt": prompt}
    topology = Topology(cp_size=layout.cp_size, tp_size=layout.tp_size, moe=layout.moe)
    illegal = why_illegal(config_of(name), topology)
    if illegal is not None:
        return {**row, "refused": illegal}
    sizes = [prompt, *(c for c in CHUNKS if c < prompt)]
    while True:
        chunk = sizes.pop(0)
        run = dry_run(
            config_of(name),
            prompt=prompt,
            chunk=chunk,
            cp_size=layout.cp_size,
            tp_size=layout.tp_size,
            moe=layout.moe,
            ranks="busiest",
            layers="distinct",
            chunks="ends",
            models=models,
        )
        room = fit(run, A3)
        if room.fits or not sizes:
            break
        if room.needed_bytes - room.peak_activation_bytes > room.usable_bytes:
            sizes = sizes[-1:]  # no chunk is small enough: say what the smallest needs
    if not room.fits:
        return {**row, "chunk": chunk, "gib": room.needed_bytes / GIB, "refused": room.reason}
    prediction = predict(run, A3)
    received = [s.collective_bytes for s in run.ranks[0].steps if s.phase == "prefill"]
    return {
        **row,
        "chunk": chunk,
        "gib": room.needed_bytes / GIB,
        "ttft": prediction.ttft_seconds,
        "tpot": prediction.tpot_seconds,
        "split": prediction.split(),
        "received_mib_a_layer": sum(received) / MIB / config_of(name).num_hidden_layers,
    }


def cells() -> Iterator[tuple[str, Layout, int]]:
    for name in MODELS:
        for devices in (1, 2, *DEVICES):
            for layout in layouts(devices):
                for prompt in PROMPTS.values() if devices in DEVICES else [PROMPTS["128k"]]:
                    yield name, layout, prompt


def published() -> dict[str, Any]:
    """With the defaults; and with attention fitted to both points of the 30B together."""
    points = published_points()
    runs = [run_point(point) for point in points]
    fitted = calibrate(points, ["attention"], observe="ttft", runs=runs)
    rows = []
    for error in evaluate(points, runs=runs):
        after = next(
            (
                e.error
                for e in fitted.after
                if e.point == error.point and e.quantity == error.quantity
            ),
            None,
        )
        rows.append(
            {
                "name": error.point.title,
                "hardware": error.point.hardware,
                "quantity": error.quantity,
                "source": error.point.source,
                "mark": error.point.mark,
                "note": error.point.note,
                "assumed": error.point.assumed,
                "weights": error.point.weights,
                "measured": error.measured,
                "predicted": error.predicted,
                "error": error.error,
                "error_fitted": after,
            }
        )
    return {"rows": rows, "fitted_attention": fitted.efficiencies.attention}


def int8_gain() -> Row:
    """How much faster the sums of SGLang pull request 20520 make a prefill on two NPUs of an A2."""
    times = {}
    for form in ("exact", "int8_one_shot"):
        comm = CommConfig(all_reduce=form)
        run = dry_run(
            QWEN3_32B,
            prompt=4096,
            tp_size=2,
            comm=comm,
            ranks="busiest",
            layers="distinct",
            decode=False,
        )
        prediction = predict(run, HARDWARE["a2"])
        times[form] = {"ttft": prediction.ttft_seconds, "split": prediction.split()}
    exact, int8 = (times[form]["ttft"] for form in times)
    packing = times["int8_one_shot"]["split"]["packing"]
    # with one pass over each tensor, 5 + 3n bytes for each value
    memory = HARDWARE["a2"].hbm_bytes_per_second * Efficiencies().memory
    fused = 2 * 64 * 4096 * 5120 * (5 + 3 * 2) / memory
    return {
        "exact": exact,
        "int8": int8,
        "gain": exact / int8 - 1,
        "gain_fewer_passes": exact / (int8 - packing + fused) - 1,
        "packing": packing,
    }


def measure() -> dict[str, Any]:
    models: dict[str, dict] = {name: {} for name in MODELS}
    rows = [cell(*where, models[where[0]]) for where in tqdm(list(cells()), leave=False)]
    return {
        "efficiencies": Efficiencies().to_dict(),
        "hardware": A3.to_dict(),
        "published": published(),
        "int8_gain": int8_gain(),
        "cells": rows,
    }


# ---------------------------------------------------------------------------------------- tables


def seconds(value: float) -> str:
    """Three digits."""
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.0f}"
        if (value >= 100)
        else f"{value:.1f}"
    )


def best_of(results: Mapping[str, Any], **wanted: Any) -> Row | None:
    """The faster of experts cut and experts divided, of those that can run."""
    found = [
        row
        for row in results["cells"]
        if all(row[k] == v for k, v in wanted.items()) and "ttft" in row
    ]
    return min(found, key=lambda row: row["ttft"], default=None)


def times_table(results: Mapping[str, Any], model: str) -> str:
    """Of every CP x TP: the best of each column among as many dies is bold."""
    lines = [
        "| dies | CP x TP | " + " | ".join(PROMPTS) + " |",
        "|---|---|" + "---|" * len(PROMPTS),
    ]
    for devices in DEVICES:
        sizes = sorted({(x.cp_size, x.tp_size) for x in layouts(devices)})
        table = {
            (size, prompt): best_of(
                results, model=model, cp_size=size[0], tp_size=size[1], prompt=prompt
            )
            for size in sizes
            for prompt in PROMPTS.values()
        }
        for size in sizes:
            texts = []
            for prompt in PROMPTS.values():
                row = table[size, prompt]
                if row is None:
                    texts.append("no room")
                    continue
                column = [r["ttft"] for (_, p), r in table.items() if p == prompt and r]
                text = seconds(row["ttft"])
                text = f"**{text}**" if row["ttft"] == min(column) else text
                texts.append(text + (" e" if row["moe"] == "ep" else ""))
            lines.append(f"| {devices} | {size[0]} x {size[1]} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def scaling_table(results: Mapping[str, Any], model: str) -> str:
    """CP 1 to 32 and TP 1 to 32 at 128k: seconds, and MiB that a rank receives in a layer."""
    lines = [
        "| dies, n | CP n x TP 1, s | CP n/4 x TP 4, s | CP 1 x TP n, s | "
        "CP n x TP 1, MiB | CP n/4 x TP 4, MiB | CP 1 x TP n, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for devices in (1, 2, *DEVICES):
        times, received = [], []
        for cp, tp in ((devices, 1), (devices // 4, 4), (1, devices)):
            row = best_of(results, model=model, cp_size=cp, tp_size=tp, prompt=PROMPTS["128k"])
            if not cp:
                times.append("")
                received.append("")
            elif row is None:
                times.append("no room")
                received.append("")
            else:
                times.append(seconds(row["ttft"]) + (" e" if row["moe"] == "ep" else ""))
                received.append(f"{row['received_mib_a_layer']:,.0f}")
        lines.append(f"| {devices} | " + " | ".join([*times, *received]) + " |")
    return "\n".join(lines)


def split_table(results: Mapping[str, Any], model: str, devices: int, prompt: str) -> str:
    """What the time of every CP x TP is made of, in seconds."""
    lines = [
        "| CP x TP | experts | chunk | " + " | ".join(SPLIT) + " | all | GiB a rank |",
        "|---|---|---|" + "---|" * (len(SPLIT) + 2),
    ]
    for size in sorted({(x.cp_size, x.tp_size) for x in layouts(devices)}):
        for moe in ("tp", "ep"):
            row = best_of(
                results,
                model=model,
                cp_size=size[0],
                tp_size=size[1],
                prompt=PROMPTS[prompt],
                moe=moe,
            )
            if row is None:
                continue
            parts = [f"{row['split'][name]:.2f}" for name in SPLIT]
            lines.append(
                f"| {size[0]} x {size[1]} | {moe} | {row['chunk']:,} | "
                + " | ".join([*parts, f"{row['ttft']:.2f}", f"{row['gib']:.1f}"])
                + " |"
            )
    return "\n".join(lines)


def room_table(results: Mapping[str, Any]) -> str:
    """Whether the models fit, in GiB of the fullest rank; the smallest of all CP x TP."""
    lines = [
        "| model | tokens | " + " | ".join(f"{n} dies" for n in DEVICES) + " |",
        "|---|---|" + "---|" * len(DEVICES),
    ]
    for model, prompt in (("30B", "256k"), ("30B", "1M"), ("235B", "128k"), ("235B", "1M")):
        texts = []
        for devices in DEVICES:
            rows = [
                r
                for r in results["cells"]
                if r["model"] == model
                and r["prompt"] == PROMPTS[prompt]
                and r["cp_size"] * r["tp_size"] == devices
                and "gib" in r
            ]
            least = min(rows, key=lambda r: r["gib"])
            fits = "" if "ttft" in least else ", no room"
            texts.append(
                f"{least['gib']:.1f}{fits} ({least['cp_size']} x {least['tp_size']}, "
                f"{least['moe']})"
            )
        lines.append(f"| {model} | {prompt} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def points_table(results: Mapping[str, Any], kind: str) -> str:
    """kind: bfloat16, assumed, w8a8 or tpot."""
    rows = []
    for row in results["published"]["rows"]:
        of = "tpot" if row["quantity"] == "tpot" else row["weights"]
        of = of or ("assumed" if row["assumed"] else "bfloat16")
        if of == kind:
            rows.append(row)
    fitted = kind == "bfloat16"
    lines = ["| point | machine | published, s | predicted, s | error |"]
    lines[0] += " error, attention fitted |" if fitted else ""
    lines.append("|---|---|---|---|---|" + ("---|" if fitted else ""))
    for row in rows:
        line = (
            f"| {row['name']} ({row['source']}) | {row['hardware'].upper()} | "
            f"{seconds(row['measured'])} | {seconds(row['predicted'])} | {row['error']:+.1%} |"
        )
        lines.append(line + (f" {row['error_fitted']:+.1%} |" if fitted else ""))
    return "\n".join(lines)


def efficiencies_table(results: Mapping[str, Any]) -> str:
    lines = ["| efficiency | default | of what |", "|---|---|---|"]
    for name, value in results["efficiencies"].items():
        lines.append(f"| `{name}` | {value:g} | {Efficiencies.unit(name)} |")
    return "\n".join(lines)


def sentences(results: Mapping[str, Any]) -> dict[str, str]:
    """Numbers in the text of the page."""
    gain = results["int8_gain"]
    return {
        "fitted": f"({results['published']['fitted_attention']:.3f} instead of "
        f"{results['efficiencies']['attention']:g})",
        "gain": f"give {gain['gain']:+.1%}; with one pass over every tensor, as a fused operator "
        f"makes, {gain['gain_fewer_passes']:+.1%}",
    }


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """All of the page, by name."""
    kinds = ("bfloat16", "assumed", "w8a8", "tpot")
    return {
        **{f"points, {kind}": points_table(results, kind) for kind in kinds},
        **{f"times, {model}": times_table(results, model) for model in MODELS},
        **{f"scaling, {model}": scaling_table(results, model) for model in MODELS},
        "split": split_table(results, "235B", 16, "128k"),
        "room": room_table(results),
        "efficiencies": efficiencies_table(results),
    }


if __name__ == "__main__":
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    output.write_text(json.dumps(measure(), indent=1) + "\n")
    for name, table in tables(json.loads(output.read_text())).items():
        print(f"{name}\n\n{table}\n")
