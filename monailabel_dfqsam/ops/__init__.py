"""Integer ops: packing, quantize, linear; a leaf, importing nothing of the project."""

from monailabel_dfqsam.ops.integer import int_accumulate, multiplied, quantized
from monailabel_dfqsam.ops.layer import Geometry, QuantizedLayer
from monailabel_dfqsam.ops.packing import pack_int4, unpack_int4

__all__ = [
    "Geometry",
    "QuantizedLayer",
    "int_accumulate",
    "multiplied",
    "pack_int4",
    "quantized",
    "unpack_int4",
]
