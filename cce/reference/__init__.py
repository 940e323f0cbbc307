"""The float64 NumPy oracle: ``dense`` is the definition, ``tiled`` the algorithm, ``bounds`` the allowed errors.

>>> import numpy as np
>>> from cce.backends.problem import Inputs, Problem
>>> inputs = Inputs(e=np.zeros((2, 3)), c=np.zeros((5, 3)), targets=np.array([[0], [4]]))
>>> np.exp(dense.forward(inputs, Problem(n=2, v=5, d=3)).lse)
array([5., 5.])
"""

from cce.reference import dense, tiled
from cce.reference.bounds import bounds, error_norm, relative_error
from cce.reference.worklist import TileMaps, Tiling, WorkList, clear_threshold, threshold_margin, work_list

__all__ = [
    "TileMaps",
    "Tiling",
    "WorkList",
    "bounds",
    "clear_threshold",
    "dense",
    "error_norm",
    "relative_error",
    "threshold_margin",
    "tiled",
    "work_list",
]
