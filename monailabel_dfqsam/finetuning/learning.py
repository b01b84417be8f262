"""Fine-tuning itself: MONAI's trainer on samples, judged after each epoch as the product answers.

In the working folder lie the last two checkpoints, everything needed to go on after an interruption, and the
best artifact so far. Each appears in one step. Going on gives what an uninterrupted training gives: what is
drawn in an epoch hangs on the seed and the epoch alone.
"""

from __future__ import annotations

import logging
import pickle
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping, EMAHandler
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.metrics import compute_iou
from monai.transforms import Compose, Transform
from numpy.typing import NDArray
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, ArtifactError, Header, read_artifact, write_artifact
from monailabel_dfqsam.config import FinetuneConfig, Progress, silent
from monailabel_dfqsam.finetuning.prompted import Ask, Asked, PromptLoss, answer, random_pixels
from monailabel_dfqsam.finetuning.samples import ModalitySampler, Reader, Sample
from monailabel_dfqsam.finetuning.trainable import to_artifact, trainable
from monailabel_dfqsam.masks import interior_pixel, tight_box
from monailabel_dfqsam.segmentation.segmenter import Prompts, Segmenter, load_segmenter

logger = logging.getLogger(__name__)

_CACHE_BYTES = 1 << 30
_NUMBERS_AT_ONCE = 1 << 21
"""In the widest step of an encoder, of images whose gradients are computed together: a large one's of a whole
batch take more memory than small machines have."""
_MOMENTUM = 0.02
"""Of the average of the last weights, which is judged and kept: integers flip to and fro while it learns."""
_CLICKS = 4
"""Judged by beside the one in the middle: where one click leads says little."""
_PREFIX = "after"
_BEST = "best.safetensors"


