"""Build a TensorRT engine: uint8 frames in, faces out, with decoding and NMS in a plugin.

python -m export.to_trt --weights mobilenet0.25 --size 640x640 --fp16 --out retinaface.engine
python -m export.to_trt --size 320x320:640x640:1088x1920 --batch 1:1:8 --flavor rtx --compute-capability 86,89,120
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.to_onnx import add_decode_arguments, decode_spec, parity_frames
from facespec.cli import ArgumentParser, require, run
from facespec.errors import (
    BuildError,
    MissingPackageError,
    MissingToolError,
    ModelFileError,
    OutputError,
    RetinaFaceError,
    SpecError,
)
from facespec.files import atomic_path, check_outputs, write_text
from facespec.spec import DEFAULT_WEIGHTS, MAX_NETWORK_PIXELS, DecodeSpec, ModelSpec, check_size, parse_size
from plugins import PLUGIN
from plugins.build import ensure, is_current, read_report
from trt_runtime.flavor import AUTO, FLAVORS, RTX, TENSORRT, Flavor, child_environment, find_flavor, gpu_capability
from trt_runtime.sidecar import Sidecar, check_engine, sidecar_path

AHEAD_OF_TIME = (75, 80, 86, 89, 120)
"""Compute capabilities a TensorRT-RTX engine is built for where no GPU tells."""


@dataclass(frozen=True)
class Profile:
    """Sizes an engine takes.

    Attributes:
        batch: Smallest, best and largest number of frames.
        sizes_hw: Smallest, best and largest (height, width), multiples of 32.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    sizes_hw: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((640, 640), (640, 640), (640, 640))

    def __post_init__(self) -> None:
        for size in self.sizes_hw:
            check_size(size)
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise SpecError(f"--batch {':'.join(map(str, self.batch))}: give MIN:OPT:MAX from 1, ascending")
        for side in (0, 1):
            low, best, high = (size[side] for size in self.sizes_hw)
            if not low <= best <= high:
                raise SpecError(f"--size: the {('heights', 'widths')[side]} {low}, {best}, {high} do not ascend")
        pixels = self.batch[2] * self.sizes_hw[2][0] * self.sizes_hw[2][1]
        if pixels > MAX_NETWORK_PIXELS * 8:
            raise SpecError(f"--batch times --size is up to {pixels} pixels, an engine takes {MAX_NETWORK_PIXELS * 8}")

    @property
    def fixed_hw(self) -> tuple[int, int] | None:
        """The one network size there is, or None."""
        return self.sizes_hw[0] if len(set(self.sizes_hw)) == 1 else None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the input `images`."""
        names = ("min", "opt", "max")
        return {name: (b, *hw, 3) for name, b, hw in zip(names, self.batch, self.sizes_hw, strict=True)}


@dataclass(frozen=True)
class EngineOptions:
    """What to build.

    Attributes:
        weights: Checkpoint, or the name of published weights.
        out: Engine to write; the plugin form goes beside it, see `plugin_form`.
        profile: Batches and sizes.
        precision: "fp32" or "fp16".
        decode: Thresholds and limits built in.
        flavor: "auto", "tensorrt" or "rtx".
        capabilities: Compute capabilities of a TensorRT-RTX engine; empty for the GPU at hand, or `AHEAD_OF_TIME`.
        onnx_only: Stop after the plugin form.
        parity_images: Image file or folder for the parity report; None takes sample photographs of installed packages.
        timing_cache: File that makes the next build faster; None for a file in the user's cache folder. TensorRT only.
        command: What builds it again; written to the sidecar.
        progress: Whether to draw a progress bar.
    """

    weights: str
    out: Path
    profile: Profile = Profile()
    precision: str = "fp32"
    decode: DecodeSpec = field(default_factory=DecodeSpec)
    flavor: str = AUTO
    capabilities: tuple[int, ...] = ()
    onnx_only: bool = False
    parity_images: Path | None = None
    timing_cache: Path | None = None
    command: str = ""
    progress: bool = False

    def __post_init__(self) -> None:
        if self.capabilities and self.flavor == TENSORRT.name:
            raise SpecError("--compute-capability is for --flavor rtx: TensorRT builds for the GPU at hand")
        unknown = sorted(set(self.capabilities) - set(RTX.capabilities))
        if unknown:
            raise SpecError(
                f"--compute-capability {','.join(map(str, unknown))}: TensorRT-RTX builds for "
                f"{','.join(map(str, RTX.capabilities))}"
            )

    @property
    def plugin_form(self) -> Path:
        """The ONNX file: `out` itself if it ends in .onnx, else beside the engine."""
        return self.out if self.out.suffix.lower() == ".onnx" else self.out.with_suffix(".plugin.onnx")

    @property
    def log(self) -> Path:
        """The build log, kept if the build fails."""
        return Path(f"{self.out}.log")


@dataclass(frozen=True)
class ExportedGraph:
    """A plugin form that was written.

    Attributes:
        path: The file.
        spec: Its model.
        sha256: Of the file.
        mac_shares: Share of the convolutions' multiply-accumulates in each precision.
    """

    path: Path
    spec: ModelSpec
    sha256: str
    mac_shares: dict[str, float]


def export_plugin_form(options: EngineOptions) -> ExportedGraph:
    """Write the plugin form of a model, if it finds the faces that PyTorch finds, and print the comparison.

    Raises:
        ParityError: It differs by more than the tolerances of its precision.
        BuildError: The host kernels, which stand in for the plugin in the comparison, cannot be compiled.
    """
    for module in ("torch", "onnx", "onnxsim"):
        require(module, "export", "export.to_trt")
    from export.parity import check_parity
    from export.plugin_form import build_plugin_form
    from export.quantize import mac_shares
    from trainer.checkpoint import load_model

    frames = parity_frames(options.parity_images)
    model = load_model(options.weights)
    model.spec = dataclasses.replace(model.spec, decode=options.decode)
    graph = build_plugin_form(model, options.profile.fixed_hw, options.precision)
    best_hw = options.profile.sizes_hw[1]
    report = check_parity(graph, model, frames, best_hw, options.precision)
    print(report, flush=True)
    report.require_equal()
    shares = mac_shares(graph, best_hw)
    if shares != {options.precision: 1.0}:
        raise ModelFileError(f"{options.precision} was asked for, the convolutions compute in {shares}")
    content = graph.SerializeToString()
    with atomic_path(options.plugin_form) as temporary:
        temporary.write_bytes(content)
    return ExportedGraph(options.plugin_form, model.spec, hashlib.sha256(content).hexdigest(), shares)


def build_engine(options: EngineOptions) -> Sidecar | None:
    """Write the plugin form, the engine and its sidecar; return the sidecar, or None with `onnx_only`.

    Raises:
        RetinaFaceError: A step failed. If the plugin form was written by then, the message says so.
    """
    outputs: list[tuple[str, Path | None]] = [("--out", options.plugin_form)]
    if not options.onnx_only:
        if options.out.suffix.lower() == ".onnx":
            raise OutputError(f"--out {options.out}: an engine is no ONNX file: name it .engine, or add --onnx-only")
        outputs += [("--out", path) for path in (options.out, sidecar_path(options.out), options.log)]
        outputs.append(("--timing-cache", options.timing_cache))
    inputs: list[str | Path] = [options.weights]
    if options.parity_images:
        inputs.append(options.parity_images)
    check_outputs(outputs, inputs)
    graph = export_plugin_form(options)
    shares = ", ".join(f"{share:.0%} {kind}" for kind, share in graph.mac_shares.items())
    print(f"wrote {graph.path}: {graph.spec.backbone}, convolutions {shares}, {graph.path.stat().st_size / 1e6:.1f} MB")
    if options.onnx_only:
        return None
    try:
        flavor = find_flavor(RTX.name if options.capabilities else options.flavor)
        capabilities = _capabilities(options, flavor)
        if not (os.environ.get("RETINAFACE_PLUGIN") or is_current("plugin")):
            print("compiling the plugin, which is needed once", flush=True)
        plugin = ensure("plugin")
        version = _build(options, graph, flavor, capabilities, plugin)
    except RetinaFaceError as error:
        again = f"; then {options.command}" if isinstance(error, (MissingPackageError, MissingToolError)) else ""
        raise type(error)(f"{error}{again}. No engine was built; its ONNX form is there: {graph.path}") from None
    engine = options.out.read_bytes()
    sidecar = Sidecar(
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        engine_bytes=len(engine),
        flavor=flavor.name,
        version=version,
        compute_capabilities=capabilities,
        plugin={
            "name": PLUGIN.name,
            "version": PLUGIN.version,
            "namespace": PLUGIN.namespace,
            "sources_sha256": str(read_report(plugin).get("sources_sha256", "")),
        },
        precision=options.precision,
        mac_shares=graph.mac_shares,
        profile=options.profile.shapes,
        onnx_sha256=graph.sha256,
        spec=graph.spec,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        toolkit=importlib.metadata.version("retinaface-trt"),
        command=options.command,
    )
    write_text(sidecar_path(options.out), sidecar.to_json())
    problems = check_engine(options.out, sidecar)
    if problems:
        raise BuildError(f"{options.out}: {problems[0]}")
    return sidecar


def _capabilities(options: EngineOptions, flavor: Flavor) -> tuple[int, ...]:
    """Return the compute capabilities an engine is for."""
    present = gpu_capability()
    if flavor is RTX:
        default = (present,) if present in RTX.capabilities else AHEAD_OF_TIME
        return tuple(sorted(set(options.capabilities or default)))
    if present is None:
        raise MissingToolError(
            "TensorRT builds on the GPU it builds for, and there is none here, or no driver: use --flavor rtx, "
            "or go to a machine with that GPU"
        )
    return (present,)


def _timing_cache(options: EngineOptions, flavor: Flavor) -> Path | None:
    """Return the file of the timing cache; TensorRT-RTX, which compiles on the user's machine, has none."""
    if flavor is RTX:
        return None
    if options.timing_cache:
        return options.timing_cache
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "retinaface-trt" / f"timing-{flavor.version()}.cache"


