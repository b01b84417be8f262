"""The quantization report: one HTML page that needs nothing but itself, beside each artifact.

`report.html.j2` holds the words and the looks; the modules turn a result into what the template shows: texts,
PNG data URIs, and coordinates of charts.
"""

from monailabel_dfqsam.report.page import REAL_IMAGES, write_report

__all__ = ["REAL_IMAGES", "write_report"]
