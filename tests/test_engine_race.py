"""The race of engines: who wins, who is out, and when it is run again."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from monailabel_dfqsam import engines
from monailabel_dfqsam.artifact import Artifact, read_artifact, stored, write_artifact
from monailabel_dfqsam.config import EngineKind, Policy
from monailabel_dfqsam.engines import candidates, onednn, why_not
from monailabel_dfqsam.engines import openvino as engine_openvino
from monailabel_dfqsam.engines.onednn import OnednnEncoder
from monailabel_dfqsam.memory import MemoryShortage
from monailabel_dfqsam.ops import openvino_library
from monailabel_dfqsam.ops.saturation import WRONG
from monailabel_dfqsam.segmentation import engine_race
from monailabel_dfqsam.segmentation.engine_race import LEAST_AGREEMENT, Entrant, Race, load_fastest
from monailabel_dfqsam.segmentation.segmenter import load_segmenter
from tests.models import seeded_sam
from tests.test_engines import make_artifact
from tests.test_ops_saturation import split

needs_openvino = pytest.mark.skipif(
    openvino_library.why_absent() is not None, reason=f"{openvino_library.why_absent()}"
)
pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN quantized linear")


def whole(artifact: Artifact, variant: str) -> Artifact:
    """With the tensors of prompt encoder and mask decoder."""
    state = seeded_sam(variant).state_dict()
    rest = {k: stored(v) for k, v in state.items() if k.startswith(("prompt_encoder.", "mask_decoder."))}
    return replace(artifact, tensors={**artifact.tensors, **rest})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("race") / "a.safetensors"
    write_artifact(whole(make_artifact("tiny"), "tiny"), path)
    return read_artifact(path)


@pytest.fixture(autouse=True)
def two_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Races of `onednn` and the oracle alone, and of OpenVINO where a test is of that."""
    kinds = [EngineKind.ONEDNN, EngineKind.REFERENCE]
    kinds += [EngineKind.OPENVINO] if "openvino" in request.node.name else []
    found = lambda a: [kind for kind in candidates(a) if kind in kinds]  # noqa: E731
    monkeypatch.setattr(engine_race, "candidates", found)


def races(caplog: pytest.LogCaptureFixture) -> int:
    return sum("Engine chosen" in record.getMessage() for record in caplog.records)


def test_engines_say_why_not(artifact: Artifact) -> None:
    assert candidates(artifact)[-1] is EngineKind.REFERENCE
    assert EngineKind.ONEDNN in candidates(artifact)
    paper = make_artifact("tiny", policy=Policy.PAPER)
    assert candidates(paper) == [EngineKind.REFERENCE]
    assert "which only the reference engine runs" in str(why_not(EngineKind.ONEDNN, paper))
    if not torch.cuda.is_available():
        assert why_not(EngineKind.CUTLASS) is not None


