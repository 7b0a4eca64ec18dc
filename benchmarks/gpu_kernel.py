"""Decode + NMS on a GPU: our kernels against plain torch operations and against what the memory allows.

python -m benchmarks.gpu_kernel [--out benchmarks/results/gpu_kernel.json]

Before anything is timed, the kernels must give the bits of the host version, and the torch operations the same
detections to 1e-3 px. Times are of CUDA graph replays, between events on the device, behind a delay kernel that keeps
the host's part out:

  single  a graph of one launch: median, in us; what a frame waits for
  each    a graph of many launches in a row, divided by their number; one set of head maps, which stays in the L2 cache
  cold    the same, over so many sets of buffers that together they are twice the L2 cache

The peer does the same job in a fixed number of torch operations without the host: finite check, threshold, topk,
gather, decode, all pairs' IoU, suppression by repeated matrix products (Cluster-NMS, Zheng et al., IEEE Transactions on
Cybernetics 2021), padded outputs. It is given in advance what ours must find out: the number of candidates, the priors,
and the least number of repetitions that is right for this content.

The floor is the time in which the bytes of head maps and outputs can be moved once, at the bandwidth of a large copy.
"empty pair" is a graph of two dependent kernels of one thread's work: what any two launches cost.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import benchmark_parser, parse, write_result
from facespec.boxes import make_priors
from facespec.cli import run
from facespec.errors import RetinaFaceError
from facespec.spec import ModelSpec
from plugins.build import read_report
from tests.gpu import heads as content
from tests.gpu.kernel import DEVICE, Call, Kernels, build_kernels, capability, gpu_problem
from trt_runtime import kernels as host

with suppress(ImportError):  # gpu_problem says that it is missing
    import torch

REPEATS = 100
LAUNCHES = 64
PEER_LAUNCHES = 8
PEER_ROUNDS = 12
DELAY_CYCLES = 2_000_000
"""About 1 ms: longer than the host needs to enqueue a graph of hundreds of kernels and an event."""


class Case(NamedTuple):
    """What is timed: a network input and a batch, head maps of a type and a layout, and how full they are.

    `candidates` is the number of priors over the threshold in each image.
    """

    size_hw: tuple[int, int]
    batch: int
    candidates: int
    half: bool
    channels_last: bool

    @property
    def dtype(self) -> Any:
        """Type of the head maps."""
        return np.float16 if self.half else np.float32

    def __str__(self) -> str:
        kind = f"{'fp16' if self.half else 'fp32'} {'last' if self.channels_last else 'planar'}"
        return "{}x{} b{} {:4d} {}".format(*self.size_hw, self.batch, self.candidates, kind)


def cases() -> list[Case]:
    """Return what is timed, in the order of the table."""
    kinds = [((640, 640), 1, candidates) for candidates in (0, 50, 300, 1000)]
    kinds += [((640, 640), 8, 300), ((1088, 1920), 1, 300)]
    return [Case(*kind, half, last) for kind in kinds for half in (False, True) for last in (False, True)]


class Peer:
    """The same job in torch operations, for at most `candidates` in an image, with `rounds` of suppression."""

    def __init__(self, spec: ModelSpec, size_hw: tuple[int, int], candidates: int, rounds: int) -> None:
        self.spec = spec
        self.top_k = max(candidates, 1)
        self.rounds = rounds
        self.priors = torch.from_numpy(make_priors(spec.anchors, size_hw)).to(DEVICE)
        self.later = torch.ones(self.top_k, self.top_k, dtype=torch.bool, device=DEVICE).triu(1)

    def __call__(self, maps: Sequence[Any]) -> dict[str, Any]:
        """Return the five outputs for head maps (B, C, H, W)."""
        decode, members, batch = self.spec.decode, self.spec.anchors.per_cell, maps[0].shape[0]
        rows = [m.permute(0, 2, 3, 1) for m in maps]

        def gathered(first: int, width: int) -> Any:
            parts = [r[..., first : first + members * width].reshape(batch, -1, width) for r in rows]
            return torch.cat(parts, dim=1)

        sums = torch.stack([(m * 0).sum(dim=(1, 2, 3)) for m in maps])  # 0, or NaN if a value is not finite
        finite = (sums == 0).all(dim=0)
        classes = gathered(0, 2).float()
        difference = classes[..., 1] - classes[..., 0]
        over = difference >= decode.logit_threshold
        counts = over.sum(dim=1)
        best, index = difference.masked_fill(~over, -torch.inf).topk(self.top_k, dim=1)
        valid = (best > -torch.inf) & finite[:, None]

        def chosen(first: int, width: int) -> Any:
            return gathered(first, width).gather(1, index[..., None].expand(-1, -1, width)).float()

        deltas, points = chosen(2 * members, 4), chosen(6 * members, 10)
        priors = self.priors[index]
        centre_variance, size_variance = decode.variances
        centres = priors[..., :2] + deltas[..., :2] * centre_variance * priors[..., 2:]
        sides = priors[..., 2:] * torch.exp(deltas[..., 2:] * size_variance)
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)
        shifts = points.view(batch, -1, 5, 2) * centre_variance * priors[:, :, None, 2:]
        landmarks = (priors[:, :, None, :2] + shifts).view(batch, -1, 10)

        corner = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
        opposite = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
        both = (opposite - corner).clamp_(min=0).prod(dim=-1)
        areas = sides.prod(dim=-1)
        overlap = both > decode.iou_threshold * (areas[:, :, None] + areas[:, None, :] - both)
        suppresses = (overlap & self.later).to(torch.float32)
        keep = valid
        for _ in range(self.rounds):
            beaten = torch.bmm(keep.to(torch.float32)[:, None], suppresses)[:, 0] > 0
            keep = valid & ~beaten

        k = decode.max_detections
        place = (keep.cumsum(dim=1) - 1).masked_fill(~keep, k).clamp_(max=k)
        values = torch.cat([boxes, torch.sigmoid(best)[..., None], landmarks], dim=-1)
        padded = torch.zeros(batch, k + 1, 15, device=values.device)
        padded.scatter_(1, place[..., None].expand(-1, -1, 15), values)
        padded = padded[:, :k]
        return {
            "num_detections": keep.sum(dim=1).clamp_(max=k).to(torch.int32),
            "boxes": padded[..., :4].contiguous(),
            "scores": padded[..., 4].contiguous(),
            "landmarks": padded[..., 5:].reshape(batch, k, 5, 2).contiguous(),
            "num_candidates": counts.masked_fill(~finite, -1).to(torch.int32),
        }


def same_detections(ours: dict[str, NDArray[Any]], theirs: dict[str, NDArray[Any]]) -> bool:
    """Whether both found the same faces in the same order, to 1e-3 px and 1e-5 in the score."""
    if any(not np.array_equal(ours[name], theirs[name]) for name in ("num_detections", "num_candidates")):
        return False
    near = {"boxes": 1e-3, "landmarks": 1e-3, "scores": 1e-5}
    return all(np.abs(ours[name] - theirs[name]).max() <= limit for name, limit in near.items())


def captured(launch: Callable[[int], Any], count: int) -> Any:
    """Return a CUDA graph of launch(0) .. launch(count - 1), which have run before."""
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(min(count, 3)):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(count):
            launch(i)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def replay_us(launch: Callable[[int], Any], count: int = 1, repeats: int = REPEATS) -> NDArray[np.float64]:
    """Return the time of each replay, on the device, of a graph of `count` launches."""
    graph = captured(launch, count)
    times = []
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(repeats + 5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(DELAY_CYCLES)
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return np.array(times[5:])


def each_us(launch: Callable[[int], Any], count: int) -> float:
    """Return the median time of one of `count` launches in a graph."""
    return float(np.median(replay_us(launch, count))) / count


def copy_bandwidth() -> float:
    """Return bytes per second of a large copy on the device, read and written ones counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (each_us(lambda _: target.copy_(source), 4) * 1e-6)


