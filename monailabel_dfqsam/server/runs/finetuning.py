"""The trainer `dfqsam_qat`: fine-tunes the quantized model on the datastore's finished labels.

Unlike `dfqsam` it reads images and labels of people, which is why it runs only when asked for by its name.
What it learns stays here: an artifact in the model folder, of the same form, behind the same gate, and served
only if it is better than both the artifact it began with and the one served, on images not learned from.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from monailabel_dfqsam.artifact import Artifact, read_artifact, write_artifact
from monailabel_dfqsam.config import FinetuneConfig, QuantizationConfig
from monailabel_dfqsam.sam import read_checkpoint
from monailabel_dfqsam.server.runs.folder import ModelFolder
from monailabel_dfqsam.server.runs.options import read_finetuning
from monailabel_dfqsam.server.runs.quantizing import device, publish, quantized, ready
from monailabel_dfqsam.server.runs.record import RunState
from monailabel_dfqsam.server.runs.reporter import Outcome, Reporter, say
from monailabel_dfqsam.server.settings import Settings

if TYPE_CHECKING:
    from monailabel_dfqsam.finetuning.learning import Judge, Scores
    from monailabel_dfqsam.finetuning.samples import Labelled, Reader, Sample
    from monailabel_dfqsam.sam.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

NAME = "dfqsam_qat"
DESCRIPTION = (
    "Fine-tunes the quantized model on finished labels: unlike dfqsam it READS THE IMAGES AND LABELS of this "
    "server's datastore; nothing leaves the machine"
)


def work(
    options: Mapping[str, Any],
    settings: Settings,
    folder: ModelFolder,
    datastore: Datastore,
    report: Reporter,
) -> Outcome:
    """Fine-tunes on what is labelled now, and publishes if that is better.

    Raises:
        ValueError: for options that cannot be used, or too few labels.
    """
    # The server answers clicks without these.
    from monailabel_dfqsam.finetuning.samples import Reader, find_samples

    base, config = read_finetuning(options, settings, NAME)
    labelled = labelled_images(datastore)
    say(f"This training reads {len(labelled)} labelled images of the datastore; nothing leaves here.")
    reader = Reader()
    samples, refused = find_samples(labelled, reader, report)
    checkpoint = read_checkpoint(settings.checkpoint, settings.variant)
    key = config.key(base.key(checkpoint.sha256), [digest(one) for one in labelled])
    report.name(key)
    own_key = settings.quantization.key(checkpoint.sha256)
    # The same labels and choices: it was made before, and was better then.
    header = ready(folder.artifact(key))
    if header is not None:
        return publish(key, header, own_key, settings, folder)
    counts = {"labels": len(labelled) - refused, "left_out": refused}
    making = _Making(base, config, checkpoint, key, settings.min_fidelity, folder, report)
    made = making.better(samples, reader, counts)
    return made if isinstance(made, Outcome) else publish(key, made, own_key, settings, folder)


@dataclass(frozen=True)
class _Making:
    """One artifact in the making.

    Attributes:
        base: the configuration of the artifact to start from.
        key: of the artifact to be made.
        least: fidelity that it needs.
    """

    base: QuantizationConfig
    config: FinetuneConfig
    checkpoint: Checkpoint
    key: str
    least: float
    folder: ModelFolder
    report: Reporter

    def better(
        self, samples: Sequence[Sample], reader: Reader, counts: Mapping[str, int]
    ) -> dict[str, Any] | Outcome:
        """The header of the artifact, in place under its key; or why there is none that is better."""
        from monailabel_dfqsam.finetuning.learning import Judge, finetune
        from monailabel_dfqsam.finetuning.samples import split
        from monailabel_dfqsam.pipeline import fidelity_measure

        learned, judged = split(samples)
        start_key = self.base.key(self.checkpoint.sha256)
        quantized(self.checkpoint, self.base, self.folder, self.report)
        begun = time.monotonic()
        judge, checkpoints = Judge(judged, reader), self._checkpoints()
        measure = fidelity_measure(self.checkpoint, self.base, device=device(), progress=self.report)
        result = finetune(
            read_artifact(self.folder.artifact(start_key)), learned, judge, self.config, checkpoints,
            accept=lambda artifact: bool(measure(artifact)["mean_iou"] >= self.least),
            reader=reader, device=device(), progress=self.report,
        )  # fmt: skip
        rivals = {"before": result.before, **_served_scores(self.folder, judge, start_key)}
        artifact = result.artifact
        if artifact is None or not result.after.mean > max(scores.mean for scores in rivals.values()):
            shutil.rmtree(checkpoints, ignore_errors=True)
            told = ", ".join(
                f"{name} {scores.mean:.3f}" for name, scores in (*rivals.items(), ("after", result.after))
            )
            reason = (
                f"nothing of fidelity {self.least:.3f} was better on images it did not learn from ({told}): "
                "the served model stays"
            )
            return Outcome(RunState.REJECTED, error=reason)
        facts = {
            **counts,
            "learned": _counted(learned),
            "judged": _counted(judged),
            "epochs": result.epochs,
            "config": asdict(self.config),
            "after": result.after.as_json(),
            **{name: scores.as_json() for name, scores in rivals.items()},
        }
        changes = {"finetuning": facts, "fidelity": measure(artifact), "seconds": time.monotonic() - begun}
        header = self._write(artifact, changes)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return header

    def _write(self, artifact: Artifact, changes: Mapping[str, Any]) -> dict[str, Any]:
        header = {
            **artifact.header,
            **changes,
            "key": self.key,
            "preset": None,
            "seed": self.config.seed,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(changes["seconds"], 2),
        }
        self.report("writing", 0, 1)
        building = self.folder.building
        building.mkdir(parents=True, exist_ok=True)
        write_artifact(Artifact(header, artifact.tensors), building / "artifact")
        os.replace(building / "artifact", self.folder.artifact(self.key))
        return header

    def _checkpoints(self) -> Path:
        """Where checkpoints go; those of fine-tunings on other labels or with other options are given up."""
        own = self.folder.path / "finetuning" / self.key
        for other in own.parent.glob("*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        return own


def _served_scores(folder: ModelFolder, judge: Judge, start_key: str) -> dict[str, Scores]:
    """Those of the artifact served now, by 'served'; none where it is the one to start from, or there is
    none that can be read.
    """
    from monailabel_dfqsam.segmentation.segmenter import load_segmenter

    published = folder.published()
    if published is None or published["key"] == start_key:
        return {}
    try:
        return {"served": judge.scores(load_segmenter(read_artifact(folder.artifact(published["key"]))))}
    except ValueError as error:
        logger.warning("The served model cannot be compared with: %s", error)
        return {}


def labelled_images(datastore: Datastore) -> list[Labelled]:
    """Images with a finished label (tag 'final'), by name; those of an archive are fetched.

    The modality is what the datastore's information on the image or on the label says under `modality`, else
    what the image's file says, which is read later.
    """
    from monailabel_dfqsam.finetuning.samples import Labelled

    found = []
    for image in sorted(datastore.get_labeled_images()):
        file = datastore.get_image_uri(image)
        label = datastore.get_label_uri(image, DefaultLabelTag.FINAL)
        if not (file and os.path.exists(file) and label and os.path.isfile(label)):
            logger.warning("An image or its label is not there any more: it is left out")
            continue
        about = (datastore.get_label_info(image, DefaultLabelTag.FINAL), datastore.get_image_info(image))
        told = (info.get("modality") for info in about if isinstance(info, Mapping))
        modality = next((text for text in told if isinstance(text, str) and text.strip()), None)
        found.append(Labelled(Path(file), Path(label), modality))
    return found


def digest(one: Labelled) -> str:
    """Tells a label map with its image and modality from others; changes with the label."""
    content = hashlib.sha256(one.label.read_bytes()).hexdigest()
    return f"{one.image.name} {one.modality} {content}"


def _counted(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(sample.modality for sample in samples).items()))