def test_the_fastest_wins_with_the_reference_engines_masks(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    record = tmp_path / "a.engines.json"
    segmenter, race = load_fastest(artifact, record)
    by_engine = {entrant.engine: entrant for entrant in race.entrants}
    seconds = {kind: entrant.seconds for kind, entrant in by_engine.items()}
    assert race.winner is min(seconds, key=lambda kind: seconds[kind] or np.inf)
    assert by_engine[EngineKind.ONEDNN].agreement >= LEAST_AGREEMENT  # type: ignore[operator]
    assert segmenter.name == f"W4A4 ({race.winner.value})"
    assert race.seconds == seconds[race.winner]
    assert f"{race.winner.value} of {len(seconds)}: " in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [record.name]


def test_it_is_run_once_for_the_same_conditions(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    record = tmp_path / "a.engines.json"
    _, first = load_fastest(artifact, record)
    assert load_fastest(artifact, record)[1] == first
    assert races(caplog) == 1
    told = json.loads(record.read_text())
    told["conditions"]["cpu"] = "another"
    record.write_text(json.dumps(told))
    load_fastest(artifact, record)
    assert races(caplog) == 2
    record.write_text("{")
    load_fastest(artifact, record)
    assert races(caplog) == 3
    load_fastest(replace(artifact, header={**artifact.header, "tensors_sha256": "another"}), record)
    assert races(caplog) == 4


def test_a_remembered_winner_is_loaded_as_it_is(artifact: Artifact, tmp_path: Path) -> None:
    record = tmp_path / "a.engines.json"
    load_fastest(artifact, record)
    record.write_text(record.read_text().replace('"winner": "onednn"', '"winner": "reference"'))
    assert load_fastest(artifact, record)[0].name == "W4A4 (reference)"


def test_a_folder_that_cannot_be_written_to_does_no_harm(
    artifact: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    segmenter, race = load_fastest(artifact, tmp_path / "missing" / "a.engines.json")
    assert segmenter.name == f"W4A4 ({race.winner.value})"
    assert "run again at the next start" in caplog.text


def test_an_engine_that_draws_other_masks_is_out(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = OnednnEncoder.embed

    def wrong(self: OnednnEncoder, images: Tensor) -> Tensor:
        return right(self, images).flip(3)

    monkeypatch.setattr(OnednnEncoder, "embed", wrong)
    segmenter, race = load_fastest(artifact, tmp_path / "a.engines.json")
    assert race.winner is EngineKind.REFERENCE
    assert segmenter.name == "W4A4 (reference)"
    assert "The engine onednn is not used: its masks agree" in caplog.text
    assert load_fastest(artifact, tmp_path / "a.engines.json")[1].winner is EngineKind.REFERENCE


def test_an_engine_that_fails_is_out(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: OnednnEncoder, images: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(OnednnEncoder, "embed", fail)
    assert load_fastest(artifact, tmp_path / "a.engines.json")[1].winner is EngineKind.REFERENCE
    assert "The engine onednn is not used: it failed: no kernel image" in caplog.text


def test_of_a_large_model_masks_are_compared_once_and_it_is_said(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine_race, "_QUICK_PRODUCTS", 0)
    record = tmp_path / "a.engines.json"
    _, race = load_fastest(artifact, record)
    agreement = {entrant.engine: entrant.agreement for entrant in race.entrants}
    assert agreement.keys() == {EngineKind.ONEDNN, EngineKind.REFERENCE}
    assert agreement[EngineKind.ONEDNN] >= LEAST_AGREEMENT  # type: ignore[operator]
    assert load_fastest(artifact, record)[1] == race
    said = [r.getMessage() for r in caplog.records if "draws the masks to compare with" in r.getMessage()]
    assert len(said) == 1


@needs_openvino
def test_openvino_races_where_its_model_is_made_in_seconds(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "a.engines.json"
    entrants = {entrant.engine: entrant for entrant in load_fastest(artifact, record)[1].entrants}
    assert entrants.keys() == {EngineKind.ONEDNN, EngineKind.OPENVINO, EngineKind.REFERENCE}
    assert entrants[EngineKind.OPENVINO].agreement >= LEAST_AGREEMENT  # type: ignore[operator]
    assert json.loads(record.read_text())["conditions"]["openvino"] == version("openvino")
    monkeypatch.setattr(engine_race, "_QUICK_PRODUCTS", 0)
    record.unlink()
    entrants = {entrant.engine: entrant for entrant in load_fastest(artifact, record)[1].entrants}
    assert entrants.keys() == {EngineKind.ONEDNN, EngineKind.REFERENCE}


@needs_openvino
def test_openvino_is_out_where_its_sums_saturate_in_halves_too(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its products as those of a processor whose sums of two end at 13 bit."""
    monkeypatch.setattr(engine_openvino, "multiplied", functools.partial(split, 1 << 13))
    engine_openvino.in_halves.cache_clear()
    try:
        race = load_fastest(artifact, tmp_path / "a.engines.json")[1]
    finally:
        engine_openvino.in_halves.cache_clear()
    problems = {entrant.engine: entrant.problem for entrant in race.entrants}
    assert WRONG in str(problems[EngineKind.OPENVINO])
    assert race.winner is not EngineKind.OPENVINO
    assert f"The engine openvino is not used: it failed: the engine 'openvino' cannot run here: {WRONG}" in (
        caplog.text
    )


@needs_openvino
def test_a_remembered_race_loads_no_openvino_for_another_winner(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_race, "candidates", candidates)  # as in the process below
    path, record = tmp_path / "a.safetensors", tmp_path / "a.engines.json"
    write_artifact(artifact, path)
    load_fastest(read_artifact(path), record)
    told = json.loads(record.read_text())
    assert "openvino" in told["conditions"]["engines"]
    told["winner"] = "onednn"
    record.write_text(json.dumps(told))
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from monailabel_dfqsam.artifact import read_artifact\n"
        "from monailabel_dfqsam.segmentation.engine_race import load_fastest\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "_, race = load_fastest(read_artifact(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "print(race.winner.value, 'openvino' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(record)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["onednn", "False"], done.stderr


def test_a_remembered_winner_that_fails_now_is_raced_again(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "a.engines.json"
    load_fastest(artifact, record)
    record.write_text(record.read_text().replace('"winner": "reference"', '"winner": "onednn"'))

    def fail(self: OnednnEncoder, artifact: Artifact) -> None:
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(engines._ENCODERS[EngineKind.ONEDNN], "__init__", fail)
    assert load_fastest(artifact, record)[1].winner is EngineKind.REFERENCE
    assert "The engine onednn, chosen earlier, fails: could not create a primitive" in caplog.text


@pytest.mark.parametrize(
    ("error", "lasts"),
    [
        (ImportError("libkernels.so: cannot open shared object file"), True),
        (OSError(5, "Input/output error"), True),
        (AttributeError("no such primitive"), True),
        (MemoryError(), False),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_engine_that_fails_is_out_and_one_that_lacks_memory_may_race_again(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, lasts: bool
) -> None:
    record = tmp_path / "a.engines.json"

    def fail(self: OnednnEncoder, artifact: Artifact) -> None:
        raise error

    monkeypatch.setattr(engines._ENCODERS[EngineKind.ONEDNN], "__init__", fail)
    assert load_fastest(artifact, record)[1].winner is EngineKind.REFERENCE
    assert record.exists() == lasts


def test_where_no_engine_has_memory_it_is_said_so(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(artifact: Artifact, engine: EngineKind) -> None:
        raise MemoryError

    monkeypatch.setattr(engine_race, "load_segmenter", fail)
    with pytest.raises(MemoryShortage, match="memory ran out for the engine onednn"):
        load_fastest(artifact, tmp_path / "a.engines.json")


def test_where_one_engine_works_nobody_races(tmp_path: Path) -> None:
    paper = whole(make_artifact("tiny", policy=Policy.PAPER), "tiny")
    segmenter, race = load_fastest(paper, tmp_path / "a.engines.json")
    assert (race, segmenter.name) == (Race(EngineKind.REFERENCE), "W4A4 (reference)")
    assert list(tmp_path.iterdir()) == []
    assert "the only engine that works here" in race.sentence()


def test_agreement_is_of_all_masks_together() -> None:
    a = np.zeros((2, 4, 4), dtype=bool)
    b = a.copy()
    a[0, :, :] = b[0, :, :] = True
    b[1, 0, 0] = True  # a mask of one pixel that the other engine does not draw
    assert engine_race._agreement(a, b) == pytest.approx(16 / 17)
    assert engine_race._agreement(a[1:], a[1:]) == 1


def test_masks_of_the_race_are_real(artifact: Artifact) -> None:
    run = engine_race._run(load_segmenter(artifact, EngineKind.ONEDNN), engine_race._image())
    assert run.masks.shape == (8, 256, 256)
    assert run.masks.any()


def test_a_model_that_rounding_alone_moves_keeps_its_fast_engine(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = engine_race._image()
    oracle = engine_race._run(load_segmenter(artifact, EngineKind.REFERENCE), image)
    assert engine_race._agrees(LEAST_AGREEMENT, oracle, image)
    assert not engine_race._agrees(0.8, oracle, image)  # this model's masks hardly move
    turned = oracle._replace(masks=np.roll(oracle.masks, 2, axis=1))  # one whose own differ
    own = engine_race._agreement(turned.masks, oracle.masks)
    assert own < LEAST_AGREEMENT
    assert engine_race._agrees(1 - 1.5 * (1 - own), turned, image)
    assert not engine_race._agrees(1 - 2.5 * (1 - own), turned, image)


def test_the_sentence_names_all_by_speed() -> None:
    race = Race(
        EngineKind.ONEDNN,
        (
            Entrant(EngineKind.REFERENCE, 0.2, 1.0),
            Entrant(EngineKind.CUTLASS, None, problem="it failed: x"),
            Entrant(EngineKind.ONEDNN, 0.0041, 0.9995),
        ),
    )
    expected = "onednn of 3: onednn 4.1 ms, agreement 1.000; reference 200.0 ms; cutlass it failed: x"
    assert race.sentence() == expected
