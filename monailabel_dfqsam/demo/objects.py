"""What the demo segments: objects with known masks, and where a person would click for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from monailabel_dfqsam.files import split_name
from monailabel_dfqsam.phantom_study import Click, click_for, find_pairs
from monailabel_dfqsam.segmentation.volume import load_volume, slice_rgb

MAX_OBJECTS = 8


class DemoError(ValueError):
    """A demo that cannot go on; the message says why."""


@dataclass(frozen=True, eq=False)
class Case:
    """One object in one image.

    Attributes:
        image: the file, as it is called in the server's studies.
        name: what the server calls the image.
        label: what the object is called.
        click: where an ideal person would click.
        rgb: [I, J, 3] uint8, the slice `click.k`.
        truth: [I, J] bool, the object on it.
    """

    image: Path
    name: str
    label: str
    click: Click
    rgb: NDArray[np.uint8]
    truth: NDArray[np.bool_]


def find_cases(studies: Path) -> list[Case]:
    """The first `MAX_OBJECTS` objects of a folder, by name.

    Raises:
        DemoError: when there are none.
    """
    cases = []
    for image, mask in find_pairs(studies)[:MAX_OBJECTS]:
        volume, truth = load_volume(image), load_volume(mask).array != 0
        if truth.shape != volume.shape or not truth.any():
            raise DemoError(f"'{mask.name}' is empty or has not the shape of '{image.name}'")
        click = click_for(truth)
        name = split_name(image.name)[0]
        label = split_name(mask.name)[0].removeprefix(f"{name}_")
        cases.append(Case(image, name, label, click, slice_rgb(volume, click.k), truth[:, :, click.k]))
    if not cases:
        raise DemoError(
            f"'{studies}' has no volume with a mask beside it named <image>_<label>, as in ct.nii.gz and "
            "ct_liver.nii.gz"
        )
    return cases
