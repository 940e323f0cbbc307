"""Registers known to be spilled: bytes a thread, the most that Triton 3.6.0, 3.7.1 and 3.9.0 make of it.

What spills more has become slower, most likely. What has come to spill less should be lowered here.
"""

#: Eight registers or fewer: which ptxas spills one and which does not changes from release to release.
FEW = 32

_ODD = "tiles made for boxes, whose operands come by pointers here: a register or two for each address"
_FLOAT32 = "no matrix unit: threads hold operands and sums"
_EPILOGUE = "an epilogue of many options on a tile that fills the registers"

#: {architecture: {setting: (reason, {kernel: bytes})}}
SPILLS: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    "sm_80": {
        "exact-odd": (_ODD, {"dense_kernel": 64}),
        "exact-everything": (_EPILOGUE, {"dense_kernel": 72}),
        "filtered-odd": (_ODD, {"products_kernel": 112}),
        "filtered-float32": (_FLOAT32, {"sparse_kernel": 408, "products_kernel": 120}),
    },
    "sm_90": {
        "exact-odd": (_ODD, {"forward_kernel": 680, "dense_kernel": 568, "store_kernel": 264}),
        "exact-softcap": (_EPILOGUE, {"dense_kernel": 304}),
        "exact-smoothing": (_EPILOGUE, {"dense_kernel": 288}),
        "exact-everything": (_EPILOGUE, {"forward_kernel": 320, "dense_kernel": 976}),
        "filtered-odd": (_ODD, {"forward_kernel": 704, "sparse_kernel": 880, "products_kernel": 1968}),
        "filtered-float32": (_FLOAT32, {"sparse_kernel": 384}),
        "filtered-order": ("an address for each gathered row of c", {"sparse_kernel": 64}),
        "filtered-everything": (_EPILOGUE, {"forward_kernel": 160, "sparse_kernel": 184}),
    },
    "sm_100": {
        "exact-odd": (_ODD, {"forward_kernel": 448, "dense_kernel": 216, "store_kernel": 96}),
        "exact-softcap": (_EPILOGUE, {"dense_kernel": 136}),
        "exact-smoothing": (_EPILOGUE, {"dense_kernel": 664}),
        "exact-everything": (_EPILOGUE, {"forward_kernel": 1904, "dense_kernel": 2176}),
        "filtered-odd": (_ODD, {"forward_kernel": 456, "sparse_kernel": 216, "products_kernel": 1504}),
        "filtered-float32": (_FLOAT32, {"sparse_kernel": 448, "products_kernel": 64}),
        "filtered-entropy": (_EPILOGUE, {"forward_kernel": 216}),
        "filtered-everything": (_EPILOGUE, {"forward_kernel": 1024, "sparse_kernel": 120}),
        "filtered-wide-blocks": ("two tiles of 256 columns a product", {"products_kernel": 208}),
    },
}


def known(architecture: str, setting: str, kernel: str) -> int:
    """Bytes that may be spilled."""
    _, kernels = SPILLS[architecture].get(setting, ("", {}))
    return kernels.get(kernel, FEW)
