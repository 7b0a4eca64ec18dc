"""A few launches for compute-sanitizer: python -m tests.gpu.sanitize LIBRARY.

Through libcuda alone: every buffer has exactly its size, nothing else runs on the device, and neither outputs nor
workspace are written to beforehand, so that memcheck and initcheck see what torch's allocator would hide.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from facespec.boxes import make_priors
from facespec.spec import DecodeSpec, ModelSpec
from tests.gpu import frames
from tests.gpu import heads as content
from tests.gpu.kernel import Driver, Kernels, in_memory_order
from trt_runtime import kernels as host


def same_as_host(
    kernels: Kernels,
    driver: Driver,
    contents: list[content.Content],
    size_hw: tuple[int, int],
    spec: ModelSpec,
    dtype: Any,
    channels_last: bool,
) -> bool:
    """Launch once; return whether the device gives the bits of the host."""
    maps = content.head_maps(contents, size_hw, spec.anchors, dtype, channels_last)
    want = host.decode_nms(maps, size_hw, spec)
    params = host.make_params(len(contents), size_hw, spec)
    params.channels_last = channels_last
    heads = [driver.upload(in_memory_order(head, channels_last)) for head in maps]
    outputs = [driver.allocate(values.nbytes) for values in want.values()]
    workspace = driver.allocate(kernels.workspace_bytes(params))
    code = kernels.launch(params, host.HEAD_TYPES[np.dtype(dtype)], heads, outputs, workspace, 0)
    if code:
        raise RuntimeError(f"retinaface_launch: CUDA error {code}")
    driver("cuCtxSynchronize")
    same = True
    for address, values in zip(outputs, want.values(), strict=True):
        got = np.empty_like(values)
        driver.download(address, got)
        same &= got.tobytes() == values.tobytes()
    for address in (*heads, *outputs, workspace):
        driver.free(address)
    return same


def same_letterbox(kernels: Kernels, driver: Driver, slots: Sequence[frames.Slot], size_hw: tuple[int, int]) -> bool:
    """Letterbox a batch once; return whether the device gives the bits of the host."""
    want = frames.on_host(slots, size_hw)
    addresses = [driver.upload(slot.buffer) for slot in slots]
    described, out = driver.upload(frames.descriptions(slots, addresses)), driver.allocate(want.nbytes)
    kernels.letterbox(described, len(slots), size_hw, frames.PAD, out, 0)
    driver("cuCtxSynchronize")
    got = np.empty_like(want)
    driver.download(out, got)
    for address in (*addresses, described, out):
        driver.free(address)
    return got.tobytes() == want.tobytes()


def main() -> int:
    """Run every path of the kernels; return 0 if each gave the bits of the host."""
    kernels, driver = Kernels(Path(sys.argv[1])), Driver()
    rng = np.random.default_rng(7)
    spec = ModelSpec()
    small, large = (96, 416), (640, 640)
    few = content.mixed_batch(rng, small, spec)
    broken = few[1].copy()
    broken[-1, -1] = np.nan
    narrow = replace(spec, decode=DecodeSpec(top_k=100, max_detections=40))
    wide = replace(spec, decode=DecodeSpec(top_k=16_800, max_detections=300))
    same = [
        same_as_host(kernels, driver, [*few, broken], small, settings, dtype, channels_last)
        for settings in (spec, narrow)  # all in shared memory; the best top_k of more
        for dtype in (np.float32, np.float16)
        for channels_last in (False, True)
    ]
    priors = make_priors(spec.anchors, large)
    crowds = [  # in the workspace
        content.scattered(rng, len(priors), 9000, 0.1),
        content.same_place(rng, priors, 16_800, spec),
    ]
    same.append(same_as_host(kernels, driver, crowds, large, wide, np.float32, False))
    letterboxed = (97, 128)
    same += [same_letterbox(kernels, driver, slots, letterboxed) for slots in frames.batches(letterboxed)]
    print(f"{sum(same)} of {len(same)} launches gave the bits of the host")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
