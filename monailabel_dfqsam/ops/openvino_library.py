"""OpenVINO as everything here gets it: silent.

It reports its use to its maker when the package `openvino_telemetry`, on which it depends, can be imported;
from here on it cannot be, nor by NNCF.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ABSENT = "openvino is not installed: pip install 'monailabel-dfqsam[openvino]'"


def why_absent() -> str | None:
    """Why OpenVINO is not here, or None when it is; it is not loaded for that."""
    return ABSENT if importlib.util.find_spec("openvino") is None else None


def why_unavailable() -> str | None:
    """Why OpenVINO cannot be used here, or None when it can.

    Raises:
        RuntimeError: when it is there but broken.
    """
    if (reason := why_absent()) is not None:
        return reason
    try:
        openvino()
    except (ImportError, OSError) as error:
        raise RuntimeError(f"openvino is installed but cannot be loaded: {error}") from error
    return None


def openvino() -> Any:
    """The module `openvino`.

    Raises:
        ImportError: when it is not installed.
    """
    # An import of a module that is None fails, and OpenVINO then goes on without.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def converted(
    module: nn.Module, inputs: Mapping[str, tuple[Tensor, tuple[int, ...]]], outputs: Sequence[str]
) -> Any:
    """A torch module as an `openvino.Model`.

    Args:
        module: in evaluation mode.
        inputs: by name, in the order of the module's arguments: an example, and the shape, −1 where open.
        outputs: names of what the module returns.
    """
    ov = openvino()
    example = tuple(tensor for tensor, _ in inputs.values())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's tracer about itself and the constants it makes
        traced = torch.jit.trace(module, example, check_trace=False)
        model = ov.convert_model(traced, example_input=example, input=[shape for _, shape in inputs.values()])
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    model.validate_nodes_and_infer_types()
    return model
