"""DFQ-SAM for MONAI Label: interactive Segment Anything, quantized to 4 bit without data."""

import os

__version__ = "0.1.0"

# A server that answers clicks while another process quantizes has more threads than cores. OpenMP's default
# is to spin at every barrier until the other threads come, which then made synthesis more than seven times
# slower; it reads this when torch is first imported, and child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
