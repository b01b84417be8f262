"""Integer ops: packing, quantize, linear; a leaf, importing nothing of the project."""

from monailabel_dfqsam.ops.integer import int_accumulate, int_linear, quantize
from monailabel_dfqsam.ops.layer import Geometry, QuantizedLayer
from monailabel_dfqsam.ops.packing import pack_int4, unpack_int4

__all__ = [
    "Geometry",
    "QuantizedLayer",
    "int_accumulate",
    "int_linear",
    "pack_int4",
    "quantize",
    "unpack_int4",
]
