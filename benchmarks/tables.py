"""What the measurements of this folder found, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monailabel_dfqsam.benchmark.table import (
    bytes_or_nothing,
    engine_table,
    milliseconds,
    times,
    warn_of_load,
)
from monailabel_dfqsam.console import output, print_rows


def print_volume(result: dict[str, Any]) -> None:
    """One row an engine: how many times as fast as torch-eager, seconds of the volume, milliseconds of each
    stage a slice, IoU of the masks with torch-eager's, and the most memory.
    """
    warn_of_load(result)
    volume = result["volume"]
    shape = " × ".join(map(str, volume["shape"]))
    title = (
        f"{result['variant']}, {volume['slices']} slices of {volume['name']} ({shape}), "
        f"weights {result['weights']}"
    )
    stages = list(result["rows"][0]["stages"])

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            times(row["times_torch_eager"]),
            f"{row['median_s']:.2f}",
            *(milliseconds(row["stages"][stage] / row["slices"]) for stage in stages),
            "" if row["mask_iou"] is None else f"{row['mask_iou']:.3f}",
            bytes_or_nothing(row["peak_bytes"]),
        ]

    headers = ("× torch", "s", *(f"{stage[:3]}. ms" for stage in stages), "IoU", "peak")
    output.print(engine_table(title, headers, result["rows"], cells))


def print_load(result: dict[str, Any]) -> None:
    """What a load found, right and wrong answers first."""
    memory = result["memory_mib"]
    who = f"{result['clients']} annotators in {result['seconds']:g} s"
    models = f"{result['artifacts']} models; quantization meanwhile: {result['requantized']}"
    median, late = (milliseconds(result[key]) for key in ("median_s", "p95_s"))
    print_rows(
        {
            "clicks": f"{result['clicks']} by {who}, {models}",
            "errors": ", ".join(result["errors"]) or "none",
            "wrong masks": str(result["wrong"]),
            "click": f"{median} ms, 95th percentile {late} ms",
            "memory": f"{memory['start']:.0f} MiB, after a third {memory['third']:.0f}, at the end "
            f"{memory['end']:.0f}, {memory['cache']:.0f} of that newly cached; growth over the last two "
            f"thirds beside the cache {memory['growth']:+.1f}",
        }
    )


def print_propagation(rows: Sequence[Mapping[str, Any]]) -> None:
    """One row an object and kind of prompts: volumetric Dice of the model, its bounds and the baselines."""
    columns = ("dice", "agreement", "every_box", "ellipse", "box", "box_reached", "seconds")
    print(f"{'model':16} {'object':24} {'prompts':8}", *(f"{name:>11}" for name in columns))
    for row in rows:
        name = f"{Path(row['image']).name.split('.')[0]} {row['object']}"
        print(f"{row['model']:16} {name:24} {row['prompts']:8}", *(f"{row[key]:11.3f}" for key in columns))