def _build(
    options: EngineOptions, graph: ExportedGraph, flavor: Flavor, capabilities: tuple[int, ...], plugin: Path
) -> str:
    """Build in a child process, write the engine, and return the version of TensorRT."""
    cache = _timing_cache(options, flavor)
    with child_environment(flavor) as environment, tempfile.TemporaryDirectory(prefix="retinaface-") as folder:
        work = Path(folder)
        request = {
            "module": flavor.module,
            "onnx": str(graph.path.resolve()),
            "plugin": str(plugin),
            "plugin_name": [PLUGIN.name, PLUGIN.version, PLUGIN.namespace],
            "profile": options.profile.shapes,
            "capabilities": capabilities if flavor is RTX else [],
            "timing_cache": str(cache) if cache else None,
            "timing_cache_out": str(work / "timing.cache"),
            "log": str(work / "build.log"),
            "out": str(work / "engine"),
        }
        try:
            version = _run_builder(request, environment, flavor, options.progress)
        except BuildError as error:
            log = (work / "build.log").read_text(encoding="utf-8") if (work / "build.log").exists() else ""
            write_text(options.log, log)
            raise BuildError(f"{error} (log: {options.log})") from None
        with atomic_path(options.out) as temporary:
            temporary.write_bytes((work / "engine").read_bytes())
        if cache and (work / "timing.cache").exists():
            with suppress(OutputError):  # it saves time, no more
                with atomic_path(cache) as temporary:
                    temporary.write_bytes((work / "timing.cache").read_bytes())
    options.log.unlink(missing_ok=True)  # of an earlier build that failed
    return version


