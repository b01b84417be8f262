"""Upstream's modules with their imports of MONAI moved: which move, and that the functions still work."""

from __future__ import annotations

import ast
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monailabel_dfqsam.server.upstream.imports import moved
from tests.fresh import printed


def test_an_import_moves_into_the_functions_that_use_it() -> None:
    source = """
import os
import monai.bundle
import itk as toolkit
from monai.data import MetaTensor, partition_dataset

def plain():
    return os.sep

def one(x):
    'Its words.'
    return monai.bundle.run(x)

class Writer:
    async def method(self):
        def inner():
            return toolkit
        return isinstance(self, MetaTensor)
"""
    expected = """
import os

def plain():
    return os.sep

def one(x):
    'Its words.'
    import monai.bundle
    return monai.bundle.run(x)

class Writer:
    async def method(self):
        import itk as toolkit
        from monai.data import MetaTensor, partition_dataset
        def inner():
            return toolkit
        return isinstance(self, MetaTensor)
"""
    assert ast.unparse(moved(ast.parse(source))) == ast.unparse(ast.parse(expected))


@pytest.mark.parametrize(
    "use",
    [
        "class Mine(MetaTensor): pass",
        "def f(x: MetaTensor): pass",
        "def f() -> MetaTensor: pass",
        "def f(x=MetaTensor): pass",
        "@MetaTensor\ndef f(): pass",
        "if MetaTensor: pass",
        "class Mine:\n    kind = MetaTensor",
    ],
)
def test_what_a_module_needs_to_be_loaded_stays(use: str) -> None:
    source = f"from monai.data import MetaTensor\n{use}\ndef g():\n    return MetaTensor"
    assert ast.unparse(moved(ast.parse(source))) == ast.unparse(ast.parse(source))


def test_upstreams_conversion_still_works(tmp_path: Path) -> None:
    """By the true MONAI and ITK, which are there as soon as they are needed."""
    image, label = tmp_path / "image.nii.gz", tmp_path / "label.bin"
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.diag([2.0, 3.0, 4.0, 1.0])), image)
    values = np.arange(24, dtype=np.uint8)
    label.write_bytes(values.tobytes())
    code = (
        "import sys\n"
        "from monailabel_dfqsam.server.upstream import imports\n"
        "imports.defer()\n"
        "from monailabel.datastore.utils.convert import binary_to_image\n"
        "print('monai' in sys.modules, 'itk' in sys.modules)\n"
        f"print(binary_to_image({str(image)!r}, {str(label)!r}))\n"
    )
    before, path = printed(code).split("\n")[:2]
    made = nibabel.load(path)
    found = np.asarray(made.dataobj)
    Path(path).unlink()
    assert before == "False False"
    assert np.array_equal(found, values.reshape((4, 3, 2), order="F"))
    assert np.allclose(made.affine, np.diag([2.0, 3.0, 4.0, 1.0]))


def test_memory_is_searched_for_garbage_again_when_all_is_loaded() -> None:
    code = (
        "import gc; from monailabel_dfqsam.server.upstream import start\n"
        "gc.disable(); start.settle(); print(gc.isenabled(), gc.get_freeze_count() > 0)"
    )
    assert printed(code).split() == ["True", "True"]
