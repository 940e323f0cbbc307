"""Registers known to be spilled: bytes a thread, the most that Triton 3.6.0, 3.7.1 and 3.9.0 make of it.

What spills more has become slower, most likely. What has come to spill less should be lowered here.
"""

#: Eight registers or fewer: which ptxas spills one and which does not changes from release to release.
FEW = 32

_ODD = "operands that come by pointers here: a register or two for each address"
_FLOAT32 = "no matrix unit: threads hold operands and sums"
_EPILOGUE = "an epilogue of many options on a tile that fills the registers"

#: {architecture: {setting: (reason, {kernel: bytes})}}
SPILLS: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    "sm_80": {
        "filtered-float32": (_FLOAT32, {"products_kernel": 104}),
    },
    "sm_90": {
        # As long as the epilogue divided by the softcap; 24 with Triton 3.7.1 since. A smaller tile was not timed.
        "exact-softcap": (_EPILOGUE, {"gradient_kernel": 304}),
        "exact-smoothing": (_EPILOGUE, {"gradient_kernel": 288}),  # 24 with Triton 3.6 and 3.7
        "filtered-order": ("an address for each gathered row of c", {"live_kernel": 64}),
    },
    "sm_100": {
        "exact-odd": (_ODD, {"gradient_kernel": 80, "store_kernel": 112}),
        "exact-smoothing": (_EPILOGUE, {"gradient_kernel": 664}),
        "exact-everything": (_EPILOGUE, {"statistics_kernel": 64, "gradient_kernel": 512}),
        "filtered-odd": (_ODD, {"live_kernel": 88}),
        "filtered-entropy": (_EPILOGUE, {"statistics_kernel": 224}),
        "filtered-everything": (_EPILOGUE, {"live_kernel": 56}),
    },
}


def known(architecture: str, setting: str, kernel: str) -> int:
    """Bytes that may be spilled."""
    _, kernels = SPILLS[architecture].get(setting, ("", {}))
    return kernels.get(kernel, FEW)
