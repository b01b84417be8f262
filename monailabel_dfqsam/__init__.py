"""DFQ-SAM for MONAI Label: interactive Segment Anything, quantized to 4 bit without data."""

import os

__version__ = "0.1.0"

# A server that answers clicks while another process quantizes has more threads than cores. OpenMP's default
# is to spin at every barrier for as long as it takes, which then made synthesis more than seven times slower;
# not to spin at all costs a sleep and a waking at each of an encoder's hundred barriers. A short while, about
# 140 µs, keeps an idle machine fast and a busy one usable; docs/benchmarks has the figures.
# OpenMP reads this when torch is first imported, and child processes inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
