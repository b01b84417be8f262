"""`dfqsam demo`: a Slicer session against the real server, from the first click to a requantized model.

Everything it makes lies in one folder: pictures, report and results on top, and under `session/` the images,
the server's app folder and its log. The server is a process of its own on a free loopback port; it and what
it started are ended whatever happens.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from monailabel_dfqsam import overlay
from monailabel_dfqsam.artifact import read_header
from monailabel_dfqsam.console import output, print_rows, progress_bars
from monailabel_dfqsam.demo_server import DemoServer
from monailabel_dfqsam.evaluation import iou
from monailabel_dfqsam.numbers import in_bytes, in_seconds
from monailabel_dfqsam.phantom_study import Click, click_for, find_pairs, write_phantom_study
from monailabel_dfqsam.segmentation.volume import load_volume, slice_rgb
from monailabel_dfqsam.server.models import FULL_PRECISION, ModelFolder
from monailabel_dfqsam.slicer_session import SlicerSession

Prompt = Literal["point", "box"]
PROMPTS: tuple[Prompt, ...] = ("point", "box")  # in this order: the box finds the slice embedded

MAX_OBJECTS = 8
QUANTIZE_SECONDS = 1800.0
SWAP_SECONDS = 60.0
POLL_SECONDS = 0.5
REQUANTIZE_SEED = 1
REQUANTIZE_ITERATIONS = 50

_MARKER = "made-by-dfqsam-demo"


class DemoError(ValueError):
    """A demo that cannot go on; the message says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One object in one image.

    Attributes:
        image: the file, as it is called in the server's studies.
        name: what the server calls the image.
        label: what the object is called.
        click: where an ideal person would click.
        rgb: [I, J, 3] uint8, the slice `click.k`.
        truth: [I, J] bool, the object on it.
    """

    image: Path
    name: str
    label: str
    click: Click
    rgb: NDArray[np.uint8]
    truth: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Answer:
    """What the server said to one prompt.

    Attributes:
        mask: [I, J] bool on the slice asked about.
        model: the server's name for what answered.
        seconds: the round trip, what a person waits.
        cached: whether the slice had been embedded before.
        file: the mask file as it came.
    """

    mask: NDArray[np.bool_]
    model: str
    seconds: float
    cached: bool
    file: bytes


Answers = dict[tuple[int, Prompt], Answer]
"""By the case's index and the prompt."""


def run(studies: Path | None, out: Path) -> bool:
    """Plays the session and prints what happened.

    Args:
        studies: volumes with masks, as `phantom_study.find_pairs` finds them; None makes phantoms.
        out: where everything is written; an earlier demo's files are replaced.

    Returns:
        Whether every object was answered by both models.

    Raises:
        DemoError: when there is nothing to show, or the server does not do its part.
    """
    work = _fresh_folder(out)
    if studies is None:
        studies = work / "phantoms"
        write_phantom_study(studies)
        output.print("Wrote a phantom study: no patient is in it.")
    cases = find_cases(studies)
    served = work / "studies"
    served.mkdir()
    for image in {case.image for case in cases}:
        shutil.copy(image, served)
    output.print(f"Starting the server on {len(cases)} objects to segment …")
    with DemoServer(served, work / "app", work / "server.log") as server:
        result = _Play(server, cases, out).run()
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.print(f"\nPictures, report.html and results.json are in {out}", markup=False, soft_wrap=True)
    return bool(result["complete"])


def find_cases(studies: Path) -> list[Case]:
    """The first `MAX_OBJECTS` objects of a folder, by name.

    Raises:
        DemoError: when there are none.
    """
    cases = []
    for image, mask in find_pairs(studies)[:MAX_OBJECTS]:
        volume, truth = load_volume(image), load_volume(mask).array != 0
        if truth.shape != volume.shape or not truth.any():
            raise DemoError(f"'{mask.name}' is empty or has not the shape of '{image.name}'")
        click = click_for(truth)
        name = image.name.removesuffix(".nii.gz").removesuffix(".nrrd")
        label = mask.name.removesuffix(".nii.gz").removesuffix(".nrrd").removeprefix(f"{name}_")
        cases.append(Case(image, name, label, click, slice_rgb(volume, click.k), truth[:, :, click.k]))
    if not cases:
        raise DemoError(
            f"'{studies}' has no volume with a mask beside it named <image>_<label>.nii.gz or .nrrd"
        )
    return cases


