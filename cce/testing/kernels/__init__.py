"""The contract of a GPU backend's kernels, one call of one kernel at a time.

``contract.run(kernels, device)`` and ``one_pass_contract.run(kernels.one_pass(), device)`` compare every kernel with a
few lines of PyTorch (``plain.py``, ``plain_one_pass.py``), with NaN around the operands and guards around the results.
"""