def measure(kernels: Kernels, case: Case, bandwidth: float, cache_bytes: int) -> dict[str, Any]:
    """Check and time a case.

    Raises:
        RetinaFaceError: The kernels do not give the bits of the host version.
    """
    spec = ModelSpec()
    rng = np.random.default_rng(case.candidates)
    images = [content.faces(rng, case.size_hw, spec, case.candidates) for _ in range(case.batch)]
    maps = content.head_maps(images, case.size_hw, spec.anchors, case.dtype, case.channels_last)
    want = host.decode_nms(maps, case.size_hw, spec)

    def new_call() -> Call:
        call = Call(kernels, spec, case.size_hw, case.batch, case.dtype, case.channels_last)
        call.load(maps)
        call.poison()
        return call

    first = new_call()
    sets = [first, *(new_call() for _ in range(2 * cache_bytes // first.bytes_moved))]

    def check_bits(problem: str) -> None:
        found = first.results()
        if any(found[name].tobytes() != want[name].tobytes() for name in want):
            raise RetinaFaceError(f"{case}: {problem}")

    first.launch()
    check_bits("the GPU does not give the bits of the host version: python -m tests.gpu")
    for rounds in range(1, PEER_ROUNDS + 1):
        peer = Peer(spec, case.size_hw, case.candidates, rounds)
        theirs = {name: values.cpu().numpy() for name, values in peer(first.planar_heads).items()}
        agrees = same_detections(want, theirs)
        if agrees:
            break
    single = replay_us(lambda _: first.launch(), repeats=3 * REPEATS)
    each = each_us(lambda _: first.launch(), LAUNCHES)
    cold = each_us(lambda i: sets[i % len(sets)].launch(), max(LAUNCHES, len(sets)))
    peer_single, peer_each = (each_us(lambda _: peer(first.planar_heads), count) for count in (1, PEER_LAUNCHES))
    check_bits("the bits changed while it was timed")
    floor = first.bytes_moved / bandwidth * 1e6
    torch.cuda.empty_cache()
    median, p95 = (float(value) for value in np.percentile(single, (50, 95)))
    ours = {"single": median, "single_p95": p95, "each": each, "cold": cold}
    return {
        "size": "{}x{}".format(*case.size_hw),
        "batch": case.batch,
        "candidates": case.candidates,
        "detections": int(want["num_detections"].sum()) // case.batch,
        "heads": "fp16" if case.half else "fp32",
        "layout": "channels-last" if case.channels_last else "planar",
        "bytes": first.bytes_moved,
        "buffer_sets": len(sets),
        "ours_us": {name: round(value, 2) for name, value in ours.items()},
        "peer_us": {"single": round(peer_single, 2), "each": round(peer_each, 2)},
        "peer_rounds": rounds,
        "peer_agrees": agrees,
        "speedup_each": round(peer_each / each, 2),
        "speedup_single": round(peer_single / median, 2),
        "floor_us": round(floor, 3),
        "floor_share_cold": round(floor / cold, 4),
    }


def gpu_description(library: Path) -> dict[str, Any]:
    """Return what a time depends on beside the host."""
    properties = torch.cuda.get_device_properties(0)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        driver = ""
    return {
        "name": properties.name,
        "compute_capability": capability(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        "cuda_of_torch": torch.version.cuda,
        "nvcc": read_report(library)["compiler_version"],
    }


def main() -> int:
    """Run the benchmark, print a table and write the result."""
    args = parse(benchmark_parser("gpu_kernel", __doc__))
    problem = gpu_problem()
    if problem:
        raise RetinaFaceError(f"this benchmark needs an NVIDIA GPU and torch with CUDA: {problem}")
    library = build_kernels(capability())
    kernels = Kernels(library)
    gpu = gpu_description(library)
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    number = torch.zeros(1, device=DEVICE)

    def pair(_: int) -> None:
        number.add_(1).add_(1)

    empty_pair = {"single": float(np.median(replay_us(pair, repeats=3 * REPEATS))), "each": each_us(pair, LAUNCHES)}
    empty_pair = {name: round(us, 2) for name, us in empty_pair.items()}
    print(f"{gpu['name']}, driver {gpu['driver']}: copy {bandwidth / 1e12:.2f} TB/s, empty pair {empty_pair} us")
    print(f"{'':32} ours, us: single   each   cold  peer, us: single   each  ratio  floor  share  detections")
    results = []
    for case in cases()[: 2 if args.quick else None]:
        row = measure(kernels, case, bandwidth, gpu["l2_bytes"])
        results.append(row)
        ours, peer = row["ours_us"], row["peer_us"]
        print(
            f"{case!s:32} {ours['single']:16.2f} {ours['each']:6.2f} {ours['cold']:6.2f} {peer['single']:17.2f} "
            f"{peer['each']:6.1f} {row['speedup_each']:6.1f} {row['floor_us']:6.2f} {row['floor_share_cold']:6.1%} "
            f"{row['detections']:6d}{'' if row['peer_agrees'] else '  PEER DIFFERS'}",
            flush=True,
        )
    what = "decode + NMS of head maps on a GPU: our kernels, torch operations, and the time to move the bytes"
    more = {"gpu": gpu, "copy_bytes_per_s": round(bandwidth), "empty_pair_us": empty_pair}
    write_result(args, what, results, "numpy", "torch", **more)
    differing = sum(not row["peer_agrees"] for row in results)
    if differing:
        raise RetinaFaceError(f"the torch operations gave other detections in {differing} of {len(results)} cases")
    return 0


if __name__ == "__main__":
    run(main)
