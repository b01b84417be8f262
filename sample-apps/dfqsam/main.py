"""MONAI Label app: DFQ-SAM."""
