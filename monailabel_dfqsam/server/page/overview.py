"""What the quantization page shows, as JSON values.

It is read from the model folder and the queue of runs; the datastore is not asked. An artifact's header is
read again only when its file has changed, so that the page may ask every second.
"""

from __future__ import annotations

import contextlib
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from monailabel_dfqsam.agreement import shortfall
from monailabel_dfqsam.artifact import Header, label, read_header
from monailabel_dfqsam.config import AUTO
from monailabel_dfqsam.server.runs import finetuning, quantizing
from monailabel_dfqsam.server.runs.folder import is_key
from monailabel_dfqsam.server.runs.models import Models, Speed
from monailabel_dfqsam.server.runs.options import defaults
from monailabel_dfqsam.server.runs.queue import RunQueue
from monailabel_dfqsam.server.runs.reporter import PRINTED
from monailabel_dfqsam.server.settings import Settings

_LINES = 8
_CHECKPOINTS = (".pth", ".pt", ".safetensors")
_PNG = "data:image/png;base64,"


class Overview:
    """One server's; its methods may be called from any thread."""

    def __init__(self, models: Models, settings: Settings, queue: RunQueue) -> None:
        self._models = models
        self._queue = queue
        self._settings = settings
        self._lock = threading.Lock()
        self._artifacts: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    def status(self) -> dict[str, Any]:
        """Everything but the pictures.

        Returns:
            `model`, which answers, and as `problem` why a better one does not; `changing`, whether another
            one may soon, as the server starts or loads what was published; `checkpoint`, its name and bytes;
            `threshold`, the share of full precision's agreement with itself that is needed to be served;
            `own_key`, of the artifact that the server's own settings make; `artifacts`, the newest first;
            `runs`, the newest first, and `running`, the one going on or the next to, or None: each as `Run`
            describes it; `lines`, which that one printed last; `options` of another one, as the trainer
            offers them.
        """
        # Asked before the model, which is the last one then where nothing changes.
        changing = self._models.is_changing()
        with contextlib.suppress(OSError):
            self._queue.own()  # should another server of this folder have gone, its runs have ended
        runs = self._models.folder.runs()
        running = next((run for run in reversed(runs) if not run.state.ended), None)
        lines = [] if running is None else self._queue.lines(running.id)
        checkpoint = self._settings.checkpoint
        return {
            "model": self._model(),
            "changing": changing,
            "checkpoint": {"name": checkpoint.name, "bytes": _size(checkpoint)},
            "threshold": self._settings.min_fidelity,
            "own_key": self._models.own_key,
            "artifacts": self._kept(),
            "runs": [run.told() for run in runs],
            "running": running and running.told(),
            "lines": [line for line in lines if PRINTED.fullmatch(line)][-_LINES:],
            "options": {**defaults(self._settings), **self._checkpoints()},
        }

    def pictures(self, key: str) -> dict[str, Any] | None:
        """The pictures of an artifact's report, None without one.

        Returns:
            `images`, that it was calibrated on, and `evolution`, for each of some images the labels at a few
            steps; a picture is `src`, a PNG as data URI, and `caption`.
        """
        try:
            report = self._models.folder.report(key).read_text(encoding="utf-8")
        except OSError:
            return None
        parser = _Pictures()
        parser.feed(report)
        return {"images": parser.images, "evolution": [steps for steps in parser.evolution if steps]}

    def _model(self) -> dict[str, Any]:
        served, told = self._models.served(), self._models.describe()
        speed = Speed() if served is None else served.speed
        kept = {name: told[name] for name in ("engine", "key", "fidelity", "problem")}
        return {"name": told["model"], **kept, "speed": speed.summary()}

    def _kept(self) -> list[dict[str, Any]]:
        folder, found = self._models.folder, {}
        with self._lock:
            for key in folder.keys_kept():
                try:
                    status = folder.artifact(key).stat()
                except OSError:  # taken away just now
                    continue
                stamp = (status.st_mtime_ns, status.st_size)
                known = self._artifacts.get(key)
                found[key] = known if known and known[0] == stamp else (stamp, self._artifact(key))
            self._artifacts = found
        kept = [artifact for _, artifact in found.values()]
        return sorted(kept, key=lambda artifact: str(artifact["made"]), reverse=True)

    def _artifact(self, key: str) -> dict[str, Any]:
        try:
            return _summary(key, read_header(self._models.folder.artifact(key)), self._settings.min_fidelity)
        except ValueError as error:
            nothing = dict.fromkeys(("options", "learned", "fidelity", "bytes", "checkpoint_bytes", "made"))
            return {"key": key, "name": key, **nothing, "refusal": str(error)}

    def _checkpoints(self) -> dict[str, list[str]]:
        """The checkpoints that may be quantized, the server's own first; nothing where there is no other."""
        own, folder = self._settings.checkpoint.name, self._settings.model_dir
        others = sorted(
            path.name
            for path in folder.glob("*")
            if path.suffix in _CHECKPOINTS and not is_key(path.stem) and not path.name.startswith(".")
        )
        names = [own, *(name for name in others if name != own)]
        return {"checkpoint": names} if len(names) > 1 else {}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _summary(key: str, header: Header, least: float) -> dict[str, Any]:
    config, fidelity = header["config"], header["fidelity"]
    options = {name: config[name] for name in ("policy", "calibration", "images", "seed")}
    options |= {"bits": config["bits"] or AUTO, "fidelity": config.get("fidelity")}
    learned = header.get("finetuning")
    if learned:
        options["labels"] = learned["labels"]
        options.update({name: learned["config"][name] for name in ("sampling", "seed")})
    return {
        "key": key,
        "name": label(header),
        "trainer": finetuning.NAME if learned else quantizing.NAME,
        "options": {
            **options,
            "iterations": config["synthesis"]["iterations"],
            "checkpoint": str(header["source_name"]),
        },
        "learned": learned
        and {
            "labels": learned["labels"],
            "before": learned["before"]["mean"],
            "after": learned["after"]["mean"],
        },
        "fidelity": fidelity,
        "bytes": int(header["sizes"]["artifact_bytes"]),
        "checkpoint_bytes": int(header["sizes"]["checkpoint_bytes"]),
        "made": str(header["created"]),
        "refusal": shortfall(fidelity, least),
    }


class _Pictures(HTMLParser):
    """Finds the pictures in a report: `figure.image` and, in one `div.pictures` an image, `figure.step`."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.evolution: list[list[dict[str, str]]] = []
        self._figure: dict[str, str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begins a group or a figure, or takes a picture."""
        given = {name: value or "" for name, value in attrs}
        if tag == "div" and given.get("class") == "pictures":
            self.evolution.append([])
        elif tag == "figure" and given.get("class") in ("image", "step"):
            self._figure = {"src": "", "caption": ""}
            group = self.images if given["class"] == "image" or not self.evolution else self.evolution[-1]
            group.append(self._figure)
        elif tag == "img" and self._figure is not None and given.get("src", "").startswith(_PNG):
            self._figure["src"] = given["src"]

    def handle_endtag(self, tag: str) -> None:
        """Ends a figure."""
        if tag == "figure":
            self._figure = None

    def handle_data(self, data: str) -> None:
        """Takes the words of a caption."""
        if self._figure is not None and data.strip():
            words = self._figure["caption"]
            self._figure["caption"] = f"{words}, {data.strip()}" if words else data.strip()
