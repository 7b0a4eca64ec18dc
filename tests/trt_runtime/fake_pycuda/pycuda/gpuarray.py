"""Arrays of PyCUDA: see driver.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycuda import driver


class GPUArray:
    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.gpudata = driver.mem_alloc(int(np.prod(shape)) * self.dtype.itemsize)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "strides": tuple(np.empty(self.shape, self.dtype).strides),
            "data": (int(self.gpudata), False),
            "typestr": self.dtype.str,
            "stream": None,
            "version": 3,
        }
