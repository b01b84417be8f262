"""A diagnosis for people and for machines."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from monailabel_dfqsam.console import output
from monailabel_dfqsam.doctor import Diagnosis, Finding, Level
from monailabel_dfqsam.machine import machine

_STYLES = {Level.FINE: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """JSON values: `serves`, `machine` as `machine()` says, `model` as `Measured` or None, `findings`."""
    return {
        "serves": diagnosis.serves,
        "machine": machine(),
        "model": None if diagnosis.measured is None else asdict(diagnosis.measured),
        "findings": [asdict(finding) for finding in diagnosis.findings],
    }


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A table by parts, each remedy below what it is for, and the sum at the end."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for part, findings in groupby(diagnosis.findings, key=lambda finding: finding.part):
        for n, finding in enumerate(findings):
            table.add_row(part if n == 0 else "", *_cells(finding))
    output.print(table)
    output.print()
    count = sum(finding.level is Level.PROBLEM for finding in diagnosis.findings)
    output.print(
        "Ready to serve."
        if diagnosis.serves
        else f"Not ready to serve: {count} problem{'s' * (count > 1)}, marked 'problem' above."
    )


def _cells(finding: Finding) -> tuple[Text, Text, Text]:
    text = Text(finding.text)
    if finding.remedy:
        text.append(f"\n→ {finding.remedy}", style="italic")
    level = Text(finding.level.value, style=_STYLES[finding.level])
    return level, Text(finding.name), text
