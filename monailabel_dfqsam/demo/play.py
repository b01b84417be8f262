"""The demo's session, act by act.

Everything it makes lies in one folder: pictures, report and results on top, and under `session/` the images,
the server's app folder and its log.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monailabel_dfqsam.agreement import in_words
from monailabel_dfqsam.artifact import Header, read_header
from monailabel_dfqsam.console import output, print_rows, progress_bars
from monailabel_dfqsam.demo.comparison import PROMPTS, Answer, Answers, Comparison, Prompt, latencies
from monailabel_dfqsam.demo.objects import Case, DemoError, find_cases
from monailabel_dfqsam.demo.server import DemoServer
from monailabel_dfqsam.numbers import in_bytes, in_seconds
from monailabel_dfqsam.phantom_study import write_phantom_study
from monailabel_dfqsam.segmentation.volume import load_volume
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.slicer_session import SlicerSession

REQUANTIZE_SEED = 1
REQUANTIZE_ITERATIONS = 50

_MARKER = "made-by-dfqsam-demo"


def run(studies: Path | None, out: Path, checkpoint: Path) -> bool:
    """Plays the session and prints what happened.

    Args:
        studies: volumes with masks, as `phantom_study.find_pairs` finds them; None makes phantoms.
        out: where everything is written; an earlier demo's files are replaced.
        checkpoint: what the server serves, as `find_checkpoint` takes it.

    Returns:
        Whether every object was answered by both models.

    Raises:
        DemoError: when there is nothing to show, or the server does not do its part.
    """
    if studies is not None:
        cases = find_cases(studies)
        work = _fresh_folder(out)
    else:
        work = _fresh_folder(out)
        write_phantom_study(work / "phantoms")
        cases = find_cases(work / "phantoms")
        output.print("Wrote a phantom study: no patient is in it.")
    served = work / "studies"
    served.mkdir()
    for image in {case.image for case in cases}:
        shutil.copy(image, served)
    output.print(f"Starting the server on {len(cases)} objects to segment, with {checkpoint} …", markup=False)
    if str(checkpoint) == "tiny":
        output.print(
            "It is the smaller model of the package, quantized in a minute or two. dfqsam serve takes the\n"
            "larger one, which finds more by a click; dfqsam demo --checkpoint lite shows it."
        )
    with DemoServer(served, work / "app", work / "server.log", checkpoint) as server:
        result = _Play(server, cases, out).run()
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    output.print(f"\nPictures, report.html and results.json are in {out}", markup=False, soft_wrap=True)
    return bool(result["complete"])


def _fresh_folder(out: Path) -> Path:
    """`out/session`, empty; what an earlier demo left is removed, anything else is left alone."""
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
    """One annotator at one server."""

    def __init__(self, server: DemoServer, cases: Sequence[Case], out: Path) -> None:
        self._server = server
        self._cases = cases
        self._out = out
        self._folder = ModelFolder(server.app / "model")
        self._session = SlicerSession(server.url)

    def run(self) -> dict[str, Any]:
        """All acts; returns what `results.json` holds."""
        models = ", ".join(self._session.info()["models"])
        output.print(f"It offers {models}, and answers while it quantizes:", markup=False)
        first = self._ask(0, "point")
        until_first = time.monotonic() - self._server.started
        output.print(
            f"  first answer {in_seconds(until_first)} after the start, by {first.model}", markup=False
        )
        full = {**self._ask_all(), (0, "point"): first}
        seconds, header = self._first_quantization()
        shutil.copy(self._folder.report(header["key"]), self._out / "report.html")
        comparison = Comparison(self._cases, full, self._ask_all())
        output.print(comparison.table())
        output.print("Full precision answered while the same machine was quantizing.")
        comparison.write_pictures(self._out)
        requantized = self._requantize()
        self._save_label(comparison)
        summary = {
            **_sizes_and_fidelity(header),
            "quantization": in_seconds(seconds),
            "start to first answer": in_seconds(until_first),
            "click, full precision": latencies(comparison.full),
            "click, quantized": latencies(comparison.quantized),
        }
        print_rows(summary)
        if comparison.strays:
            output.print(f"{comparison.strays} answers came from another model than asked.", style="bold red")
        return {
            "complete": not comparison.strays,
            "summary": summary,
            "rows": comparison.rows(),
            "requantized": requantized,
        }

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
            path = Path(folder) / Path(reply.file_name).name
            path.write_bytes(reply.image)
            mask = load_volume(path).array[:, :, case.click.k] != 0
        return Answer(mask, reply.params["model"], seconds, bool(reply.params["cached"]), reply.image)

    def _ask_all(self) -> Answers:
        return {
            (index, prompt): self._ask(index, prompt)
            for index in range(len(self._cases))
            for prompt in PROMPTS
        }

    def _first_quantization(self) -> tuple[float, Header]:
        """Follows the run that the start asked for until its model answers; its seconds, and that model's
        header.
        """
        output.print("Waiting until the server has asked itself for a quantization …")
        runs = self._session.settled(self._server.check)["runs"]
        if not runs:
            raise DemoError("the server began no quantization: its log says why")
        run = self._followed(runs[0]["id"])
        if run["state"] != "published":
            raise DemoError(f"the quantized model was not published: {run['error']}")
        self._swapped(run["key"])
        return float(run["seconds"]), read_header(self._folder.artifact(run["key"]))

    def _followed(self, identity: str) -> dict[str, Any]:
        """A run's record once it has ended, published or rejected; a bar a stage shows how it goes."""
        last = ("", 1)
        with progress_bars() as progress:

            def look(run: dict[str, Any]) -> None:
                nonlocal last
                self._server.check()
                if last[0] and run["stage"] != last[0]:
                    progress(last[0], last[1], last[1])
                if run["stage"] not in ("", "starting"):
                    ended = run["state"] in ("published", "rejected")
                    progress(run["stage"], run["steps"] if ended else run["step"], run["steps"])
                    last = (run["stage"], run["steps"])

            run = self._session.ended_run(identity, look)
        if run["state"] not in ("published", "rejected"):
            raise DemoError(f"the quantization ended as '{run['state']}': {run['error']}")
        return run

    def _swapped(self, key: str) -> dict[str, Any]:
        """Waits until a published model answers; how it is, in the words of the quantization page."""
        output.print("Waiting until the server has loaded the new model …")
        model: dict[str, Any] = self._session.settled(self._server.check)["model"]
        if model["key"] != key:
            raise DemoError(f"the server still answers with {model['name']}: its log says why")
        return model

    def _requantize(self) -> dict[str, Any]:
        """Asks for another quantization by the admin API, and sees the model change without a restart."""
        before = self._session.overview()["model"]
        text = f"with seed {REQUANTIZE_SEED} and {REQUANTIZE_ITERATIONS} iterations"
        output.print(f"\nPOST /train/dfqsam {text}:", markup=False)
        run = self._followed(self._session.train(seed=REQUANTIZE_SEED, iterations=REQUANTIZE_ITERATIONS))
        seconds = float(run["seconds"])
        if run["state"] == "rejected":
            output.print(f"  not published: {run['error']}", markup=False)
            return {"published": False, "seconds": seconds, "reason": run["error"]}
        now = self._swapped(run["key"])
        output.print(
            f"  {in_seconds(seconds)} later the same server answers with another model,\n"
            f"  of fidelity {now['fidelity']['mean_iou']:.3f} where the last had "
            f"{before['fidelity']['mean_iou']:.3f}, and full precision with itself one grey level away "
            f"{now['fidelity']['grey_level']['mean_iou']:.3f}",
            markup=False,
        )
        kept = ("name", "engine", "key", "fidelity")
        models = {"before": before, "now": now}
        return {
            "published": True,
            "seconds": seconds,
            **{when: {name: model[name] for name in kept} for when, model in models.items()},
        }

    def _save_label(self, comparison: Comparison) -> None:
        """Submits the first box's mask as a finished label, as Slicer's Submit button does."""
        case = self._cases[0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "label.nrrd"
            path.write_bytes(comparison.quantized[0, "box"].file)
            self._session.save_label(case.name, path, [{"name": case.label, "idx": 1}])
        output.print(f"Saved a label '{case.label}' for {case.name}.\n", markup=False)


def _sizes_and_fidelity(header: Header) -> dict[str, str]:
    sizes, fidelity = header["sizes"], header["fidelity"]
    before, after = sizes["checkpoint_bytes"], sizes["artifact_bytes"]
    return {
        "size": f"{in_bytes(before)} in 32-bit float → {in_bytes(after)} ({before / after:.1f}×)",
        "fidelity": in_words(fidelity),
    }
