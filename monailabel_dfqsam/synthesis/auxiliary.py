"""The auxiliary model: any network that says of every pixel which class it is of.

It is a MONAI network, named by its class with the arguments it is constructed with. Only networks out of
`monai.networks.nets` are constructed, and weights are read as tensors alone: no file can run code here.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

EMBEDDED_AUXILIARY = Path(__file__).parents[1] / "sam" / "weights" / "dfqsam-tiny-auxiliary.safetensors"

_WRAPPERS = ("model", "state_dict", "model_state_dict", "network")


class AuxiliaryError(ValueError):
    """An auxiliary model that cannot be used; the message says why and what is expected."""


class Auxiliary:
    """A network from images to class scores, frozen and in evaluation mode.

    Attributes:
        network: [B, in_channels, S, S] float to logits [B, C, h, w] float; C = 1 means one foreground class.
        in_channels: 1 or 3.
        input_size: side in pixels to which images are resized first; None to leave them.
    """

    def __init__(self, network: nn.Module, in_channels: int = 3, input_size: int | None = None) -> None:
        if in_channels not in (1, 3):
            raise AuxiliaryError(f"an auxiliary network takes 1 or 3 channels, not {in_channels}")
        self.network = network.eval().requires_grad_(False)
        self.in_channels = in_channels
        self.input_size = input_size

    def to(self, device: torch.device) -> Auxiliary:
        """Moves the network; returns itself."""
        self.network.to(device)
        return self

    def scores(self, images: Tensor) -> Tensor:
        """Class probabilities; differentiable with respect to the images.

        Args:
            images: [B, 3, S, S] float, mean/std-normalised as `sam.preprocess.normalize` does.

        Returns:
            [B, C, h, w] float, sums of 1 over the classes; class 0 is the background.
        """
        size = self.input_size
        if size is not None and images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        if self.in_channels == 1:
            images = images.mean(1, keepdim=True)
        logits = self.network(images)
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return F.softmax(logits, 1)


def embedded_auxiliary() -> Auxiliary | None:
    """The embedded model's auxiliary network, trained on phantoms alone; None when it is not installed."""
    return load_auxiliary(EMBEDDED_AUXILIARY) if EMBEDDED_AUXILIARY.is_file() else None


def load_auxiliary(
    weights: Path, name: str | None = None, arguments: dict[str, Any] | None = None
) -> Auxiliary:
    """An auxiliary model from a weights file and the MONAI network it is of.

    Args:
        weights: `.safetensors`, or a torch file of tensors.
        name: of a class of `monai.networks.nets`; None for the class that the weights' metadata name.
        arguments: what to construct the class with; None for the weights' metadata `network_kwargs` (JSON).

    Raises:
        AuxiliaryError: when something is missing, damaged, holds code, or does not fit together.
    """
    metadata = _metadata(weights)
    class_name = name or metadata.get("network")
    if class_name is None:
        raise AuxiliaryError(f"'{weights.name}' does not say which network it is of: name a MONAI network")
    if arguments is None:
        if "network_kwargs" not in metadata:
            raise AuxiliaryError(
                f"'{weights.name}' does not say how '{class_name}' is constructed: pass arguments"
            )
        arguments = json.loads(metadata["network_kwargs"])
    size = metadata.get("input_size")
    return _construct(class_name, arguments, weights, int(size) if size else None)


def _construct(name: str, arguments: dict[str, Any], weights: Path, input_size: int | None) -> Auxiliary:
    import monai.networks.nets as nets  # slow to import

    network_class = getattr(nets, name, None)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise AuxiliaryError(f"there is no network '{name}' in monai.networks.nets")
    if arguments.get("spatial_dims", 2) != 2:
        raise AuxiliaryError(f"the network '{name}' must be two-dimensional (spatial_dims 2)")
    try:
        network = network_class(**arguments)
        network.load_state_dict(_tensors(weights), strict=True)
    except (TypeError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AuxiliaryError(f"'{weights.name}' does not fit the network '{name}': {reason}") from None
    return Auxiliary(network, int(arguments.get("in_channels", 3)), input_size)


def _metadata(weights: Path) -> dict[str, str]:
    """The text metadata of a safetensors file; empty for other files."""
    if not weights.is_file():
        raise AuxiliaryError(f"there is no weights file '{weights.name}' at the given path")
    if weights.suffix != ".safetensors":
        return {}
    try:
        with safe_open(weights, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise AuxiliaryError(f"'{weights.name}' is not a readable safetensors file: {error}") from None


def _tensors(weights: Path) -> dict[str, Tensor]:
    if weights.suffix == ".safetensors":
        return load_file(weights)
    try:
        raw = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise AuxiliaryError(
            f"'{weights.name}' is damaged or holds more than tensors, and was refused"
        ) from None
    for wrapper in _WRAPPERS:
        if isinstance(raw, dict) and isinstance(raw.get(wrapper), dict):
            raw = raw[wrapper]
    if not isinstance(raw, dict):
        raise AuxiliaryError(f"'{weights.name}' holds no state dict")
    return {str(key): value for key, value in raw.items()}
