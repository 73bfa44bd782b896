"""Descriptors for the tensor memory accelerator (sm_90 and newer), as the 128 bytes that argument letter T takes."""

import ctypes
from functools import lru_cache

import torch

from . import device

_TYPES = {torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT32", torch.float16: "FLOAT16"}


@lru_cache(maxsize=1024)
def tensor_map_2d(
    pointer: int, dtype: torch.dtype, rows: int, columns: int, row_bytes: int, box: tuple[int, int], swizzle: int = 128
) -> bytes:
    """A map of a (rows, columns) matrix whose rows lie `row_bytes` (a multiple of 16) apart.

    `box` is the (rows, columns) tile of one copy; `swizzle` the width in bytes of its shared-memory pattern: 0, 32, 64
    or 128. Out-of-range elements are read as zero.
    """
    driver = device.host().driver
    kinds = driver.CUtensorMapDataType
    code, encoded = driver.cuTensorMapEncodeTiled(
        getattr(kinds, f"CU_TENSOR_MAP_DATA_TYPE_{_TYPES[dtype]}"),
        2,
        pointer,
        [driver.cuuint64_t(columns), driver.cuuint64_t(rows)],
        [driver.cuuint64_t(row_bytes)],
        [driver.cuuint32_t(box[1]), driver.cuuint32_t(box[0])],
        [driver.cuuint32_t(1), driver.cuuint32_t(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{f'{swizzle}B' if swizzle else 'NONE'}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    device.check("cuTensorMapEncodeTiled", (code, encoded))
    return bytes((ctypes.c_char * 128).from_address(int(encoded.getPtr())))
