"""The auxiliary model: any network that says of every pixel which class it is of.

It is a MONAI network, named by its class with the arguments it is constructed with, or a MONAI bundle. Only
networks out of `monai.networks.nets` are constructed, and weights are read as tensors alone: neither a
weights file nor a bundle can run code here.
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

_BUNDLE_CONFIGS = ("inference.json", "inference.yaml", "train.json", "train.yaml")
_BUNDLE_WEIGHTS = ("model.safetensors", "model.pt")
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
    return load_auxiliary(None, EMBEDDED_AUXILIARY) if EMBEDDED_AUXILIARY.is_file() else None


def load_auxiliary(
    name_or_bundle: str | Path | None, weights: Path | None, arguments: dict[str, Any] | None = None
) -> Auxiliary:
    """An auxiliary model from a MONAI bundle, or from a MONAI network's name and a weights file.

    Args:
        name_or_bundle: a folder with `configs/` and `models/`; or the name of a class of
            `monai.networks.nets`; or None for the class that the weights' metadata name.
        weights: `.safetensors`, or a torch file of tensors; None for a bundle's own.
        arguments: what to construct the class with; None for the weights' metadata `network_kwargs` (JSON).

    Raises:
        AuxiliaryError: when something is missing, damaged, holds code, or does not fit together.
    """
    if name_or_bundle is not None and Path(name_or_bundle).is_dir():
        name, arguments = _bundle_network(Path(name_or_bundle))
        return _construct(name, arguments, weights or _bundle_weights(Path(name_or_bundle)), None)
    if weights is None:
        raise AuxiliaryError("an auxiliary network needs a weights file; a bundle folder brings its own")
    metadata = _metadata(weights)
    class_name = metadata.get("network") if name_or_bundle is None else str(name_or_bundle)
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


def _bundle_network(folder: Path) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of a bundle's `network_def`, read and never evaluated."""
    from monai.bundle import ConfigParser  # slow to import

    for file in (folder / "configs" / name for name in _BUNDLE_CONFIGS):
        definition = ConfigParser.load_config_file(str(file)).get("network_def") if file.is_file() else None
        if isinstance(definition, dict) and "_target_" in definition:
            break
    else:
        raise AuxiliaryError(f"the bundle '{folder.name}' has no network_def in {', '.join(_BUNDLE_CONFIGS)}")
    if any(mark in json.dumps(definition) for mark in ('"$', '"@', '"%')):
        raise AuxiliaryError(
            f"the network_def of '{folder.name}' has expressions ($, @, %), which are not run here"
        )
    arguments = {key: value for key, value in definition.items() if not key.startswith("_")}
    return str(definition["_target_"]).rsplit(".", 1)[-1], arguments


def _bundle_weights(folder: Path) -> Path:
    for file in (folder / "models" / name for name in _BUNDLE_WEIGHTS):
        if file.is_file():
            return file
    raise AuxiliaryError(f"the bundle '{folder.name}' has neither of {', '.join(_BUNDLE_WEIGHTS)} in models/")


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
