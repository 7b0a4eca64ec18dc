"""The finish kernel's machine code, run on the CPU: is it right, which memory does it name, how many cycles by a model?

python -m benchmarks.kernel_model [--before COMMIT] [--out benchmarks/results/kernel_model.json]

It needs nvcc, nvdisasm (pip install nvidia-cuda-nvdisasm) and g++, and no GPU. The outputs must be those of the host,
bit for bit. The cycles are a model: see benchmarks/sass.py.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import benchmark_parser, parse, write_result
from benchmarks.sass import Array, Instruction, Machine
from benchmarks.sass import parse as parse_code
from facespec import boxes
from facespec.cli import run, text_table
from facespec.spec import DecodeSpec, ModelSpec
from plugins.build import ROOT as PLUGINS
from plugins.build import compiler_version, find_compiler, find_cuda_tool, find_nvcc, toolkit_paths
from trt_runtime import kernels

NVDISASM_COMMAND = "pip install nvidia-cuda-nvdisasm"
KERNELS = {"fp32": "finish_kernelIf", "fp16": "finish_kernelINS_4Half"}
THREADS = 1024
SIZE = 640, 640
CASES = ((50, 10), (300, 60), (1000, 200), (2000, 100), (5000, 50))
WHAT = (
    "Machine code (sm_90) of the finish kernel, run on the CPU for one image of 640x640 with FP32 heads. cycles: of a "
    "MODEL, see benchmarks/sass.py; nothing was measured on a GPU. issued: instructions of all warps. generic: loads "
    "and stores in the code that do not name their memory."
)


@dataclass(frozen=True)
class Kernels:
    """The kernels of one state of the sources.

    Attributes:
        code: Of the finish kernel, by type of the heads.
        host: Functions of kernel_model.cpp over the same sources.
    """

    code: dict[str, list[Instruction]]
    host: ctypes.CDLL


def compile_kernels(plugins: Path = PLUGINS) -> Kernels:
    """Compile the kernels in a folder such as plugins/ for sm_90, and for the host.

    Raises:
        MissingToolError: There is no nvcc or no nvdisasm.
    """
    nvcc, nvdisasm = find_nvcc(), find_cuda_tool("nvdisasm", NVDISASM_COMMAND)
    include = [f"-I{plugins / 'include'}", f"-I{plugins / 'src'}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = [
            "-std=c++17",
            "-O3",
            "-cubin",
            "-arch=sm_90",
            *toolkit_paths(nvcc),
            "-ccbin",
            find_compiler(),
            *include,
        ]
        cubin = folder / "launch.cubin"
        subprocess.run([nvcc, *flags, plugins / "src" / "launch.cu", "-o", cubin], check=True, capture_output=True)
        listing = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-pthread", *include]
        sources = [Path(__file__).with_suffix(".cpp"), plugins / "src" / "check.cpp"]
        subprocess.run([find_compiler(), *flags, *sources, "-o", folder / "host.so"], check=True)
        host = ctypes.CDLL(str(folder / "host.so"))
    host.prepare.restype = host.bytes_of_workspace.restype = ctypes.c_size_t
    return Kernels({heads: parse_code(listing, name) for heads, name in KERNELS.items()}, host)


def generic_accesses(code: list[Instruction]) -> int:
    """Return how many loads and stores do not say whether their memory is shared or global."""
    return sum(instruction.op in ("LD", "ST", "ATOM") for instruction in code)


def make_heads(candidates: int, faces: int, spec: ModelSpec, kind: type) -> list[Array]:
    """Return head maps with faces in rows and columns, and equally many candidates for each."""
    rng = np.random.default_rng(7)
    priors = boxes.make_priors(spec.anchors, SIZE)
    logits = np.tile(np.array([5, 0], np.float32), (len(priors), 1))
    deltas, points = np.zeros((len(priors), 4), np.float32), rng.normal(0, 2, (len(priors), 10))
    columns = int(np.ceil(np.sqrt(faces)))
    pitch, free = SIZE[1] / columns, np.ones(len(priors), bool)
    for face, count in enumerate(np.diff(np.linspace(0, candidates, faces + 1).astype(int))):
        row, column = divmod(face, columns)
        centre, side = np.array([(column + 0.5) * pitch, (row + 0.5) * pitch]), 0.7 * pitch
        far = np.abs(priors[:, :2] - centre).max(axis=1) / side + np.abs(np.log2(priors[:, 2] / side)) + 1e9 * ~free
        near = np.argsort(far, kind="stable")[:count]
        free[near] = False
        target = np.concatenate([centre - side / 2, centre + side / 2]) + side * rng.normal(0, 0.02, (count, 4))
        deltas[near] = boxes.encode_boxes(target.astype(np.float32), priors[near], spec.decode.variances)
        logits[near, 1] = 5 + rng.uniform(0.1, 8, count)
    heads: list[Array] = []
    first, per_cell = 0, spec.anchors.per_cell
    for rows, columns in spec.anchors.grids_hw(SIZE):
        last = first + rows * columns * per_cell
        parts = [part[first:last].reshape(rows * columns, -1).T for part in (logits, deltas, points)]
        heads.append(np.concatenate(parts).reshape(1, -1, rows, columns).astype(kind))
        first = last
    return heads


def run_finish(
    compiled: Kernels, candidates: int, faces: int, heads: str = "fp32", top_k: int = 5000
) -> dict[str, Any]:
    """Run the finish kernel on one image; return its cycles and counts.

    Raises:
        RuntimeError: Its outputs are not those of the host.
    """
    kind = {"fp32": np.float32, "fp16": np.float16}[heads]
    spec = ModelSpec(decode=DecodeSpec(score_threshold=0.5, max_detections=750, top_k=top_k))
    maps = make_heads(candidates, faces, spec, kind)
    expected = kernels.decode_nms(maps, SIZE, spec)
    params = kernels.make_params(1, SIZE, spec)
    arrays = {**{f"head{level}": array for level, array in enumerate(maps)}, **expected}
    sizes = {name: -(-array.nbytes // 16) * 16 for name, array in arrays.items()}
    sizes["workspace"] = compiled.host.bytes_of_workspace(ctypes.byref(params))
    memory = np.full(sum(sizes.values()) + 16, 0xA5, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: sum(sizes.values()) // 4 * 4]
    places = dict(zip(sizes, np.cumsum([0, *sizes.values()]).tolist(), strict=False))
    address = {name: memory.ctypes.data + place for name, place in places.items()}
    for name in places:
        if name.startswith("head"):
            memory[places[name] :][: arrays[name].nbytes] = arrays[name].reshape(-1).view(np.uint8)
    problem = ctypes.create_string_buffer(1024)
    size = compiled.host.prepare(
        ctypes.byref(params),
        kernels.HEAD_TYPES[np.dtype(kind)],
        (ctypes.c_void_p * len(maps))(*(address[f"head{level}"] for level in range(len(maps)))),
        ctypes.byref(kernels.Outputs(*(address[name] for name in expected))),
        ctypes.c_void_p(address["workspace"]),
        problem,
    )
    machine = Machine(compiled.code[heads], THREADS, problem.raw[:size], memory)
    cycles = machine.run()
    for name, array in expected.items():
        if memory[places[name] :][: array.nbytes].tobytes() != array.tobytes():
            raise RuntimeError(f"{candidates} candidates, {faces} faces: {name} is not what the host finds")
    return {
        "candidates": int(expected["num_candidates"][0]),
        "faces": int(expected["num_detections"][0]),
        "cycles": round(cycles),
        "issued": machine.issued,
        "barriers": machine.barriers,
    }


def main() -> int:
    """Run the kernels of a commit and those of the working tree, write the table, print it."""
    parser = benchmark_parser("kernel_model", __doc__)
    parser.add_argument("--before", metavar="COMMIT", default="6ab0840", help="compare with it (default: %(default)s)")
    args = parse(parser)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", args.before, "plugins"], check=True, capture_output=True, cwd=PLUGINS.parent
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for sources, plugins in ((args.before, Path(folder) / "plugins"), ("now", PLUGINS)):
            compiled = compile_kernels(plugins)
            code = compiled.code["fp32"]
            more = {"sources": sources, "instructions": len(code), "generic": generic_accesses(code)}
            rows += [{**more, **run_finish(compiled, *case)} for case in CASES]
    write_result(args, WHAT, rows, "numpy", compiler=compiler_version(find_nvcc()))
    print(text_table(list(rows[0]), [[str(value) for value in row.values()] for row in rows]))
    return 0


if __name__ == "__main__":
    run(main)
