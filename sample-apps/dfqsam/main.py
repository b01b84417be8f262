"""MONAI Label app: DFQ-SAM."""

from monailabel_dfqsam.server.app import DFQSamApp

__all__ = ["DFQSamApp"]
