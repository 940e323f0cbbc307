"""The conformance kit: any registered backend against the float64 reference.

``check_backend("name")`` in Python, or ``pytest --pyargs cce.testing --backend name``.
"""

from cce.testing.behaviours import BEHAVIOURS
from cce.testing.cases import CASES, Case
from cce.testing.check import Result, run_case
from cce.testing.layouts import LAYOUTS
from cce.testing.patterns import PATTERNS
from cce.testing.report import GROUPS, Report, check_backend

__all__ = [
    "BEHAVIOURS",
    "CASES",
    "GROUPS",
    "LAYOUTS",
    "PATTERNS",
    "Case",
    "Report",
    "Result",
    "check_backend",
    "run_case",
]