@dataclass(frozen=True)
class Scores:
    """How well a model answers: mean IoU, 0 … 1, of tight boxes and of single clicks, by modality."""

    box: Mapping[str, float]
    point: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Of both kinds of prompt, every modality counting the same."""
        return statistics.mean([*self.box.values(), *self.point.values()])

    def as_json(self) -> dict[str, Any]:
        """{mean, box, point}."""
        return {"mean": self.mean, **asdict(self)}


@dataclass(frozen=True)
class Finetuned:
    """The end of a fine-tuning.

    Attributes:
        artifact: the best one; None where none was better than the start.
        before: the start's scores.
        after: the artifact's, or the best that was reached.
        epochs: how many were gone through.
    """

    artifact: Artifact | None
    before: Scores
    after: Scores
    epochs: int


class Judge:
    """Scores models on samples that nothing is learned from; raises ValueError for files it cannot read."""

    def __init__(self, samples: Sequence[Sample], reader: Reader) -> None:
        self._cases: list[tuple[str, NDArray[np.uint8], NDArray[np.bool_]]] = []
        for sample in samples:
            found = reader.read(sample)
            rgb = found["image"].astype(np.uint8).transpose(1, 2, 0)
            self._cases.append((sample.modality, np.ascontiguousarray(rgb), found["mask"][0] > 0))

    def scores(self, segmenter: Segmenter) -> Scores:
        """Of a model as the product answers with it; about mirrored images too, since there may be few."""
        found: dict[str, dict[str, list[float]]] = {"box": {}, "point": {}}
        for modality, rgb, mask in self._cases:
            for axes in ((), (0,), (1,), (0, 1)):
                for kind, ious in _answered(segmenter, np.flip(rgb, axes), np.flip(mask, axes)).items():
                    found[kind].setdefault(modality, []).extend(ious)
        means = {
            kind: {name: statistics.mean(values) for name, values in sorted(groups.items())}
            for kind, groups in found.items()
        }
        return Scores(means["box"], means["point"])


def finetune(
    start: Artifact,
    learned: Sequence[Sample],
    judge: Judge,
    config: FinetuneConfig,
    folder: Path,
    *,
    accept: Callable[[Artifact], bool] = lambda artifact: True,
    reader: Reader | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> Finetuned:
    """Fine-tunes an artifact on samples; goes on where an earlier call with the same arguments was stopped.

    Args:
        start: of policy `deploy`.
        judge: decides which epoch is the best and when to end.
        folder: for checkpoints, of this fine-tuning alone; the caller removes it when all is done.
        accept: whether an artifact may be served; asked of each that is better than all before, and what may
            not counts as no better.
        device: where to learn; the CPU by default.
        progress: called with ('learning', steps done, steps at most).

    Raises:
        ArtifactError: when the artifact's tensors are not those of its model.
        ValueError: for files that cannot be read.
        OSError: when the disk is full.
    """
    torch.manual_seed(config.seed)
    session = _Session(start, learned, judge, accept, config, folder, reader or Reader(), device, progress)
    return session.run()


class _Session:
    """The parts of one fine-tuning; `run` is called once."""

    def __init__(
        self,
        start: Artifact,
        learned: Sequence[Sample],
        judge: Judge,
        accept: Callable[[Artifact], bool],
        config: FinetuneConfig,
        folder: Path,
        reader: Reader,
        device: torch.device | None,
        progress: Progress,
    ) -> None:
        self._start, self._judge, self._config, self._folder = start, judge, config, folder
        self._accept, self._progress = accept, progress
        self._device = device or torch.device("cpu")
        self._sam = trainable(start).to(self._device)
        self._parameters = [p for p in self._sam.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=config.learning_rate, weight_decay=0.0)
        self._loss = PromptLoss()
        self._ask = Ask(self._sam.variant)
        self._sampler = ModalitySampler([s.modality for s in learned], config.sampling, config.seed)
        loader = _loader(learned, reader, self._ask, self._sampler, config.batch)
        self._trainer = SupervisedTrainer(
            device=self._device,
            max_epochs=config.max_epochs,
            train_data_loader=loader,
            network=self._sam,
            optimizer=self._optimizer,
            loss_function=self._loss,
            iteration_update=self._step,
        )
        self._trainer.logger.setLevel(logging.WARNING)
        self._average = EMAHandler(self._sam, momentum=_MOMENTUM)
        self._stopping = EarlyStopping(config.patience, lambda engine: engine.state.score, self._trainer)
        self._best: _Best = _Best(None, judge.scores(load_segmenter(start)))

    def run(self) -> Finetuned:
        trainer, before = self._trainer, self._best.scores
        self._stopping.best_score = before.mean
        self._folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        trainer.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        self._average.attach(trainer, event=Events.ITERATION_COMPLETED)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._tell)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._judge_epoch)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stopping)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._saver())
        if self._stopping.counter < self._config.patience and trainer.state.epoch < self._config.max_epochs:
            trainer.run()
        return Finetuned(self._best.artifact, before, self._best.scores, trainer.state.epoch)

    def _step(self, _: Engine, batch: list[list[Asked]]) -> dict[str, Any]:
        """One step on a batch, of each image what is asked about it; {loss}."""
        self._sam.train()
        self._optimizer.zero_grad(set_to_none=True)
        at_once = max(1, _NUMBERS_AT_ONCE // self._sam.variant.widest)
        count, total = sum(map(len, batch)), 0.0
        for first in range(0, len(batch), at_once):
            loss = self._summed(batch[first : first + at_once]) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return {"loss": total}

    def _summed(self, images: list[list[Asked]]) -> Tensor:
        """The sum of the losses of all that is asked about some images."""
        embeddings = self._sam.image_encoder(torch.cat([about[0].image for about in images]).to(self._device))
        losses = []
        for embedding, about in zip(embeddings.split(1), images, strict=True):
            for one in (each.to(self._device) for each in about):
                logits, scores = answer(self._sam, embedding, one)
                losses.append(self._loss(logits, scores, one.target))
        return torch.stack(losses).sum()

    def _begin_epoch(self, engine: Engine) -> None:
        self._ask.set_random_state(self._config.seed * 1_000_003 + engine.state.epoch)

    def _tell(self, engine: Engine) -> None:
        state: Any = engine.state
        self._progress("learning", state.iteration, self._config.max_epochs * state.epoch_length)

    def _judge_epoch(self, engine: Engine) -> None:
        averaged: Any = self._average.ema_model
        artifact = to_artifact(averaged, self._start)
        scores = self._judge.scores(load_segmenter(artifact))
        state: Any = engine.state
        logger.info("Epoch %d: loss %.4f, score %.4f", state.epoch, state.output["loss"], scores.mean)
        state.score = min(scores.mean, self._best.scores.mean)
        if scores.mean > self._best.scores.mean and self._accept(artifact):
            state.score = scores.mean
            self._best = _Best(artifact, scores)
            self._best.write(self._folder)

    def _parts(self) -> dict[str, Any]:
        return {
            "sam": self._sam, "average": self._average.ema_model, "optimizer": self._optimizer,
            "trainer": self._trainer, "stopping": self._stopping, "sampler": self._sampler,
        }  # fmt: skip

    def _saver(self) -> Checkpoint:
        disk = DiskSaver(str(self._folder), atomic=True, create_dir=False, require_empty=False)
        return Checkpoint(
            self._parts(), disk, filename_prefix=_PREFIX, n_saved=2, include_self=False,
            global_step_transform=lambda engine, _: engine.state.epoch,
        )  # fmt: skip

    def _resume(self) -> None:
        """From the newest checkpoint that is whole, with the best artifact of then."""
        for path in sorted(self._folder.glob(f"{_PREFIX}*.pt"), key=lambda p: -p.stat().st_mtime_ns):
            try:
                saved = torch.load(path, map_location=self._device, weights_only=True)
                Checkpoint.load_objects(self._parts(), saved)
            except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
                logger.warning("A checkpoint of fine-tuning cannot be read: %s", error)
                continue
            self._best = _Best.read(self._folder) or self._best
            logger.info("Going on after epoch %d", self._trainer.state.epoch)
            return


@dataclass(frozen=True)
class _Best:
    artifact: Artifact | None
    scores: Scores

    def write(self, folder: Path) -> None:
        assert self.artifact is not None
        header: Header = {**self.artifact.header, "scores": asdict(self.scores)}
        write_artifact(Artifact(header, self.artifact.tensors), folder / _BEST)

    @staticmethod
    def read(folder: Path) -> _Best | None:
        """None where no epoch has been better than the start, or the file is damaged."""
        try:
            artifact = read_artifact(folder / _BEST)
        except ArtifactError:
            return None
        return _Best(artifact, Scores(**artifact.header.pop("scores")))


class _Read(Transform):  # type: ignore[misc]
    """`Reader.read` as a transform of MONAI's, so that its results are cached."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __call__(self, sample: Sample) -> dict[str, NDArray[np.float32]]:
        return self._reader.read(sample)


