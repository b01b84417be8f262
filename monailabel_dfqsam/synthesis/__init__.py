"""Calibration images out of a model's weights alone (DFQ-SAM, arXiv 2410.01813, Algorithm 1, stage 1)."""
