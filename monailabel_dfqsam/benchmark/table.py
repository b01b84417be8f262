"""What a benchmark found, for a terminal: ratios first, then times, then memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.table import Table

from monailabel_dfqsam.console import output
from monailabel_dfqsam.numbers import in_bytes, in_seconds

# Load average of a machine that does nothing else; daemons make a little.
QUIET = 0.3


def print_encoder(result: dict[str, Any]) -> None:
    """One table a batch size, and one for each profile.

    Columns: how many times as fast as torch-eager and as openvino-int8, the share of the floor that our
    engines reach, milliseconds a call, and the most memory.
    """
    rows = result["rows"]
    warn_of_load(result)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        title = f"{result['variant']}, {batch} image{'s' * (batch > 1)} a call, weights {result['weights']}"
        output.print(_encoder_table(title, [row for row in rows if row["batch"] == batch]))
    for profile in result["profiles"]:
        if "seconds" in profile:
            output.print(_profile_table(profile))
    if result["artifact"]:
        before, after = (result["artifact"][f"encoder_{kind}_bytes"] for kind in ("float", "artifact"))
        output.print(f"Encoder: {in_bytes(before)} in float32, artifact 1/{before / after:.2f} of it")


def warn_of_load(result: dict[str, Any]) -> None:
    """Says that other work was running, where it was."""
    load = result["load_average_before"][0]
    if load > QUIET:
        output.print(f"Other work was running (load average {load:.1f}): times are longer than they need be.")


def _encoder_table(title: str, rows: list[dict[str, Any]]) -> Table:
    def cells(row: dict[str, Any]) -> list[str]:
        return [
            times(row["times_torch_eager"]),
            times(row["times_openvino_int8"]),
            _percent(row["floor_share"]),
            *(milliseconds(row[key]) for key in ("median_s", "min_s", "p95_s")),
            _percent(row["spread"]),
            milliseconds(row["median_s"] / row["batch"]),
            bytes_or_nothing(row["peak_bytes"]),
        ]

    headers = ("× torch", "× int8", "floor", "ms", "min", "p95", "spread", "ms/image", "peak")
    return engine_table(title, headers, rows, cells)


def engine_table(
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
        table.add_row(kind, milliseconds(seconds), _percent(seconds / profile["call_s"]))
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
            *(milliseconds(row[key]) for key in ("median_s", "p95_s", "min_s")),
            *(milliseconds(split.get(part)) for part in parts),
            bytes_or_nothing(row.get("reply_bytes")),
        )
    output.print(table)
    output.print(
        f"First answer {in_seconds(result['first_answer_s'])} after the server's start, in full precision; "
        f"in the end the server holds {in_bytes(result['memory_bytes'])}."
    )


def print_products(result: dict[str, Any]) -> None:
    """GMAC/s of each shape by each kernel and form; beside it how many times torch's float32."""
    warn_of_load(result)
    shapes = list(dict.fromkeys((row["m"], row["n"], row["k"]) for row in result["rows"]))
    title = f"GMAC/s, and times torch float32; threads: {result['threads']}"
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("M×N×K of", no_wrap=True)
    for shape in shapes:
        table.add_column("\n×".join(map(str, shape)), justify="right", no_wrap=True)
    for by, form in dict.fromkeys((row["by"], row["form"]) for row in result["rows"]):
        found = [row for row in result["rows"] if (row["by"], row["form"]) == (by, form)]
        cells = [f"{row['gmacs_per_s']:.0f} {row['times_float']:.1f}×" for row in found]
        table.add_row(f"{by} {form}".strip(), *cells)
    output.print(table)
    for name, rates in result["tiles"].items():
        told = ", ".join(f"{how} {rate:.0f}" for how, rate in rates.items())
        output.print(f"One tile in the first cache, one thread, {name}: {told}")


def times(value: float | None) -> str:
    """A ratio; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    """Seconds in milliseconds; nothing for None."""
    if value is None:
        return ""
    return f"{1000 * value:.1f}" if value < 1 else f"{1000 * value:.0f}"


def bytes_or_nothing(value: float | None) -> str:
    """Bytes in a unit that fits; nothing for None."""
    return "" if value is None else in_bytes(value)
