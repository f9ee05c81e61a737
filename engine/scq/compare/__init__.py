"""Comparisons with other codecs on the same pictures, at the bytes of whole files and frames.

`run_suite` measures, `write_comparison` writes CSV, PNG and a Markdown section; `compare_video`
does the same for key and delta frames of a clip. Nothing in the product imports this package.
"""

from scq.compare.report import write_comparison
from scq.compare.run import Comparison, run_suite
from scq.compare.suites import SUITES, Suite
from scq.compare.video import VideoComparison, compare_video, write_video

__all__ = [
    "SUITES",
    "Comparison",
    "Suite",
    "VideoComparison",
    "compare_video",
    "run_suite",
    "write_comparison",
    "write_video",
]
