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
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag

from monailabel_dfqsam.artifact import Artifact, read_artifact, write_artifact
from monailabel_dfqsam.config import FinetuneConfig, Policy, QuantizationConfig
from monailabel_dfqsam.server.options import OptionError, finetuning_defaults, read_finetuning
from monailabel_dfqsam.server.settings import Settings
from monailabel_dfqsam.server.train_report import Reporter, say
from monailabel_dfqsam.server.train_task import PublishingTask, device, quantized, ready

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
NEEDED = "fine-tuning needs the package brevitas: pip install 'monailabel-dfqsam[qat]' on the server"


class FinetuneTask(PublishingTask):
    """MONAI Label's view of quantization-aware fine-tuning."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, DESCRIPTION, settings)

    def config(self) -> dict[str, Any]:
        """The options that a viewer shows."""
        return finetuning_defaults(self._settings)

    def check(self, request: Mapping[str, Any]) -> None:
        """Raises OptionError for a request that `__call__` could not serve."""
        from importlib.util import find_spec

        read_finetuning(request, self._settings, self._name)
        if find_spec("brevitas") is None:
            raise OptionError(NEEDED)
        if self._settings.quantization.policy is not Policy.DEPLOY:
            raise OptionError("only models of policy 'deploy' can be fine-tuned")

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Fine-tunes on what is labelled now, and publishes if that is better.

        Returns:
            `stats()` at the end.

        Raises:
            ValueError: for options that cannot be used, or too few labels.
        """
        self.check(request)
        start, config = read_finetuning(request, self._settings, self._name)
        options = {
            "trainer": self._name,
            "bits": start.bits,
            "sampling": config.sampling.value,
            "max_epochs": config.max_epochs,
            "seed": config.seed,
            "checkpoint": self._settings.checkpoint.name,
        }
        return self._reported(options, lambda report: self._run(start, config, datastore, report))

    def _run(
        self, base: QuantizationConfig, config: FinetuneConfig, datastore: Datastore, report: Reporter
    ) -> None:
        # The server answers clicks without these.
        from monailabel_dfqsam.finetuning.samples import Reader, find_samples
        from monailabel_dfqsam.sam import read_checkpoint

        labelled = labelled_images(datastore)
        say(f"This training reads {len(labelled)} labelled images of the datastore; nothing leaves here.")
        reader = Reader()
        samples, refused = find_samples(labelled, reader, report)
        checkpoint = read_checkpoint(self._settings.checkpoint, self._settings.variant)
        start_key = base.key(checkpoint.sha256)
        key = config.key(start_key, [digest(one) for one in labelled])
        report.name(key)
        # The same labels and choices: it was made before, and was better then.
        header = ready(self._folder.artifact(key))
        if header is None:
            counts = {"labels": len(labelled) - refused, "left_out": refused}
            artifact = self._better(base, config, checkpoint, key, samples, reader, counts, report)
            if artifact is None:
                return
            header = artifact.header
        own_key = self._settings.quantization.key(checkpoint.sha256)
        self._publish(key, float(header["fidelity"]["mean_iou"]), own_key, report)

    def _better(
        self, base: QuantizationConfig, config: FinetuneConfig, checkpoint: Checkpoint, key: str,
        samples: Sequence[Sample], reader: Reader, counts: Mapping[str, int], report: Reporter,
    ) -> Artifact | None:  # fmt: skip
        """Makes an artifact, in place under its key; None, as the report then says, when it is not better."""
        from monailabel_dfqsam.finetuning.learning import Judge, finetune
        from monailabel_dfqsam.finetuning.samples import split
        from monailabel_dfqsam.pipeline import fidelity_measure

        learned, judged = split(samples)
        folder, start_key = self._folder, base.key(checkpoint.sha256)
        quantized(checkpoint, base, folder, report)
        begun = time.monotonic()
        judge, work = Judge(judged, reader), self._work(key)
        start = read_artifact(folder.artifact(start_key))
        measure = fidelity_measure(checkpoint, base, device=device(), progress=report)
        least = self._settings.min_fidelity
        result = finetune(
            start, learned, judge, config, work,
            accept=lambda artifact: bool(measure(artifact)["mean_iou"] >= least),
            reader=reader, device=device(), progress=report,
        )  # fmt: skip
        rivals = {"before": result.before, **self._served_scores(judge, start_key)}
        artifact = result.artifact
        if artifact is None or not result.after.mean > max(scores.mean for scores in rivals.values()):
            shutil.rmtree(work, ignore_errors=True)
            told = ", ".join(
                f"{name} {scores.mean:.3f}" for name, scores in (*rivals.items(), ("after", result.after))
            )
            reason = (
                f"nothing of fidelity {least:.3f} was better on images it did not learn from ({told}): "
                "the served model stays"
            )
            report.end("rejected", error=reason)
            return None
        facts = {
            **counts,
            "learned": _counted(learned),
            "judged": _counted(judged),
            "epochs": result.epochs,
            "config": asdict(config),
            "after": result.after.as_json(),
            **{name: scores.as_json() for name, scores in rivals.items()},
        }
        header = {
            **artifact.header,
            "key": key,
            "preset": None,
            "seed": config.seed,
            "finetuning": facts,
            "fidelity": measure(artifact),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begun, 2),
        }
        artifact = Artifact(header, artifact.tensors)
        report("writing", 0, 1)
        folder.building.mkdir(parents=True, exist_ok=True)
        write_artifact(artifact, folder.building / "artifact")
        os.replace(folder.building / "artifact", folder.artifact(key))
        shutil.rmtree(work, ignore_errors=True)
        return artifact

    def _work(self, key: str) -> Path:
        """Where checkpoints go; those of fine-tunings on other labels or with other options are given up."""
        own = self._folder.path / "finetuning" / key
        for other in own.parent.glob("*"):
            if other != own:
                shutil.rmtree(other, ignore_errors=True)
        return own

    def _served_scores(self, judge: Judge, start_key: str) -> dict[str, Scores]:
        """Those of the artifact served now, by 'served'; none where it is the one to start from, or there is
        none that can be read.
        """
        from monailabel_dfqsam.segmentation.segmenter import load_segmenter

        published = self._folder.published()
        if published is None or published["key"] == start_key:
            return {}
        try:
            return {
                "served": judge.scores(load_segmenter(read_artifact(self._folder.artifact(published["key"]))))
            }
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
