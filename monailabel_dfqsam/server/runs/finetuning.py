"""The trainer `dfqsam_qat`: fine-tunes the quantized model on the datastore's finished labels.

Unlike `dfqsam` it reads images and labels of people, which is why it runs only when asked for by its name.
What it learns stays here: an artifact in the model folder, of the same form, behind the same gate, and served
only if it is better than both the artifact it began with and the one served, on images not learned from.
"""

from __future__ import annotations

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

from monailabel_dfqsam.agreement import Fidelity, shortfall
from monailabel_dfqsam.artifact import Artifact, Header, read_artifact, write_artifact
from monailabel_dfqsam.config import FinetuneConfig, QuantizationConfig
from monailabel_dfqsam.identity import artifact_key, content_sha256, finetuned_key
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
    start = artifact_key(base, checkpoint.sha256, checkpoint.variant.name)
    key = finetuned_key(config, start, [digest(one) for one in labelled])
    report.name(key)
    counts = {"labels": len(labelled) - refused, "left_out": refused}
    own = artifact_key(settings.quantization, checkpoint.sha256, checkpoint.variant.name)
    serving = folder.chosen(own)
    making = _Making(
        base, config, checkpoint, start, key, serving, settings.min_fidelity, folder, report, reader, counts
    )
    made = making.again(samples) or making.better(samples)
    return made if isinstance(made, Outcome) else publish(made, own, settings, folder)


@dataclass(frozen=True)
class _Making:
    """One artifact in the making.

    Attributes:
        base: the configuration of the artifact to start from.
        start, key, serving: of that artifact, of the one to be made, and of the one that answers now.
        least: fidelity that it needs, as `shortfall` takes it.
        counts: of label maps, for its header.
    """

    base: QuantizationConfig
    config: FinetuneConfig
    checkpoint: Checkpoint
    start: str
    key: str
    serving: str
    least: float
    folder: ModelFolder
    report: Reporter
    reader: Reader
    counts: Mapping[str, int]

    def again(self, samples: Sequence[Sample]) -> Header | Outcome | None:
        """The header of the artifact made of the same labels and choices before; None without one.

        An Outcome says that what serves now is better.
        """
        from monailabel_dfqsam.finetuning.learning import Judge
        from monailabel_dfqsam.finetuning.samples import split

        header = ready(self.folder, self.key)
        if header is None or self.serving in (self.start, self.key):
            return header  # it was better than the start when it was made
        judge = Judge(split(samples)[1], self.reader)
        after, rivals = self._scores(judge, self.key), self._served(judge)
        if after is None:
            return None
        return header if _surpasses(after, rivals) else self._rejected(after, rivals)

    def better(self, samples: Sequence[Sample]) -> Header | Outcome:
        """The header of the artifact, in place under its key; or why there is none that is better."""
        from monailabel_dfqsam.finetuning.learning import Judge, finetune
        from monailabel_dfqsam.finetuning.samples import split
        from monailabel_dfqsam.pipeline import fidelity_measure

        learned, judged = split(samples)
        quantized(self.checkpoint, self.base, self.folder, self.report)
        self.report.name(self.key)
        begun = time.monotonic()
        judge, checkpoints = Judge(judged, self.reader), self._checkpoints()
        measure = fidelity_measure(self.checkpoint, self.report)
        result = finetune(
            read_artifact(self.folder.artifact(self.start)), learned, judge, self.config, checkpoints,
            accept=lambda artifact: not shortfall(measure(artifact), self.least),
            reader=self.reader, device=device(), progress=self.report,
        )  # fmt: skip
        rivals = {"before": result.before, **self._served(judge)}
        artifact = result.artifact
        if artifact is None or not _surpasses(result.after, rivals):
            shutil.rmtree(checkpoints, ignore_errors=True)
            return self._rejected(result.after, rivals)
        facts = {
            **self.counts,
            "learned": _counted(learned),
            "judged": _counted(judged),
            "epochs": result.epochs,
            "config": asdict(self.config),
            "after": result.after.as_json(),
            **{name: scores.as_json() for name, scores in rivals.items()},
        }
        header = self._write(artifact, facts, measure(artifact), time.monotonic() - begun)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return header

    def _write(self, artifact: Artifact, facts: dict[str, Any], fidelity: Fidelity, seconds: float) -> Header:
        header: Header = {
            **artifact.header,
            "finetuning": facts,
            "fidelity": fidelity,
            "key": self.key,
            "preset": None,
            "seed": self.config.seed,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
        }
        self.report("writing", 0, 1)
        building = self.folder.building
        building.mkdir(parents=True, exist_ok=True)
        write_artifact(Artifact(header, artifact.tensors), building / "artifact")
        os.replace(building / "artifact", self.folder.artifact(self.key))
        return header

    def _served(self, judge: Judge) -> dict[str, Scores]:
        """Those of the artifact that answers now, by 'served'; none where it is the start or this one."""
        scores = None if self.serving in (self.start, self.key) else self._scores(judge, self.serving)
        return {} if scores is None else {"served": scores}

    def _scores(self, judge: Judge, key: str) -> Scores | None:
        """Those of an artifact that is there; None where it cannot be read."""
        from monailabel_dfqsam.segmentation.segmenter import load_segmenter

        try:
            return judge.scores(load_segmenter(read_artifact(self.folder.artifact(key), key)))
        except ValueError as error:
            logger.warning("A model cannot be compared with: %s", error)
            return None

    def _rejected(self, after: Scores, rivals: Mapping[str, Scores]) -> Outcome:
        scores = {**rivals, "after": after}
        told = ", ".join(f"{name} {one.mean:.3f}" for name, one in scores.items())
        reason = (
            f"nothing as near to full precision as {self.least:g} of what that is to itself one grey level "
            f"away was better on images it did not learn from ({told}): the served model stays"
        )
        return Outcome(RunState.REJECTED, error=reason)

    def _checkpoints(self) -> Path:
        """Where checkpoints go; those of fine-tunings on other labels or with other options are given up."""
        own = self.folder.path / "finetuning" / self.key
        for other in own.parent.glob("*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        return own


def _surpasses(after: Scores, rivals: Mapping[str, Scores]) -> bool:
    return all(after.mean > scores.mean for scores in rivals.values())


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
    """Tells a label map with its image and modality from others, by name and content."""
    return f"{one.image.name} {one.modality} {content_sha256(one.image)} {content_sha256(one.label)}"


def _counted(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(sample.modality for sample in samples).items()))
