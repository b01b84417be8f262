"""Fine-tuning: it starts as the artifact, learns what labels show, and loses nothing when interrupted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from monailabel_dfqsam.artifact import Artifact
from monailabel_dfqsam.config import (
    Calibration,
    EngineKind,
    FinetuneConfig,
    Policy,
    QuantizationConfig,
    Recipe,
    Sampling,
    SynthesisConfig,
    silent,
)
from monailabel_dfqsam.engines import load_encoder
from monailabel_dfqsam.pipeline import gaussian_images, pack, phantom_images
from monailabel_dfqsam.quantization.calibrate import calibrate
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from tests.models import relative_error, seeded_checkpoint

pytest.importorskip("brevitas", reason="brevitas is not installed: pip install 'monailabel-dfqsam[qat]'")

from monailabel_dfqsam.finetuning import learning
from monailabel_dfqsam.finetuning.learning import Finetuned, Judge, Scores, finetune
from monailabel_dfqsam.finetuning.prompted import CLICKS, JITTER, Ask, PromptLoss, asked, ious
from monailabel_dfqsam.finetuning.samples import (
    LEAST_EPOCH,
    LEAST_PIXELS,
    SLICES,
    Labelled,
    ModalitySampler,
    NothingToLearn,
    Reader,
    Sample,
    find_samples,
    split,
)
from monailabel_dfqsam.finetuning.trainable import Quantizer, TrainableLayer, to_artifact, trainable

# One rounding tipped by another order of sums runs through all later layers of W4A4.
START_ERROR = 0.05


def quantized(variant: str, bits: int) -> Artifact:
    checkpoint = read_checkpoint("tiny") if variant == "tiny" else seeded_checkpoint(variant)
    sam = build(checkpoint)
    config = QuantizationConfig(
        bits=bits, calibration=Calibration.GAUSSIAN, images=1, synthesis=SynthesisConfig(iterations=2)
    )
    images = gaussian_images(checkpoint.variant, 1, 0)
    found = calibrate(sam.image_encoder, images, bits, Policy.DEPLOY, Recipe(), silent)
    return pack(checkpoint, config, sam, found, images)


@pytest.fixture(scope="module")
def start() -> Artifact:
    return quantized("tiny", 4)


def draw_picture(folder: Path, number: int, dark: bool = False) -> Labelled:
    """A disc, of which the label marks the heart alone: nothing that a model could know."""
    generator = np.random.default_rng(number)
    row, column = generator.integers(60, 130, 2)
    rows, columns = np.indices((192, 224))
    radius = np.hypot(rows - row, columns - column)
    disc, heart = radius < 40, radius < 20
    values = np.full((192, 224), 200.0 if dark else 50.0)
    values[disc] = 60 if dark else 190
    values[20:50, 170:210] = 120
    values += generator.normal(0, 6, values.shape)
    image, label = folder / f"picture{number}.png", folder / f"label{number}.nrrd"
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(image)
    sitk.WriteImage(sitk.GetImageFromArray(heart.astype(np.uint8)), str(label))
    return Labelled(image, label, "US" if dark else "MR")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Labelled]:
    folder = tmp_path_factory.mktemp("pictures")
    return [draw_picture(folder, number, dark=number % 4 == 3) for number in range(8)]


class TestTrainable:
    @pytest.mark.parametrize("bits", [4, 8])
    def test_before_the_first_step_it_is_the_artifact(self, bits: int) -> None:
        artifact = quantized("tiny", bits)
        sam = trainable(artifact)
        images = phantom_images(sam.variant, [7])
        with torch.no_grad():
            found = sam.image_encoder(images)
        exact = load_encoder(artifact, EngineKind.REFERENCE).embed(images)
        assert relative_error(found, exact) < START_ERROR
        unchanged = to_artifact(sam, artifact)
        assert unchanged.tensors.keys() == artifact.tensors.keys()
        for name, tensor in artifact.tensors.items():
            torch.testing.assert_close(unchanged.tensors[name], tensor, rtol=1e-6, atol=0)

    def test_of_convolutions_too(self) -> None:
        artifact = quantized("lite_medsam", 8)
        sam = trainable(artifact)
        same = to_artifact(sam, artifact)
        assert same.tensors.keys() == artifact.tensors.keys()
        for name, tensor in artifact.tensors.items():
            torch.testing.assert_close(same.tensors[name], tensor, rtol=1e-6, atol=0)

    def test_a_changed_weight_comes_out_as_an_integer_of_its_scale(self, start: Artifact) -> None:
        sam = trainable(start)
        name = "blocks.0.mlp.lin1"
        layer = sam.image_encoder.get_submodule(name)
        assert isinstance(layer, TrainableLayer)
        before = layer.quantized()
        row, column = (int(n) for n in (before.weight == 3).nonzero()[0])
        with torch.no_grad():
            layer.weight[row, column] += 2 * before.weight_scale[row]
            layer.weight[0, 0] = 100 * before.weight_scale[0]  # beyond the levels
        after = layer.quantized()
        assert after.weight[row, column] == 5
        assert after.weight[0, 0] == 7
        assert int((after.weight != before.weight).sum()) <= 2

    def test_gradients_are_those_of_learned_step_sizes(self) -> None:
        """Against the formulae of arXiv 1902.08153, element by element."""
        x = torch.tensor([-0.31, 0.02, 0.26, 5.0], dtype=torch.float32, requires_grad=True)
        quantizer = Quantizer(torch.tensor([0.1]), 2, 4, signed=False)
        quantizer(x).sum().backward()
        # −0.31 and 5.0 lie outside 0 … 15 after the zero-point: no gradient passes, the scale feels the end.
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))
        by_scale = (0 - 2) + (0 - 0.2) + (3 - 2.6) + (15 - 2)
        parameter = quantizer.scaling.value
        # The parameter is the scale's logarithm of base 2.
        expected = by_scale * 0.1 * float(np.log(2))
        torch.testing.assert_close(parameter.grad, torch.tensor([expected]), rtol=1e-4, atol=1e-6)


class TestSamples:
    def test_objects_of_a_volume_on_slices_spread_over_them(self, tmp_path: Path) -> None:
        labels = np.zeros((40, 30, 25), dtype=np.uint8)
        labels[5:15, 5:15, 2:22] = 1
        labels[20:30, 10:20, 10:12] = 4
        labels[35, 3, 5] = 7  # a single voxel is nothing to learn from
        affine = np.diag([-1.0, 2.0, 3.0, 1.0])
        nibabel.save(nibabel.Nifti1Image(labels * 10.0, affine), tmp_path / "image.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "label.nii.gz")
        one = Labelled(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz")
        samples, refused = find_samples([one], Reader())
        assert refused == 0
        places = {value: [s.k for s in samples if s.value == value] for value in (1, 4, 7)}
        assert len(places[1]) == SLICES
        assert (places[1][0], places[1][-1]) == (2, 21)
        assert places[4] == [10, 11]
        assert places[7] == []
        assert {s.modality for s in samples} == {"other"}

    def test_a_label_on_another_grid_is_brought_to_the_image(self, tmp_path: Path) -> None:
        """As another program may write it: axes reversed, in the same place."""
        labels = np.zeros((40, 30, 6), dtype=np.uint8)
        labels[5:15, 8:20, 3] = 1
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        turned = affine @ np.array([[-1, 0, 0, 39], [0, 1, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1.0]])
        nibabel.save(nibabel.Nifti1Image(labels * 100.0, affine), tmp_path / "image.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels[::-1, :, ::-1].copy(), turned), tmp_path / "label.nii.gz")
        one = Labelled(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", "mr")
        (sample,), _ = find_samples([one], Reader())
        assert (sample.k, sample.modality) == (3, "MR")
        np.testing.assert_array_equal(Reader().read(sample)["mask"][0], labels[:, :, 3].T)

    def test_what_does_not_fit_is_left_out_and_counted(
        self, tmp_path: Path, pictures: list[Labelled]
    ) -> None:
        (tmp_path / "broken.nrrd").write_bytes(b"NRRD0004\nno")
        wrong = replace(pictures[0], label=tmp_path / "broken.nrrd")
        samples, refused = find_samples([wrong, pictures[1]], Reader())
        assert refused == 1
        assert {s.image for s in samples} == {pictures[1].image}

    def test_no_image_is_learned_from_and_judged_by(self, pictures: list[Labelled]) -> None:
        samples, _ = find_samples(pictures, Reader())
        learned, judged = split(samples)
        assert {s.image for s in learned}.isdisjoint({s.image for s in judged})
        assert {s.modality for s in judged} == {"MR", "US"}
        assert len(learned) + len(judged) == len(samples)

    def test_more_labels_hardly_move_the_split(self) -> None:
        """An image's place in the order hangs on its name alone."""

        def side(count: int) -> tuple[set[Path], set[Path]]:
            places = [Path(f"image{n}.nrrd") for n in range(count)]
            samples = [Sample(place, place, 1, 0, "CT") for place in places]
            learned, judged = split(samples)
            return {s.image for s in learned}, {s.image for s in judged}

        learned, judged = side(40)
        more_learned, more_judged = side(48)
        assert len(judged & more_judged) >= 8
        assert len(learned & more_judged) <= 2
        assert len(more_learned) + len(more_judged) == 48

    def test_one_image_is_too_little(self, pictures: list[Labelled]) -> None:
        samples, _ = find_samples(pictures[:1], Reader())
        with pytest.raises(NothingToLearn, match="at least 2"):
            split(samples)

    @given(
        st.lists(st.sampled_from(["CT", "MR", "US"]), min_size=1, max_size=90),
        st.integers(22, 40),
        st.integers(0, 5),
        st.sampled_from(Sampling),
    )
    def test_shares(self, modalities: list[str], cap: int, seed: int, sampling: Sampling) -> None:
        sampler = ModalitySampler(modalities, sampling, seed, cap)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) >= LEAST_EPOCH
        shares = Counter(modalities[i] for i in drawn)
        assert set(shares) <= set(modalities)
        if sampling is Sampling.BALANCED:
            assert set(shares) == set(modalities)
            assert len(set(shares.values())) == 1
            assert max(shares.values()) <= max(cap, -(-LEAST_EPOCH // len(shares)))
        # Nothing is drawn again before all of its group was drawn as often.
        groups = [set(modalities)] if sampling is Sampling.NATURAL else [{name} for name in shares]
        for group in groups:
            times = [Counter(drawn)[i] for i, own in enumerate(modalities) if own in group]
            assert max(times) - min(times) <= 1

    def test_epochs_differ_and_can_be_gone_on_with(self) -> None:
        modalities = ["CT"] * 30 + ["US"] * 4
        first = ModalitySampler(modalities, Sampling.BALANCED, 3)
        epochs = [list(first) for _ in range(3)]
        assert epochs[0] != epochs[1]
        second = ModalitySampler(modalities, Sampling.BALANCED, 3)
        second.load_state_dict({"epoch": 2})
        assert list(second) == epochs[2]


class TestPrompts:
    def test_prompts_and_target_lie_on_the_object(self, pictures: list[Labelled]) -> None:
        (sample,), _ = find_samples(pictures[:1], Reader())
        found = Reader().read(sample)
        box, clicks = asked(
            read_checkpoint("tiny").variant, found["image"], found["mask"], np.random.RandomState(3)
        )
        inside = found["mask"][0] > 0
        rows, columns = np.nonzero(inside)
        scale = np.array([256 / inside.shape[1], 256 / inside.shape[0]])
        edges = np.array([[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]) * scale - 0.5
        side = edges[1] - edges[0]
        assert box.boxes is not None
        drawn = box.boxes.numpy().reshape(2, 2)
        assert (np.abs(drawn - edges) <= JITTER * side + 1e-3).all()
        assert (drawn != edges).all()
        assert clicks.points is not None
        assert len(clicks.points) == CLICKS
        for x, y in (clicks.points.numpy() + 0.5) / scale:
            assert inside[int(y), int(x)]
        assert float(box.target.mean()) == pytest.approx(inside.mean(), rel=0.02)

    def test_augmented_prompts_stay_on_the_object(self, pictures: list[Labelled]) -> None:
        (sample,), _ = find_samples(pictures[:1], Reader())
        found = Reader().read(sample)
        ask = Ask(read_checkpoint("tiny").variant).set_random_state(5)
        several = [ask(found) for _ in range(6)]
        for _, clicks in several:
            assert clicks.points is not None
            for x, y in clicks.points.numpy():
                assert clicks.target[0, 0, int((y + 0.5) / 4), int((x + 0.5) / 4)] > 0
        again = Ask(read_checkpoint("tiny").variant).set_random_state(5)
        torch.testing.assert_close(again(found)[0].image, several[0][0].image)
        assert found["mask"].sum() >= LEAST_PIXELS

    def test_the_best_candidate_learns_and_the_others_do_not(self) -> None:
        target = torch.zeros(1, 1, 16, 16)
        target[..., 4:12, 4:12] = 1
        good = (target * 4 - 2) * 0.5
        first = torch.cat([good, -good, good * 0.9, torch.zeros_like(good) - 1], 1)
        logits = torch.cat([first, first.roll(1, 1)]).requires_grad_()
        PromptLoss()(logits, torch.zeros(2, 4), target).backward()
        assert logits.grad is not None
        changed = logits.grad.abs().sum((2, 3)) > 0
        # Of the second prompt all is one place further on; its single answer is the one that is nothing.
        assert changed.tolist() == [[True, False, True, False], [True, True, False, False]]
        assert ious(logits.detach(), target).tolist() == [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]


def run(
    start: Artifact, pictures: list[Labelled], folder: Path, epochs: int, patience: int = 12
) -> Finetuned:
    samples, _ = find_samples(pictures, Reader())
    learned, judged = split(samples)
    config = FinetuneConfig(max_epochs=epochs, patience=patience, learning_rate=2e-3)
    return finetune(start, learned, Judge(judged, Reader()), config, folder)


def test_images_teach_the_same_one_at_a_time_and_together(
    start: Artifact, pictures: list[Labelled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, _ = find_samples(pictures, Reader())
    judge = Judge(split(samples)[1][:1], Reader())
    config = FinetuneConfig(batch=3)
    ask = Ask(VARIANTS[start.header["variant"]]).set_random_state(0)
    batch = [ask(Reader().read(sample)) for sample in samples[:3]]

    def gradients() -> list[torch.Tensor]:
        session = learning._Session(
            start, samples, judge, lambda artifact: True, config, tmp_path, Reader(), None, silent
        )
        session._step(session._trainer, batch)
        return [p.grad for p in session._parameters if p.grad is not None]

    together = gradients()
    monkeypatch.setattr(learning, "_NUMBERS_AT_ONCE", 1)
    for alone, of_all in zip(gradients(), together, strict=True):
        torch.testing.assert_close(alone, of_all, rtol=1e-3, atol=1e-5)


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not hang on how much is learned."""
    monkeypatch.setattr("monailabel_dfqsam.finetuning.samples.LEAST_EPOCH", 8)


@pytest.mark.slow
class TestLearning:
    @pytest.fixture(scope="class")
    @classmethod
    def whole(
        cls, start: Artifact, pictures: list[Labelled], tmp_path_factory: pytest.TempPathFactory
    ) -> Finetuned:
        return run(start, pictures, tmp_path_factory.mktemp("whole"), 3)

    def test_it_becomes_better_at_what_the_labels_show(self, whole: Finetuned, start: Artifact) -> None:
        assert whole.artifact is not None
        assert whole.after.mean > whole.before.mean + 0.02
        assert whole.artifact.header["layers"].keys() == start.header["layers"].keys()
        load_segmenter(whole.artifact, EngineKind.REFERENCE)

    @pytest.mark.slow
    @pytest.mark.usefixtures("short_epochs")
    def test_interrupted_it_ends_as_if_it_had_not_been(
        self, start: Artifact, pictures: list[Labelled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = run(start, pictures, tmp_path / "whole", 3)

        class Killed(BaseException):
            pass

        judging, judged, folder = learning._Session._judge_epoch, [], tmp_path / "interrupted"

        def until_the_third(self: object, engine: object) -> None:
            if len(judged) == 2:
                raise Killed
            judged.append(1)
            judging(self, engine)  # type: ignore[arg-type]

        monkeypatch.setattr(learning._Session, "_judge_epoch", until_the_third)
        with pytest.raises(Killed):
            run(start, pictures, folder, 3)
        monkeypatch.setattr(learning._Session, "_judge_epoch", judging)
        # The newest checkpoint cut short, as by a power cut: the one before it counts.
        newest = max(folder.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns)
        newest.write_bytes(newest.read_bytes()[:1000])
        gone_on = run(start, pictures, folder, 3)
        assert gone_on.after.mean == pytest.approx(whole.after.mean, abs=1e-6)
        assert gone_on.artifact is not None
        assert whole.artifact is not None
        for name, tensor in whole.artifact.tensors.items():
            torch.testing.assert_close(gone_on.artifact.tensors[name], tensor)

    @pytest.mark.usefixtures("short_epochs")
    def test_it_ends_when_nothing_becomes_better(
        self, start: Artifact, pictures: list[Labelled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Judge, "scores", lambda self, segmenter: Scores({"MR": 0.5}, {"MR": 0.5}))
        found = run(start, pictures, tmp_path, 10, patience=2)
        assert found.epochs == 2
        assert found.artifact is None

    @pytest.mark.usefixtures("short_epochs")
    def test_what_may_not_be_served_counts_as_no_better(
        self, start: Artifact, pictures: list[Labelled], tmp_path: Path
    ) -> None:
        samples, _ = find_samples(pictures, Reader())
        learned, judged = split(samples)
        config = FinetuneConfig(max_epochs=5, patience=1, learning_rate=2e-3)
        asked_about: list[Artifact] = []

        def refuse(artifact: Artifact) -> bool:
            asked_about.append(artifact)
            return False

        judge = Judge(judged, Reader())
        found = finetune(start, learned, judge, config, tmp_path, accept=refuse)
        assert len(asked_about) == found.epochs == 1
        assert found.artifact is None
        assert found.after == found.before