def _run_builder(request: dict[str, Any], environment: dict[str, str], flavor: Flavor, progress: bool) -> str:
    """Run `export.engine_builder` and follow it; return the version of TensorRT.

    Raises:
        BuildError: It failed, or died.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "export.engine_builder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    last: dict[str, Any] = {}
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request))
            child.stdin.close()
        with tqdm(total=100, desc=f"{flavor.title} builds", unit="%", disable=not progress, bar_format=_BAR) as bar:
            for line in child.stdout:
                last = json.loads(line)
                if last["event"] == "progress":
                    bar.set_postfix_str(last["phase"][:40], refresh=False)
                    bar.update(max(100 * last["share"] - bar.n, 0))
                elif last["event"] == "done":
                    bar.set_postfix_str("", refresh=False)
                    bar.update(100 - bar.n)
        code = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if last.get("event") == "done" and code == 0:
        return str(last["version"])
    if last.get("event") == "failed":
        detail = f": {last['detail'][0]}" if last["detail"] else ""
        raise BuildError(f"{flavor.title}: {last['message']}{detail}")
    said = (child.stderr.read() if child.stderr else "").strip().splitlines()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    raise BuildError(f"{flavor.title}: the build process {how}{': ' + said[-1] if said else ''}")


_BAR = "{desc}: {percentage:3.0f}%|{bar:24}| {elapsed} {postfix}"


def parse_batch(text: str) -> tuple[int, int, int]:
    """Return (min, opt, max) from "N" or "MIN:OPT:MAX".

    Raises:
        SpecError: Not of this form.
    """
    if not re.fullmatch(r"\d{1,5}(:\d{1,5}:\d{1,5})?", text, re.ASCII):
        raise SpecError(f"--batch {text}: give one number, or MIN:OPT:MAX, for instance 1:1:8")
    numbers = [int(part) for part in text.split(":")]
    return (numbers[0], numbers[len(numbers) // 2], numbers[-1])


def parse_sizes(text: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return (min, opt, max), each (height, width), from "HxW" or "HxW:HxW:HxW".

    Raises:
        SpecError: Not of this form, or not sizes a network can have.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise SpecError(f"--size {text}: give HEIGHTxWIDTH, or three of them, for instance 320x320:640x640:1088x1920")
    sizes = [parse_size(part) for part in parts]
    return (sizes[0], sizes[len(sizes) // 2], sizes[-1])


def parse_arguments(argv: Sequence[str] | None) -> EngineOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m export.to_trt",
        description="Build a TensorRT engine that takes uint8 frames and gives faces: decoding and NMS are a plugin in "
        "it. It writes OUT, OUT.json (what the runtime checks before it loads the engine) and the ONNX plugin form "
        "beside it, which is compared with PyTorch on real images first.",
    )
    parser.add_argument(
        "--weights", default=DEFAULT_WEIGHTS, help="checkpoint (.pth), or the name of published weights"
    )
    parser.add_argument(
        "--size",
        default="640x640",
        help="HEIGHTxWIDTH, multiples of 32; or MIN:OPT:MAX, as 320x320:640x640:1088x1920",
    )
    parser.add_argument("--batch", default="1:1:8", help="frames in a call: a number, or MIN:OPT:MAX")
    parser.add_argument(
        "--flavor",
        default=AUTO,
        choices=[AUTO, *FLAVORS],
        help="tensorrt: 10 or 11, builds on the GPU it is for; rtx: TensorRT-RTX, builds ahead of time, without a GPU; "
        "auto: tensorrt where it and a GPU are at hand, else rtx",
    )
    precision = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fp32", "single precision (default)"),
        ("fp16", "half precision; decoding and NMS stay in single"),
        ("int8", "not in this version"),
    ):
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name, help=text)
    parser.add_argument("--calib", metavar="NAME|PATH", help="calibration images of --int8; not in this version")
    parser.add_argument(
        "--compute-capability",
        metavar="LIST",
        help=f"GPUs of a TensorRT-RTX engine, for instance 86,89 (default: the one at hand, else "
        f"{','.join(map(str, AHEAD_OF_TIME))})",
    )
    parser.add_argument("--out", type=Path, default=Path("retinaface.engine"), help="engine to write")
    parser.add_argument("--onnx-only", action="store_true", help="write the plugin form alone")
    add_decode_arguments(parser)
    parser.add_argument(
        "--timing-cache",
        type=Path,
        metavar="FILE",
        help="what TensorRT measured (default: in ~/.cache/retinaface-trt)",
    )
    args = parser.parse_args(argv)
    if args.precision == "int8" or args.calib:
        raise SpecError("INT8 is not in this version of export.to_trt: use --fp16")
    if args.compute_capability and not re.fullmatch(r"\d{2,3}(,\d{2,3})*", args.compute_capability, re.ASCII):
        raise SpecError(f"--compute-capability {args.compute_capability}: give numbers like 86,89,120")
    words = list(argv) if argv is not None else sys.argv[1:]
    return EngineOptions(
        weights=args.weights,
        out=args.out,
        profile=Profile(parse_batch(args.batch), parse_sizes(args.size)),
        precision=args.precision or "fp32",
        decode=decode_spec(args),
        flavor=args.flavor,
        capabilities=tuple(int(number) for number in (args.compute_capability or "").split(",") if number),
        onnx_only=args.onnx_only,
        parity_images=args.parity_images,
        timing_cache=args.timing_cache,
        command=shlex.join(["python", "-m", "export.to_trt", *words]),
        progress=sys.stderr.isatty(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    start = time.perf_counter()
    sidecar = build_engine(options)
    if sidecar is not None:
        gpus = " ".join(f"sm_{number}" for number in sidecar.compute_capabilities)
        print(
            f"wrote {options.out}: {FLAVORS[sidecar.flavor].title} {sidecar.version}, {sidecar.precision}, {gpus}, "
            f"{sidecar.engine_bytes / 1e6:.1f} MB, and {sidecar_path(options.out).name}; "
            f"{time.perf_counter() - start:.1f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
