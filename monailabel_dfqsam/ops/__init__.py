"""Integer ops: packing, quantize, linear; a leaf, importing nothing of the project."""

from monailabel_dfqsam.ops.integer import int_accumulate, multiplied, quantized, row_quantized, row_rounded
from monailabel_dfqsam.ops.layer import (
    GROUP,
    Form,
    Geometry,
    Groups,
    QuantizedLayer,
    Rows,
    StaticRange,
    float_product,
)
from monailabel_dfqsam.ops.packing import pack_int4, unpack_int4

__all__ = [
    "GROUP",
    "Form",
    "Geometry",
    "Groups",
    "QuantizedLayer",
    "Rows",
    "StaticRange",
    "float_product",
    "int_accumulate",
    "multiplied",
    "pack_int4",
    "quantized",
    "row_quantized",
    "row_rounded",
    "unpack_int4",
]
