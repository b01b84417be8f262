"""The command `dfqsam quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from monailabel_dfqsam.agreement import in_words
from monailabel_dfqsam.config import AUTO, Calibration, Policy, Preset, QuantizationConfig
from monailabel_dfqsam.console import JsonFlag, errors, plain_errors, print_rows, progress_bars
from monailabel_dfqsam.numbers import in_bytes, in_seconds, in_thousands

if TYPE_CHECKING:
    from monailabel_dfqsam.artifact import Header
    from monailabel_dfqsam.sam.checkpoint import Checkpoint


def quantize(
    out: Annotated[Path, typer.Option(help="Folder for <key>.safetensors and its report, <key>.html.")],
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A .pth, .pt or .safetensors file, lite, tiny or lite-medsam; lite without it.",
            show_default=False,
        ),
    ] = None,
    fidelity: Annotated[
        str | None,
        typer.Option(
            metavar="auto|F",
            help="The agreement with full precision to keep, by the cheapest form of each layer: a mean IoU, "
            "or auto, what full precision has to itself when every pixel moves by one grey level.",
            show_default="auto",
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Of all linear weights and activations instead: 4, 6 or 8.", show_default=False),
    ] = None,
    policy: Annotated[
        Policy,
        typer.Option(help="'paper' quantizes attention's products too; with the presets static and paper."),
    ] = Policy.DEPLOY,
    calibration: Annotated[
        str,
        typer.Option(
            metavar="synthetic|gaussian|none|DIR",
            help="Where calibration images come from; fast and best draw pictures beside them.",
        ),
    ] = "synthetic",
    images: Annotated[
        int | None,
        typer.Option(help="How many calibration images, instead of the preset's.", show_default=False),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Synthesis steps, instead of the preset's.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="fast: each layer's bits by the fidelity to keep, ranges at run time, on 1 synthesized "
            "image and 16 drawn ones; best: on 4 and 40; static: fixed ranges, as GPU kernels multiply; "
            "paper: as published.",
            show_default="fast",
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Quantizes a checkpoint out of its own weights and writes the artifact and its report.

    The same checkpoint and options always make the same <key>: when that file is there, nothing is done.
    """
    with plain_errors():
        config = _configuration(
            calibration,
            preset=preset,
            bits=bits,
            fidelity=fidelity,
            policy=policy,
            images=images,
            iterations=iterations,
            seed=seed,
        )
        from monailabel_dfqsam.artifact import read_header
        from monailabel_dfqsam.identity import artifact_key
        from monailabel_dfqsam.sam import read_checkpoint
        from monailabel_dfqsam.sam.checkpoint import DEFAULT

        source = read_checkpoint(checkpoint or DEFAULT)
        path = out / f"{artifact_key(config, source.sha256, source.variant.name)}.safetensors"
        made = not _is_whole(path)
        if made:
            _quantize_into(out, path, source, config)
        header = read_header(path)
    summary = _summary(header, path, made)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print_summary(summary)


def _configuration(calibration: str, *, fidelity: str | None, **chosen: Any) -> QuantizationConfig:
    """The options as a configuration; a calibration that is no word for one is a folder."""
    folder = None
    if calibration in (kind.value for kind in Calibration if kind is not Calibration.FOLDER):
        kind = Calibration(calibration)
    elif Path(calibration).is_dir():
        kind, folder = Calibration.FOLDER, str(Path(calibration).resolve())
    else:
        raise ValueError(
            f"--calibration must be synthetic, gaussian, none or a folder of images, not '{calibration}'"
        )
    return Preset.FAST.config.changed(fidelity=_fidelity(fidelity), calibration=kind, folder=folder, **chosen)


def _fidelity(text: str | None) -> float | str | None:
    try:
        return text if text in (None, AUTO) else float(text)
    except ValueError:
        raise ValueError(f"--fidelity must be auto or a number above 0, at most 1, not '{text}'") from None


def _is_whole(path: Path) -> bool:
    """Whether an artifact is there and undamaged."""
    from monailabel_dfqsam.artifact import ArtifactError, read_artifact

    if not path.exists():
        return False
    try:
        read_artifact(path, path.stem)
    except ArtifactError as error:
        errors.print(f"Making it again: {error}", markup=False)
        return False
    return True


def _quantize_into(out: Path, path: Path, source: Checkpoint, config: QuantizationConfig) -> None:
    import torch

    from monailabel_dfqsam.artifact import write_artifact
    from monailabel_dfqsam.pipeline import quantize as run
    from monailabel_dfqsam.report import write_report

    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with progress_bars() as progress:
        result = run(source, config, device=device, progress=progress)
    # The report first: where the artifact is, a report was written.
    write_report(result, source, path.with_suffix(".html"))
    write_artifact(result.artifact, path)


def _summary(header: Header, path: Path, made: bool) -> dict[str, Any]:
    from monailabel_dfqsam.artifact import label

    return {
        "artifact": str(path),
        "report": str(report) if (report := path.with_suffix(".html")).is_file() else None,
        "key": header["key"],
        "made": made,
        "model": header["variant"],
        "form": label(header),
        "four_bit": header.get("four_bit"),
        "policy": header["config"]["policy"],
        "preset": header.get("preset"),
        "fidelity": header["fidelity"],
        "sizes": header["sizes"],
        "bops": header["bops"],
        "bops_float": header["bops_float"],
        "seconds": header["seconds"],
    }


def _print_summary(summary: dict[str, Any]) -> None:
    sizes, fidelity = summary["sizes"], summary["fidelity"]
    before, after = sizes["checkpoint_bytes"], sizes["artifact_bytes"]
    bops_float, bops = summary["bops_float"], summary["bops"]
    earlier = "" if summary["made"] else ", in an earlier run: nothing was to do now"
    print_rows(
        {
            "model": f"{summary['model']}, {summary['form']}, policy {summary['policy']}",
            "4-bit weights": f"in {100 * (summary['four_bit'] or 0):.0f} % of the multiplications",
            "fidelity": in_words(fidelity),
            "size": f"{in_bytes(before)} in 32-bit float → {in_bytes(after)} ({before / after:.1f}×)",
            "bit operations": f"{in_thousands(bops_float)} → {in_thousands(bops)} ({bops_float / bops:.0f}×)",
            "time": in_seconds(summary["seconds"]) + earlier,
            "artifact": summary["artifact"],
            "report": summary["report"] or "none was kept",
        }
    )