def _fresh_folder(out: Path) -> Path:
    """`out/session`, empty; one that an earlier demo left is removed, anything else is left alone."""
    work = out / "session"
    if work.exists() and not (work / _MARKER).is_file():
        raise DemoError(f"'{work}' is there and was not made by an earlier demo: choose another --out")
    if work.exists():
        shutil.rmtree(work)
        for old in (*out.glob("*.png"), out / "report.html", out / "results.json"):
            old.unlink(missing_ok=True)
    work.mkdir(parents=True)
    (work / _MARKER).touch()
    return work


class _Play:
    """The session, act by act."""

    def __init__(self, server: DemoServer, cases: Sequence[Case], out: Path) -> None:
        self._server = server
        self._cases = cases
        self._out = out
        self._folder = ModelFolder(server.app / "model")
        self._session = SlicerSession(server.url)

    def run(self) -> dict[str, Any]:
        session = self._session
        output.print(f"It offers {', '.join(session.info()['models'])}, and answers while it quantizes:")
        first = self._ask(0, "point")
        until_first = time.monotonic() - self._server.started
        output.print(
            f"  first answer {in_seconds(until_first)} after the start, by {first.model}", markup=False
        )
        full = {**self._ask_all(), (0, "point"): first}
        seconds = self._wait_for_quantization("quantizing")
        published = self._folder.published()
        if published is None:
            raise DemoError(
                f"the quantized model was not published: {self._stats().get('error', 'no reason')}"
            )
        header = read_header(self._folder.artifact(published["key"]))
        shutil.copy(self._folder.report, self._out / "report.html")
        self._wait_for_swap({"model": FULL_PRECISION})
        quantized = self._ask_all()
        self._print_answers(full, quantized)
        self._write_pictures(full, quantized)
        requantized = self._requantize()
        saved = self._save_label(quantized)
        summary = self._summary(full, quantized, header, until_first, seconds)
        print_rows(summary)
        complete = self._complete(full, quantized)
        return {
            "complete": complete,
            "summary": summary,
            "rows": self._rows(full, quantized),
            "requantized": requantized,
            "label": saved,
        }

    # Talking to the server

    def _ask(self, index: int, prompt: Prompt) -> Answer:
        case = self._cases[index]
        i, j = case.click.point_ij
        where: dict[str, Any] = (
            {"foreground": [[i, j, case.click.k]]} if prompt == "point" else {"roi": case.click.roi}
        )
        begin = time.perf_counter()
        reply = self._session.infer(case.name, label=case.label, slice_index=case.click.k, **where)
        seconds = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / reply.file_name
            path.write_bytes(reply.image)
            mask = load_volume(path).array[:, :, case.click.k] != 0
        return Answer(mask, reply.params["model"], seconds, bool(reply.params["cached"]), reply.image)

    def _ask_all(self) -> Answers:
        return {
            (index, prompt): self._ask(index, prompt)
            for index in range(len(self._cases))
            for prompt in PROMPTS
        }

    def _stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self._session.info()["train_stats"]["dfqsam"]
        return found

    def _serving(self) -> dict[str, Any]:
        found: dict[str, Any] = self._session.info()["models"]["dfqsam"]["serving"]
        return found

    def _wait_for_quantization(self, title: str) -> float:
        """Until the trainer has ended; returns the seconds that it took by its own clock."""
        deadline = time.monotonic() + QUANTIZE_SECONDS
        last = ("", 1)
        with progress_bars() as progress:
            while time.monotonic() < deadline:
                stats = self._stats()
                stage, total = str(stats.get("stage", "")), int(stats.get("total_epochs", 1))
                ended = stats.get("state") in ("published", "rejected")
                if last[0] and (ended or stage != last[0]):
                    progress(last[0], last[1], last[1])
                if ended:
                    return float(stats["total_time"])
                if stats.get("state") in ("failed", "stopped"):
                    raise DemoError(
                        f"{title} ended as '{stats['state']}': {stats.get('error', 'see the log')}"
                    )
                if stage not in ("", "starting"):
                    progress(stage, int(stats["epoch"]), total)
                    last = (stage, total)
                self._server.check()
                time.sleep(POLL_SECONDS)
        raise DemoError(f"{title} took more than {in_seconds(QUANTIZE_SECONDS)}")

    def _wait_for_swap(self, old: dict[str, Any]) -> dict[str, Any]:
        """Clicks until another model than `old` answers; `old` holds some of `serving`'s entries."""
        deadline = time.monotonic() + SWAP_SECONDS
        while time.monotonic() < deadline:
            self._ask(0, "point")
            now = self._serving()
            if any(now[key] != value for key, value in old.items()):
                return now
            time.sleep(POLL_SECONDS)
        raise DemoError(f"the server still answers with {old} after {in_seconds(SWAP_SECONDS)}")

    def _wait_until_idle(self) -> None:
        while self._session.is_training():
            self._server.check()
            time.sleep(POLL_SECONDS)

    def _requantize(self) -> dict[str, Any]:
        """Asks for another quantization by the admin API, and sees the model change without a restart."""
        before = self._serving()
        output.print(
            f"\nPOST /train/dfqsam with seed {REQUANTIZE_SEED} and {REQUANTIZE_ITERATIONS} iterations:",
            markup=False,
        )
        self._wait_until_idle()  # the last one has published, but its process may still be ending
        self._session.train(seed=REQUANTIZE_SEED, iterations=REQUANTIZE_ITERATIONS)
        self._wait_until_idle()
        seconds = self._wait_for_quantization("requantizing")
        stats = self._stats()
        if stats["state"] == "rejected":
            output.print(f"  not published: {stats['error']}", markup=False)
            return {"published": False, "seconds": seconds, "reason": stats["error"]}
        now = self._wait_for_swap({key: before[key] for key in ("model", "fidelity")})
        output.print(
            f"  after {in_seconds(seconds)} the same server answers with another model: fidelity "
            f"{before['fidelity']:.3f} before, {now['fidelity']:.3f} now",
            markup=False,
        )
        return {"published": True, "seconds": seconds, "before": before, "now": now}

    def _save_label(self, answers: Answers) -> str:
        """Submits the first box's mask as a finished label, as Slicer's Submit button does."""
        case = self._cases[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "label.nrrd"
            path.write_bytes(answers[0, "box"].file)
            self._session.save_label(case.name, path, [{"name": case.label, "idx": 1}])
        output.print(f"Saved a label '{case.label}' for {case.name}.\n", markup=False)
        return case.name

    # Telling

    def _complete(self, full: Answers, quantized: Answers) -> bool:
        """Whether full precision gave all of the first answers and a quantized model all of the second."""
        late = sum(answer.model != FULL_PRECISION for answer in full.values())
        early = sum(answer.model == FULL_PRECISION for answer in quantized.values())
        if late or early:
            output.print(f"{late + early} answers came from the other model than asked.", style="bold red")
        return not late and not early

    def _rows(self, full: Answers, quantized: Answers) -> list[dict[str, Any]]:
        rows = []
        for index, prompt in quantized:
            case, before, after = self._cases[index], full[index, prompt], quantized[index, prompt]
            rows.append(
                {
                    "image": case.name,
                    "label": case.label,
                    "slice": case.click.k,
                    "prompt": prompt,
                    "iou_full_precision": round(iou(before.mask, case.truth), 4),
                    "iou_quantized": round(iou(after.mask, case.truth), 4),
                    "agreement": round(iou(before.mask, after.mask), 4),
                    "seconds_full_precision": round(before.seconds, 4),
                    "seconds_quantized": round(after.seconds, 4),
                    "cached_full_precision": before.cached,
                    "cached_quantized": after.cached,
                }
            )
        return rows

    def _print_answers(self, full: Answers, quantized: Answers) -> None:
        name = quantized[0, "point"].model
        short = name.split()[0]
        table = Table(
            title=f"Overlap (IoU) with the true mask, and the wait: full precision and {name}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for head in ("object", "prompt"):
            table.add_column(head, overflow="fold")
        for head in ("full", short, "agreement", "full ms", f"{short} ms"):
            table.add_column(head, justify="right")
        for row in self._rows(full, quantized):
            table.add_row(
                f"{row['image']} {row['label']}",
                row["prompt"],
                *(f"{row[key]:.3f}" for key in ("iou_full_precision", "iou_quantized", "agreement")),
                *(f"{1000 * row[f'seconds_{m}']:.0f}" for m in ("full_precision", "quantized")),
                end_section=row["prompt"] == PROMPTS[-1],
            )
        output.print(table)
        output.print("Full precision answered while the same machine was quantizing.")

    def _summary(
        self, full: Answers, quantized: Answers, header: dict[str, Any], until_first: float, seconds: float
    ) -> dict[str, str]:
        sizes, fidelity = header["sizes"], header["fidelity"]
        before, after = sizes["checkpoint_bytes"], sizes["artifact_bytes"]
        return {
            "size": f"{in_bytes(before)} in 32-bit float → {in_bytes(after)} ({before / after:.1f}×)",
            "fidelity": f"{fidelity['mean_iou']:.3f} mean IoU with full precision on {fidelity['n']} masks",
            "quantization": in_seconds(seconds),
            "start to first answer": in_seconds(until_first),
            "click, full precision": _latencies(full),
            "click, quantized": _latencies(quantized),
        }

    def _write_pictures(self, full: Answers, quantized: Answers) -> None:
        legend = [
            ("true mask", overlay.TRUTH),
            ("full precision", overlay.FULL_PRECISION),
            (quantized[0, "point"].model, overlay.QUANTIZED),
            ("prompt", overlay.PROMPT),
        ]
        for index, case in enumerate(self._cases):
            panels = [self._panel(index, prompt, full, quantized) for prompt in PROMPTS]
            overlay.write_overlay(panels, legend, self._out / f"{case.name}_{case.label}.png")

    def _panel(self, index: int, prompt: Prompt, full: Answers, quantized: Answers) -> overlay.Panel:
        case = self._cases[index]
        masks = (case.truth, full[index, prompt].mask, quantized[index, prompt].mask)
        colours = (overlay.TRUTH, overlay.FULL_PRECISION, overlay.QUANTIZED)
        # Arrays run [i, j], pictures [row, column] = [j, i].
        i, j = case.click.point_ij
        i0, i1, j0, j1 = case.click.roi[:4]
        return overlay.Panel(
            title=f"{case.name}, slice {case.click.k}, {prompt}",
            rgb=case.rgb.transpose(1, 0, 2),
            outlines=[overlay.Outline(m.T, c, w) for m, c, w in zip(masks, colours, (9, 6, 2), strict=True)],
            point=(j, i) if prompt == "point" else None,
            box=(j0, j1, i0, i1) if prompt == "box" else None,
        )


def _latencies(answers: Answers) -> str:
    """Median round trips: on a slice seen for the first time, and on one that is embedded."""
    parts = []
    for text, cached in (("first on a slice", False), ("again", True)):
        seconds = [answer.seconds for answer in answers.values() if answer.cached is cached]
        if seconds:
            parts.append(f"{text} {1000 * statistics.median(seconds):.0f} ms (median of {len(seconds)})")
    return ", ".join(parts)
