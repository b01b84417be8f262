"""Every form of a layer, alone and mixed within a model, on every engine here."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monailabel_dfqsam.artifact import Artifact, ArtifactError
from monailabel_dfqsam.config import EngineKind
from monailabel_dfqsam.engines import candidates, cutlass, load_encoder, onednn, openvino, reference, why_not
from monailabel_dfqsam.engines.cutlass import GraphlessForward
from monailabel_dfqsam.engines.encoder import IntegerBlock, IntegerLinear
from monailabel_dfqsam.engines.onednn import onednn_kernel
from monailabel_dfqsam.engines.reference import reference_kernel
from monailabel_dfqsam.finetuning.trainable import TrainableLayer
from monailabel_dfqsam.ops import Geometry, QuantizedLayer, openvino_library, plain, quantized, row_rounded
from monailabel_dfqsam.pipeline import gaussian_images
from monailabel_dfqsam.sam import VARIANTS
from tests.forms import KINDS, SMALL, W4A4, W4A8, W8A8, Kind, artifact_of, hard_rows, nearest, static_range
from tests.models import relative_error

PRODUCT_TOLERANCE = 2e-6
# A rounding that falls the other way is passed on: pixels changed by 1e-6 move the reference engine's own
# embedding by up to 0.04.
EMBEDDING_TOLERANCE = 0.1


@pytest.fixture(params=SMALL)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(VARIANTS, name, SMALL[name])
    return name


def uniform(kind: Kind, name: str, module: nn.Module) -> Kind | None:
    """All layers of a kind."""
    return kind


def mixed(seed: int, name: str, module: nn.Module) -> Kind | None:
    """A kind by chance, or none."""
    kinds = (None, *KINDS)
    return kinds[zlib.crc32(f"{seed} {name}".encode()) % len(kinds)]


ASSIGNMENTS = {
    **{str(kind[:3]): functools.partial(uniform, kind) for kind in (W8A8, W4A4)},
    **{f"mixed {seed}": functools.partial(mixed, seed) for seed in range(2)},
    "floats": functools.partial(uniform, None),
}


def image(artifact: Artifact) -> Tensor:
    return gaussian_images(VARIANTS[artifact.header["variant"]], 2, seed=5)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_engines_agree_on_every_mixture(family: str, assignment: str) -> None:
    artifact = artifact_of(family, ASSIGNMENTS[assignment])
    images = image(artifact)
    expected = load_encoder(artifact, EngineKind.REFERENCE).embed(images)
    assert expected.isfinite().all()
    for kind in set(candidates(artifact)) - {EngineKind.REFERENCE, EngineKind.CUTLASS}:
        actual = load_encoder(artifact, kind).embed(images)
        assert relative_error(actual, expected) <= EMBEDDING_TOLERANCE, kind


def test_eight_bits_are_near_full_precision_and_floats_are_it(family: str) -> None:
    exact = artifact_of(family, ASSIGNMENTS["floats"])
    images = image(exact)
    whole = load_encoder(exact, EngineKind.REFERENCE).embed(images)
    errors = {
        kind: relative_error(
            load_encoder(artifact_of(family, functools.partial(uniform, kind)), EngineKind.REFERENCE).embed(
                images
            ),
            whole,
        )
        for kind in (W8A8, W4A8, W4A4)
    }
    assert errors[W8A8] < 0.05
    assert errors[W8A8] < errors[W4A8] < errors[W4A4]


def test_a_block_with_a_float_layer_runs_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", SMALL["tiny"])
    artifact = artifact_of("tiny", lambda name, _: None if name == "blocks.1.mlp.lin2" else W4A8)
    encoder = load_encoder(artifact, EngineKind.ONEDNN).encoder  # type: ignore[attr-defined]
    fused = [isinstance(block, IntegerBlock) for block in encoder.blocks]
    assert fused == [True, False, True]
    assert isinstance(encoder.blocks[1].mlp.lin1, IntegerLinear)
    assert isinstance(encoder.blocks[1].mlp.lin2, nn.Linear)


@pytest.mark.parametrize("columns", [1, 31, 77, 144, 1024])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_onednn_multiplies_as_the_reference_does(kind: Kind, columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    x = hard_rows(columns, 45, columns)
    x[6::9, :1] = 50
    weight, bias = torch.randn(33, columns, generator=g), torch.randn(33, generator=g)
    layer = nearest(weight, bias, kind, None, static_range(x, kind) if kind.static else None)
    rows, residual = plain.quantize_input(x, layer), torch.randn(45, 33, generator=g)
    fast, slow = onednn_kernel(layer), reference_kernel(layer)
    assert relative_error(fast(rows), slow(rows)) <= PRODUCT_TOLERANCE
    assert relative_error(fast(rows, residual.clone()), slow(rows, residual.clone())) <= PRODUCT_TOLERANCE


GEOMETRIES = {
    "linear": None,
    "pointwise": Geometry(1, 1, 0),
    "patches": Geometry(4, 4, 0),
    "padded": Geometry(3, 1, 1),
    "transposed": Geometry(4, 2, 1, transposed=True),
}


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_module_of_any_engine_is_its_rounded_input_times_its_weight(kind: Kind, name: str) -> None:
    geometry = GEOMETRIES[name]
    if geometry is not None and geometry.kernel > 1:
        kind = kind._replace(weight_bits=8, activation_bits=8, grouped=False)
    transposed = geometry is not None and geometry.transposed
    taps = 1 if geometry is None else geometry.kernel**2
    g = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 6, 37) if geometry is None else (2, 37, 8, 8), generator=g) + 1
    x[1] *= 5
    weight = torch.randn((6 * taps, 37) if transposed else (6, 37 * taps), generator=g)
    bias = torch.zeros(len(weight)) if transposed else torch.randn(6, generator=g)
    layer = nearest(weight, bias, kind, geometry, static_range(x, kind) if kind.static else None)
    expected = _expected(x, layer)
    modules: dict[str, Callable[[Tensor], Tensor]] = {
        "reference": IntegerLinear(layer, reference._KERNELS),
        "onednn": IntegerLinear(layer, onednn._kernels()),
        "learning": TrainableLayer(layer),
    }
    if openvino_library.why_absent() is None:
        modules["openvino"] = functools.partial(openvino.multiplied, bool(openvino.in_halves()), layer)
        modules["export"] = functools.partial(openvino.multiplied, True, layer)
    for engine, module in modules.items():
        assert relative_error(module(x), expected) <= PRODUCT_TOLERANCE, engine


def _expected(x: Tensor, layer: QuantizedLayer) -> Tensor:
    """In float64, from what `row_quantized` and `quantized` define."""
    geometry = layer.geometry
    if layer.input_range is not None:
        scale, zero_point = layer.input_range
        rounded = (quantized(x, scale, zero_point, layer.activation_bits).double() - zero_point) * scale
    elif layer.by_image:
        rounded = row_rounded(x.flatten(1), layer.activation_bits).view_as(x).double()
    elif geometry is None:
        rounded = row_rounded(x, layer.activation_bits).double()
    else:
        rounded = row_rounded(x.movedim(1, -1), layer.activation_bits).movedim(-1, 1).double()
    weight, bias = layer.weight.double() * layer.weight_scale.double()[:, None], layer.bias.double()
    if geometry is None:
        return F.linear(rounded, weight, bias)
    kernel = (geometry.kernel, geometry.kernel)
    if geometry.transposed:
        weight = weight.T.unflatten(1, (-1, *kernel))
        return F.conv_transpose2d(rounded, weight, None, geometry.stride, geometry.padding)
    return F.conv2d(rounded, weight.unflatten(1, (-1, *kernel)), bias, geometry.stride, geometry.padding)


def test_cutlass_says_why_it_runs_one_form_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "tiny", SMALL["tiny"])
    static = Kind(4, 4, static=True)
    assert cutlass.why_not(artifact_of("tiny", lambda *_: static)) is None
    for kind in (W8A8, Kind(4, 4, True, True), None):
        artifact = artifact_of("tiny", lambda name, _, kind=kind: kind if name == "neck.0" else static)
        assert cutlass.why_not(artifact) == cutlass.ONE_FORM
        assert why_not(EngineKind.CUTLASS, artifact) == cutlass.ONE_FORM
        with pytest.raises(ArtifactError, match="one fixed input range each"):
            GraphlessForward(artifact, torch.device("cpu"), torch.float32, False)
