"""The command `dfqsam export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from monailabel_dfqsam.console import output, plain_errors, print_rows, progress_bars
from monailabel_dfqsam.numbers import in_bytes


class ExportFormat(str, Enum):
    """What an artifact can be exported as."""

    OPENVINO = "openvino"


def export(
    artifact: Annotated[Path, typer.Argument(help="An artifact of `dfqsam quantize`.")],
    out: Annotated[Path, typer.Option(help="Folder to make, or an earlier export to replace.")],
    format: Annotated[ExportFormat, typer.Option(help="Of the models in it.")] = ExportFormat.OPENVINO,
) -> None:
    """Writes an artifact's encoder and decoder for devices without torch, and what a client has to know."""
    with plain_errors():
        from monailabel_dfqsam.artifact import read_artifact
        from monailabel_dfqsam.export.folder import FILES, write_openvino

        try:
            with progress_bars() as progress:
                write_openvino(read_artifact(artifact), out, progress)
        except RuntimeError as error:  # of a library that is there but broken
            raise ValueError(str(error)) from None
    print_rows({name: in_bytes((out / name).stat().st_size) for name in FILES})
    output.print(f"Wrote {out}", markup=False)
