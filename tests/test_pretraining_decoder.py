"""Training of prompt encoder and mask decoder alone, on embeddings that are kept."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from monailabel_dfqsam.pretraining import decoder
from monailabel_dfqsam.pretraining.decoder import DECODER_CONFIG, embedded_views, train_decoder
from monailabel_dfqsam.pretraining.targets import MIN_AREA
from monailabel_dfqsam.sam import VARIANTS, build, read_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _few_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "GROUP", 3)
    monkeypatch.setattr(decoder, "SHOWN", 2)


def test_stream_is_the_same_wherever_it_starts() -> None:
    sam = build(read_checkpoint())
    views = list(islice(embedded_views(sam, 0, 0, CPU), 9))
    for start in (2, 7):
        embedding, example, g = next(embedded_views(sam, 0, start, CPU))
        assert torch.equal(embedding, views[start][0])
        assert torch.equal(example.masks, views[start][1].masks)
        assert g.initial_seed() == views[start][2].initial_seed()
    shown = [embedding for embedding, _, _ in views[:6]]
    assert len({embedding.numpy().tobytes() for embedding in shown}) == 3
    prompts = {g.initial_seed() for _, _, g in views}
    assert len(prompts) == len(views)


def test_objects_lie_in_what_is_seen() -> None:
    """Embeddings are of the cut image, padded as every image is."""
    sam = build(read_checkpoint())
    shapes = set()
    for embedding, example, _ in islice(embedded_views(sam, 1, 0, CPU), 24):
        rows, columns = example.image.shape[1:]
        shapes.add((rows, columns))
        assert not example.masks[:, rows:].any()
        assert not example.masks[:, :, columns:].any()
        assert (example.masks.sum((1, 2)) >= MIN_AREA).all()
        assert embedding.dtype == torch.float16
    assert len(shapes) > 1


def test_a_part_shows_what_the_whole_shows_there() -> None:
    sam = build(read_checkpoint())
    views = list(islice(embedded_views(sam, 2, 0, CPU), 6))
    again = [(embedding, example, torch.Generator().manual_seed(7)) for embedding, example, _ in views]
    embedding, batch = decoder._batch(again, 2, CPU)
    size = batch["masks"].shape[-1]
    assert embedding.shape[-1] * 16 == size == 128
    for i, (whole, example, _) in enumerate(views):
        x, y = batch["corners"][i].tolist()
        assert torch.equal(embedding[i], whole[0, :, y : y + 8, x : x + 8].float())
        parts = example.masks[:, 16 * y : 16 * y + size, 16 * x : 16 * x + size]
        for mask, box, point in zip(batch["masks"][i], batch["boxes"][i], batch["points"][i], strict=True):
            assert any(torch.equal(mask, part) for part in parts)
            assert mask.any()
            assert mask[int(point[1]), int(point[0])] == 1
            assert float(box.min()) >= 0
            assert float(box.max()) <= size
    _, whole = decoder._batch(again, 1, CPU)
    assert not whole["corners"].any()
    assert whole["masks"].shape[-1] == 256


def test_disturbing_is_slight_and_not_of_every_image() -> None:
    rgb = np.tile(np.linspace(20, 230, 64).astype(np.uint8)[:, None, None], (1, 64, 3))
    seen = [decoder._disturbed(torch.Generator().manual_seed(seed), rgb) for seed in range(20)]
    same = [np.array_equal(one, rgb) for one in seen]
    assert 4 < sum(same) < 16
    assert all(np.abs(one.astype(int) - rgb).mean() < 30 for one in seen)


def test_the_encoder_stays_and_what_was_cut_off_goes_on(tmp_path: Path) -> None:
    start = read_checkpoint()

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
    unchanged = {name for name, value in whole.items() if torch.equal(value, before[name])}
    assert {name for name in whole if name.startswith("image_encoder.")} <= unchanged
    assert len(unchanged) < len(whole)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tiny' cannot start 'lite'"):
        train_decoder(tmp_path, replace(DECODER_CONFIG, steps=1), CPU, lambda *_: None, read_checkpoint())
