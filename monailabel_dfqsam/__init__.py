"""DFQ-SAM for MONAI Label: interactive Segment Anything, quantized to 4 bit without data."""

__version__ = "0.1.0"