def _loader(
    learned: Sequence[Sample], reader: Reader, ask: Ask, sampler: ModalitySampler, batch: int
) -> DataLoader:
    """Batches as lists of `Asked`; images are kept in memory up to `_CACHE_BYTES`."""
    first = reader.read(learned[0])
    room = _CACHE_BYTES // sum(array.nbytes for array in first.values())
    data = CacheDataset(
        list(learned), Compose([_Read(reader), ask]), cache_num=room, num_workers=None, progress=False
    )
    return DataLoader(data, batch_size=batch, sampler=sampler, num_workers=0, collate_fn=list)


def _answered(
    segmenter: Segmenter, rgb: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> dict[str, list[float]]:
    """IoUs of a model's answers to the tight box, and to a click in the middle and some elsewhere."""
    rgb, mask = np.ascontiguousarray(rgb), np.ascontiguousarray(mask)
    embedding = segmenter.embed(rgb)
    row, column = interior_pixel(mask)
    # The same ones whichever model is judged.
    elsewhere = random_pixels(mask, _CLICKS, np.random.RandomState(row * mask.shape[1] + column))
    clicks = [np.array([[column + 0.5, row + 0.5]]), *np.split(elsewhere, _CLICKS)]
    truth = torch.from_numpy(mask)[None, None]

    def iou(prompts: Prompts) -> float:
        drawn = torch.from_numpy(segmenter.predict(embedding, prompts).mask)
        return float(compute_iou(drawn[None, None], truth))

    inside = np.ones(1, dtype=np.int64)
    return {
        "box": [iou(Prompts(box=tight_box(mask)))],
        "point": [iou(Prompts(click, inside)) for click in clicks],
    }
