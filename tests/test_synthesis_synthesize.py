from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from monailabel_dfqsam.config import SynthesisConfig, silent
from monailabel_dfqsam.sam import VARIANTS, Sam
from monailabel_dfqsam.sam.preprocess import input_range
from monailabel_dfqsam.synthesis import synthesize as module
from monailabel_dfqsam.synthesis.auxiliary import Auxiliary
from monailabel_dfqsam.synthesis.synthesize import (
    COLOUR,
    LOSSES,
    Augmentation,
    Synthesis,
    embed,
    from_model,
    image_generator,
    learning_rate,
    mute,
    synthesize,
    to_model,
)
from tests.models import seeded_sam

SHORT = SynthesisConfig(iterations=4)
RANGE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def sam() -> Sam:
    return seeded_sam("tiny")


class Dots(torch.nn.Module):
    """Three classes from brightness and colour, by a fixed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 3, 4, stride=4)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.convolution.weight.copy_(torch.randn(3, 3, 4, 4, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.convolution(x)
        return result


def short(sam: Sam, seed: int = 0, images: int = 1, auxiliary: Auxiliary | None = None) -> Synthesis:
    return synthesize(
        sam, SHORT, images=images, seed=seed, auxiliary=auxiliary, ceiling=None, progress=silent
    )


def test_same_seed_same_bytes_whatever_the_number_of_images(sam: Sam) -> None:
    two = short(sam, seed=3, images=2)
    again = short(sam, seed=3)
    assert two.images.shape == (2, 3, 256, 256)
    assert two.images.dtype == torch.float32
    assert torch.equal(two.images[:1], again.images)
    assert two.losses[0] == again.losses[0]
    assert not torch.equal(two.images[0], two.images[1])


def test_blocks_that_run_again_for_the_gradient_give_the_same_bytes_and_keep_less(
    sam: Sam, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, kept = short(sam), _kept(sam)
    monkeypatch.setattr(module, "KEPT_TOKENS", 255)  # it has 256
    again = short(sam)
    assert torch.equal(made.images, again.images)
    assert made.losses == again.losses
    assert _kept(sam) < 0.25 * kept


def _kept(sam: Sam) -> int:
    """Bytes that an encoder run holds for its gradient."""
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    weights = {value.untyped_storage().data_ptr() for value in sam.image_encoder.parameters()}
    image = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = embed(sam.image_encoder, image)
    assert result.requires_grad
    return sum(size for place, size in sizes.items() if place not in weights)


def test_another_seed_another_image(sam: Sam) -> None:
    assert not torch.equal(short(sam, seed=0).images, short(sam, seed=1).images)


def test_does_not_touch_the_global_generator_nor_the_model(sam: Sam) -> None:
    before = {key: value.clone() for key, value in sam.state_dict().items()}
    state = torch.get_rng_state()
    short(sam)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in sam.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in sam.parameters())


@pytest.mark.parametrize("with_auxiliary", [True, False])
def test_losses_fall_and_images_stay_in_range(sam: Sam, with_auxiliary: bool) -> None:
    auxiliary = Auxiliary(Dots()) if with_auxiliary else None
    config = SynthesisConfig(iterations=16)
    result = synthesize(sam, config, images=1, seed=0, auxiliary=auxiliary, ceiling=None, progress=silent)
    (losses,) = result.losses
    assert set(losses) == set(LOSSES)
    assert all(len(values) == 16 and all(map(math.isfinite, values)) for values in losses.values())
    assert sum(losses["total"][-5:]) < sum(losses["total"][:5])
    assert sum(losses["similarity"][-5:]) < sum(losses["similarity"][:5])
    assert (max(losses["class"]) > 0) is with_auxiliary
    low, high = input_range(sam.variant)
    assert bool((result.images.amin((0, 2, 3)) >= low - RANGE_TOLERANCE).all())
    assert bool((result.images.amax((0, 2, 3)) <= high + RANGE_TOLERANCE).all())


@pytest.mark.parametrize("with_auxiliary", [True, False])
def test_evolution_is_recorded_from_the_ellipse_to_its_last_iteration(sam: Sam, with_auxiliary: bool) -> None:
    config = SynthesisConfig(iterations=12, min_score=0.3)
    auxiliary = Auxiliary(Dots()) if with_auxiliary else None
    result = synthesize(sam, config, images=1, seed=1, auxiliary=auxiliary, ceiling=None, progress=silent)
    (steps,) = result.evolution
    assert steps[0].iteration == 0
    assert steps[-1].iteration == config.evolution_iterations
    kinds = {0, 2, 3} if with_auxiliary else {0, 1}
    for step in steps:
        assert step.labels.shape == (64, 64)
        assert step.labels.dtype == torch.int64
        assert set(step.labels.unique().tolist()) <= kinds
        assert bool((step.labels > 0).any())
        assert 0 <= step.score <= 1


def test_progress_counts_every_iteration_of_every_image(sam: Sam) -> None:
    calls: list[tuple[str, int, int]] = []
    synthesize(
        sam,
        SynthesisConfig(iterations=2),
        images=2,
        seed=0,
        auxiliary=None,
        ceiling=None,
        progress=lambda *call: calls.append(call),
    )
    assert calls == [("synthesis", done, 4) for done in (1, 2, 3, 4)]


def test_refuses_no_images(sam: Sam) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        short(sam, images=0)


def test_zero_weights_switch_terms_off(sam: Sam) -> None:
    config = replace(SHORT, beta=0.0, tv_weight=0.0)
    result = synthesize(sam, config, images=1, seed=0, auxiliary=None, ceiling=None, progress=silent)
    assert result.losses[0]["total"] == pytest.approx(result.losses[0]["mask"])


def test_entropy_beyond_the_ceiling_earns_nothing(sam: Sam) -> None:
    ceiling = torch.full((6,), -11.0)  # below what images that are all alike have
    config = SynthesisConfig(iterations=12)

    def similarities(bound: torch.Tensor | None) -> list[float]:
        made = synthesize(sam, config, images=1, seed=0, auxiliary=None, ceiling=bound, progress=silent)
        return made.losses[0]["similarity"]

    bounded, free = similarities(ceiling), similarities(None)
    assert bounded == [66.0] * 12
    assert max(free) < 66
    assert free[-1] < free[0]


def test_labels_that_do_not_evolve_stay_as_they_began(sam: Sam) -> None:
    config = SynthesisConfig(iterations=6, evolve=False)
    result = synthesize(sam, config, images=1, seed=0, auxiliary=None, ceiling=None, progress=silent)
    assert [step.iteration for step in result.evolution[0]] == [0]


def test_steps_show_the_image_as_it_was(sam: Sam) -> None:
    config = SynthesisConfig(iterations=9)
    result = synthesize(sam, config, images=1, seed=0, auxiliary=None, ceiling=None, progress=silent)
    (steps,) = result.evolution
    assert all(step.image.shape == (3, 128, 128) and step.image.dtype == torch.uint8 for step in steps)
    assert not torch.equal(steps[0].image, steps[-1].image)


@pytest.mark.parametrize("seed", range(12))
def test_augmentation_moves_image_and_labels_alike_and_undoes_it(seed: int) -> None:
    view = Augmentation.draw(torch.Generator().manual_seed(seed), 256, 4)
    assert max(abs(view.down), abs(view.right)) * 4 <= 15
    labels = torch.randint(0, 5, (64, 64), generator=torch.Generator().manual_seed(99))
    image = labels.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None].float()
    assert torch.equal(view.apply(image, 4)[0, 0, ::4, ::4], view.apply(labels).float())
    assert torch.equal(view.undo(view.apply(labels)), labels)


def test_augmentation_reaches_further_in_larger_images() -> None:
    views = [Augmentation.draw(torch.Generator().manual_seed(s), 1024, 4) for s in range(200)]
    assert max(abs(view.down) for view in views) * 4 == 60
    assert {view.flip for view in views} == {True, False}


def test_learning_rate_warms_up_and_restarts_every_500() -> None:
    config = SynthesisConfig(iterations=1500)
    rates = [learning_rate(step, config) for step in range(1500)]
    assert rates[:500] == rates[500:1000] == rates[1000:]
    assert rates[0] == pytest.approx(0.002)
    assert rates[99] == rates[100] == 0.2
    assert rates[300] == pytest.approx(0.1)
    assert rates[499] < 0.001


def test_short_runs_have_a_short_warm_up() -> None:
    rates = [learning_rate(step, SynthesisConfig(iterations=50)) for step in range(50)]
    assert max(rates) == rates[9] == rates[10] == 0.2
    assert [learning_rate(0, SynthesisConfig(iterations=1))] == [0.2]


@pytest.mark.parametrize("name", ["tiny", "sam_med2d_b", "medsam"])
def test_images_come_back_from_what_a_model_takes(name: str) -> None:
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_model(VARIANTS[name], to_model(VARIANTS[name], image)), image)


@pytest.mark.parametrize("name", ["tiny", "sam_med2d_b", "medsam"])
def test_black_and_white_reach_the_ends_of_every_models_range(name: str) -> None:
    low, high = input_range(VARIANTS["tiny"])
    ends = torch.stack([low, high]).view(2, 3, 1, 1)
    converted = to_model(VARIANTS[name], ends).view(2, 3)
    expected = torch.stack(input_range(VARIANTS[name]))
    torch.testing.assert_close(converted, expected)


def test_muting_keeps_greys_and_the_range_and_a_share_of_the_colour() -> None:
    low, high = (bound.view(3, 1, 1) for bound in input_range(VARIANTS["tiny"]))
    unit = torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.0], [0.5, 0.2, 0.0]]).view(1, 3, 1, 3)
    muted = (mute(low + unit * (high - low), (low, high)) - low) / (high - low)
    # (1.0, 0.0, 0.2) has the grey level 0.4.
    expected = [0.4 + COLOUR * 0.6, 0.4 - COLOUR * 0.4, 0.4 - COLOUR * 0.2]
    assert muted[0, :, 0, 0].tolist() == pytest.approx([0.5] * 3, abs=RANGE_TOLERANCE)
    assert muted[0, :, 0, 1].tolist() == pytest.approx(expected, abs=RANGE_TOLERANCE)
    assert muted[0, :, 0, 2].tolist() == pytest.approx([0.0] * 3, abs=RANGE_TOLERANCE)


def test_images_are_nearly_grey_and_start_from_grey_noise(sam: Sam) -> None:
    (image,) = synthesize(
        sam, replace(SHORT, iterations=1), images=1, seed=0, auxiliary=None, ceiling=None, progress=silent
    ).images
    low, high = (bound.view(3, 1, 1) for bound in input_range(sam.variant))
    unit = (image - low) / (high - low)
    assert float(unit.std(0).mean()) < 0.1 * float(unit.mean(0).std())
    assert 0.5 < float(image.std()) < 1.5


def test_generators_of_seeds_and_indices_differ() -> None:
    draws = {float(torch.rand((), generator=image_generator(s, i))) for s in range(5) for i in range(5)}
    assert len(draws) == 25
