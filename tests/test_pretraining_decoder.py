"""Training of prompt encoder and mask decoder alone, on embeddings that are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from monailabel_dfqsam.pretraining import decoder
from monailabel_dfqsam.pretraining.decoder import DECODER_CONFIG, View, embedded_views, train_decoder
from monailabel_dfqsam.pretraining.phantoms import eight_bit
from monailabel_dfqsam.pretraining.targets import MIN_AREA
from monailabel_dfqsam.sam import VARIANTS, Sam, build, read_checkpoint
from monailabel_dfqsam.sam.preprocess import to_input

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "GROUP", 3)
    monkeypatch.setattr(decoder, "SHOWN", 2)


def _views(sam: Sam, seed: int, start: int, count: int) -> list[View]:
    return list(islice(embedded_views(sam.image_encoder, sam.variant, seed, start, CPU), count))


def test_stream_is_the_same_wherever_it_starts() -> None:
    sam = build(read_checkpoint("tiny"))
    views = _views(sam, 0, 0, 9)
    for start in (2, 7):
        (view,) = _views(sam, 0, start, 1)
        assert torch.equal(view.tokens, views[start].tokens)
        assert torch.equal(view.embedding, views[start].embedding)
        assert torch.equal(view.example.masks, views[start].example.masks)
        assert view.g.initial_seed() == views[start].g.initial_seed()
    assert len({view.embedding.numpy().tobytes() for view in views[:6]}) == 3
    assert len({view.g.initial_seed() for view in views}) == len(views)


def test_objects_lie_in_what_is_seen() -> None:
    """Embeddings are of the cut image, padded as every image is."""
    shapes = set()
    for view in _views(build(read_checkpoint("tiny")), 1, 0, 24):
        rows, columns = view.example.image.shape[1:]
        shapes.add((rows, columns))
        assert not view.example.masks[:, rows:].any()
        assert not view.example.masks[:, :, columns:].any()
        assert (view.example.masks.sum((1, 2)) >= MIN_AREA).all()
        assert view.embedding.dtype == view.tokens.dtype == torch.float16
    assert len(shapes) > 1


def test_what_is_kept_is_the_embedding_of_the_image_undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    sam = build(read_checkpoint("tiny"))
    disturbed = _views(sam, 5, 0, 3)
    monkeypatch.setattr(decoder, "_disturbed", lambda _, rgb: rgb)
    plain = _views(sam, 5, 0, 3)
    differ = 0
    for one, other in zip(disturbed, plain, strict=True):
        assert torch.equal(one.embedding, other.embedding)
        differ += not torch.equal(one.tokens, other.tokens)
        size = sam.variant.input_size
        rows, columns = other.example.image.shape[1:]
        x, _ = to_input(sam.variant, eight_bit(other.example.image[:, :rows, :columns]))
        with torch.no_grad():
            exact = sam.image_encoder(x)
        assert x.shape[-1] == size
        assert float((other.embedding - exact).norm() / exact.norm()) < 0.05
        last = sam.image_encoder.steps()[-decoder.LEARNING_STEPS :]
        tokens = other.tokens.float()
        with torch.no_grad():
            for name, step in last:
                tokens = sam.image_encoder.after(name, step(tokens))
        assert float((tokens - exact).norm() / exact.norm()) < 0.05
    assert 0 < differ < 3


def test_a_part_shows_what_the_whole_shows_there() -> None:
    views = _views(build(read_checkpoint("tiny")), 2, 0, 6)
    again = [replace(view, g=torch.Generator().manual_seed(7)) for view in views]
    embeddings = torch.cat([view.embedding for view in views])
    seen, batch = decoder._batch(embeddings, again, 2, CPU)
    size = batch["masks"].shape[-1]
    assert seen.shape[-1] * 16 == size == 128
    for i, view in enumerate(views):
        x, y = batch["corners"][i].tolist()
        assert torch.equal(seen[i], view.embedding[0, :, y : y + 8, x : x + 8])
        parts = view.example.masks[:, 16 * y : 16 * y + size, 16 * x : 16 * x + size]
        for mask, box, point in zip(batch["masks"][i], batch["boxes"][i], batch["points"][i], strict=True):
            assert any(torch.equal(mask, part) for part in parts)
            assert mask.any()
            assert mask[int(point[1]), int(point[0])] == 1
            assert float(box.min()) >= 0
            assert float(box.max()) <= size
    _, whole = decoder._batch(embeddings, again, 1, CPU)
    assert not whole["corners"].any()
    assert whole["masks"].shape[-1] == 256


def test_disturbing_is_slight_and_not_of_every_image() -> None:
    rgb = np.tile(np.linspace(20, 230, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    seen = [decoder._disturbed(torch.Generator().manual_seed(seed), rgb) for seed in range(20)]
    same = [np.array_equal(one, rgb) for one in seen]
    assert 4 < sum(same) < 16
    assert all(np.abs(one.astype(int) - rgb).mean() < 30 for one in seen)


def test_the_last_steps_learn_and_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    start = read_checkpoint("tiny")

    def trained(folder: Path, *steps: int) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for count in steps:
            config = replace(DECODER_CONFIG, steps=count, batch=1, save_every=1, cooldown=0, warmup=1)
            path = train_decoder(folder, config, CPU, lambda *_: None, start, VARIANTS["tiny"])
        return read_checkpoint(path, "tiny").state_dict

    whole, resumed = trained(tmp_path / "whole", 3), trained(tmp_path / "resumed", 1, 3)
    assert set(whole) == set(start.state_dict)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=2e-3)
    before = {name: value.half().float() for name, value in start.state_dict.items()}
    changed = {name for name, value in whole.items() if not torch.equal(value, before[name])}
    last = [name for name, _ in build(start).image_encoder.steps()[-decoder.LEARNING_STEPS :]]
    for part in ("mask_decoder.", "prompt_encoder.", *(f"image_encoder.{name}." for name in last)):
        assert any(name.startswith(part) for name in changed), part
    steady = {name for name in whole if name.startswith("image_encoder.")} - {
        name for name in whole if name.startswith(tuple(f"image_encoder.{step}." for step in last))
    }
    assert steady
    assert not steady & changed


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tiny' cannot start 'lite'"):
        train_decoder(
            tmp_path, replace(DECODER_CONFIG, steps=1), CPU, lambda *_: None, read_checkpoint("tiny")
        )
