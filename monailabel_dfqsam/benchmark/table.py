"""What a benchmark found, for a terminal: ratios first, then times, then memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from monailabel_dfqsam.console import output, print_rows
from monailabel_dfqsam.numbers import in_bytes

# Load average of a machine that does nothing else; daemons make a little.
QUIET = 0.3


def print_encoder(result: dict[str, Any]) -> None:
    """One table a batch size, and one for each profile.

    Columns: how many times as fast as torch-eager and as openvino-int8, the share of the floor that our
    engines reach, milliseconds a call, and the most memory.
    """
    rows = result["rows"]
    _print_load(result)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        title = f"{result['variant']}, {batch} image{'s' * (batch > 1)} a call, weights {result['weights']}"
        output.print(_encoder_table(title, [row for row in rows if row["batch"] == batch]))
    for profile in result["profiles"]:
        if "seconds" in profile:
            output.print(_profile_table(profile))
    if result["artifact"]:
        before, after = (result["artifact"][f"encoder_{kind}_bytes"] for kind in ("float", "artifact"))
        output.print(f"Encoder: {in_bytes(before)} in float32, artifact 1/{before / after:.2f} of it")


def print_volume(result: dict[str, Any]) -> None:
    """One row an engine: how many times as fast as torch-eager, seconds of the volume, milliseconds of each
    stage a slice, IoU of the masks with torch-eager's, and the most memory.
    """
    _print_load(result)
    volume = result["volume"]
    shape = " × ".join(map(str, volume["shape"]))
    title = (
        f"{result['variant']}, {volume['slices']} slices of {volume['name']} ({shape}), "
        f"weights {result['weights']}"
    )
    stages = list(result["rows"][0]["stages"])

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            _times(row["times_torch_eager"]),
            f"{row['median_s']:.2f}",
            *(_milliseconds(row["stages"][stage] / row["slices"]) for stage in stages),
            "" if row["mask_iou"] is None else f"{row['mask_iou']:.3f}",
            _bytes(row["peak_bytes"]),
        ]

    headers = ("× torch", "s", *(f"{stage[:3]}. ms" for stage in stages), "IoU", "peak")
    output.print(_engine_table(title, headers, result["rows"], cells))


def _print_load(result: dict[str, Any]) -> None:
    load = result["load_average_before"][0]
    if load > QUIET:
        output.print(f"Other work was running (load average {load:.1f}): times are longer than they need be.")


def _encoder_table(title: str, rows: list[dict[str, Any]]) -> Table:
    def cells(row: dict[str, Any]) -> list[str]:
        return [
            _times(row["times_torch_eager"]),
            _times(row["times_openvino_int8"]),
            _percent(row["floor_share"]),
            *(_milliseconds(row[key]) for key in ("median_s", "min_s", "p95_s")),
            _percent(row["spread"]),
            _milliseconds(row["median_s"] / row["batch"]),
            _bytes(row["peak_bytes"]),
        ]

    headers = ("× torch", "× int8", "floor", "ms", "min", "p95", "spread", "ms/image", "peak")
    return _engine_table(title, headers, rows, cells)


def _engine_table(
    title: str,
    headers: Iterable[str],
    rows: list[dict[str, Any]],
    cells: Callable[[dict[str, Any]], list[str]],
) -> Table:
    """A line for each engine that was measured; below, why the others were not."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    unmeasured = []
    for row in rows:
        if row["median_s"] is None:
            unmeasured.append(f"{row['engine']}: not measured ({row['reason']})")
            continue
        table.add_row(row["engine"], *cells(row))
    if unmeasured:
        table.caption, table.caption_justify = "\n".join(unmeasured), "left"
    return table


def _profile_table(profile: dict[str, Any]) -> Table:
    title = (
        f"Where the time of {profile['engine']} goes, {profile['batch']} images a call, under the profiler"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("kind of op")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for kind, seconds in profile["seconds"].items():
        table.add_row(kind, _milliseconds(seconds), _percent(seconds / profile["call_s"]))
    return table


def print_clicks(result: dict[str, Any]) -> None:
    """One row a kind of click, with what its time went to."""
    rows = result["rows"]
    parts = list(dict.fromkeys(part for row in rows for part in row.get("split") or {}))
    table = Table(box=None, pad_edge=False)
    table.add_column("click")
    for header in ("n", "ms", "p95", "least", *parts, "reply"):
        table.add_column(header, justify="right")
    for row in rows:
        split = row.get("split") or {}
        table.add_row(
            row["case"],
            str(row["n"]),
            *(_milliseconds(row[key]) for key in ("median_s", "p95_s", "min_s")),
            *(_milliseconds(split.get(part)) for part in parts),
            _bytes(row.get("reply_bytes")),
        )
    output.print(table)


def print_load(result: dict[str, Any]) -> None:
    """What a load found, right and wrong answers first."""
    memory = result["memory_mib"]
    who = f"{result['clients']} annotators in {result['seconds']:g} s"
    models = f"{result['artifacts']} models; quantization meanwhile: {result['requantized']}"
    median, late = (_milliseconds(result[key]) for key in ("median_s", "p95_s"))
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


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1000 * value:.1f}" if value < 1 else f"{1000 * value:.0f}"


def _bytes(value: float | None) -> str:
    return "" if value is None else in_bytes(value)
