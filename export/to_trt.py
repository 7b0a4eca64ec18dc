"""Build a TensorRT engine: uint8 frames in, faces out, with decoding and NMS in a plugin.

python -m export.to_trt --weights mobilenet0.25 --size 640x640 --fp16 --out retinaface.engine
python -m export.to_trt --size 320x320:640x640:1088x1920 --batch 1:1:8 --flavor rtx --compute-capability 86,89,120
"""

from __future__ import annotations

import hashlib
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from export.engine_layers import UNKNOWN, count_kernels, engine_shares, is_readable, run_builder
from export.options import DECODE_OPTIONS, Export, add_export_arguments, export_fields
from export.to_onnx import ExportedGraph, check_files, export_graph
from facespec.cli import ArgumentParser, argument, run, version
from facespec.errors import BuildError, MissingPackageError, MissingToolError, OutputError, RetinaFaceError, SpecError
from facespec.files import atomic_path, cache_folder, work_folder, write_text
from facespec.spec import DecodeSpec, parse_size
from plugins.build import ARCHITECTURES, PTX_ARCHITECTURE, parse_capabilities, read_report
from trt_runtime.gpu.flavor import AUTO, FLAVORS, RTX, TENSORRT, Flavor, child_environment, find_flavor, gpu_capability
from trt_runtime.gpu.sidecar import Profile, Sidecar, check_engine, sidecar_path
from trt_runtime.kernels import PLUGIN, ensure_library, find_library

TURING = 75
AHEAD_OF_TIME = (86, 89, 120)
"""Compute capabilities a TensorRT-RTX engine is built for where no GPU tells. Turing has an engine of its own: in one
with others, all of them run the kernels that it alone needs."""


BUILDER_OPTIONS = {
    "--optimization-level": ("optimization_level", 0, 5, "the higher, the faster the engine and the slower its build"),
    "--timing-iterations": ("timing_iterations", 1, 1000, "times that each kernel is timed before one is chosen"),
    "--aux-streams": ("aux_streams", 0, 64, "streams at most, beside the main one, for branches of the network"),
}
"""Settings of the builder, the fields of `EngineOptions` they set, the numbers they take, and what --help says."""

TENSORRT_ALONE = {
    "--timing-cache": "timing_cache",
    "--optimization-level": "optimization_level",
    "--timing-iterations": "timing_iterations",
}
"""Options that TensorRT-RTX has no use for, and their fields: it compiles on the user's machine, and times nothing."""


@dataclass(frozen=True)
class EngineOptions(Export):
    """What to build; `out` is the engine, the plugin form goes beside it. See `Export` for the other fields.

    Attributes:
        profile: Batches and sizes.
        flavor: "auto", "tensorrt" or "rtx".
        capabilities: Compute capabilities of a TensorRT-RTX engine; empty for the GPU at hand, or `AHEAD_OF_TIME`.
        onnx_only: Stop after the plugin form.
        timing_cache: File that makes the next build faster; None for a file in the user's cache folder. TensorRT only.
        optimization_level: From 0, the fastest build, to 5, the fastest engine. TensorRT only.
        timing_iterations: Times each kernel is timed before one is chosen. TensorRT only.
        aux_streams: Streams at most, beside the main one, for branches of the network; None leaves it to the builder.
    """

    profile: Profile = field(default_factory=Profile)
    flavor: str = field(default=AUTO, kw_only=True)
    capabilities: tuple[int, ...] = field(default=(), kw_only=True)
    onnx_only: bool = field(default=False, kw_only=True)
    timing_cache: Path | None = field(default=None, kw_only=True)
    optimization_level: int = field(default=5, kw_only=True)
    timing_iterations: int = field(default=8, kw_only=True)
    aux_streams: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.out.name:
            raise OutputError(f"--out {str(self.out)!r}: give the name of a file")
        if self.out.suffix.lower() == ".onnx" and not self.onnx_only:
            raise OutputError(f"--out {self.out}: an engine is no ONNX file: name it .engine, or add --onnx-only")
        super().__post_init__()
        if self.capabilities and self.flavor == TENSORRT.name:
            raise SpecError("--compute-capability is for --flavor rtx: TensorRT builds for the GPU at hand")
        unknown = sorted(set(self.capabilities) - set(RTX.capabilities))
        if unknown:
            raise SpecError(
                f"--compute-capability {','.join(map(str, unknown))}: TensorRT-RTX builds for "
                f"{','.join(map(str, RTX.capabilities))}"
            )
        for option, (name, least, most, _) in BUILDER_OPTIONS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise SpecError(f"{option} {value}: give a number from {least} to {most}")

    @property
    def plugin_form(self) -> Path:
        """The ONNX file: `out` itself if it ends in .onnx, else beside the engine."""
        if self.out.suffix.lower() == ".onnx":
            return self.out
        name = self.out.stem if self.out.suffix == ".engine" else self.out.name
        return self.out.with_name(f"{name}.plugin.onnx")

    @property
    def flavor_asked(self) -> str:
        """The flavour, which compute capabilities name too."""
        return RTX.name if self.capabilities else self.flavor

    @property
    def log(self) -> Path:
        """The build log, kept if the build fails."""
        return Path(f"{self.out}.build.log")

    def command(self, flavor: str | None = None, capabilities: Sequence[int] = ()) -> str:
        """Return the command line that builds this, with what was left to choose filled in."""
        sizes = ["x".join(map(str, size)) for size in self.profile.sizes_hw]
        batch = [str(number) for number in self.profile.batch]
        words = ["python", "-m", "export.to_trt", "--weights", self.weights, f"--{self.precision}"]
        words += self.calibration.words() if self.calibration else []
        words += ["--size", ":".join(sizes if len(set(sizes)) > 1 else sizes[:1])]
        words += ["--batch", ":".join(batch if len(set(batch)) > 1 else batch[:1])]
        words += ["--flavor", flavor or self.flavor]
        if capabilities or self.capabilities:
            words += ["--compute-capability", ",".join(map(str, capabilities or self.capabilities))]
        default = DecodeSpec()
        for option, (name, _) in DECODE_OPTIONS.items():
            if getattr(self.decode, name) != getattr(default, name):
                words += [option, str(getattr(self.decode, name))]
        for option, (name, *_) in BUILDER_OPTIONS.items():
            if getattr(self, name) != getattr(EngineOptions, name):
                words += [option, str(getattr(self, name))]
        out = str(self.out)
        words += ["--out", f"./{out}" if out.startswith("-") else out]
        return shlex.join(word if word.isprintable() else "NAME" for word in words)


def build_engine(options: EngineOptions) -> Sidecar | None:
    """Write the plugin form, the engine and its sidecar; return the sidecar, or None with `onnx_only`.

    Raises:
        RetinaFaceError: A step failed. If the plugin form was written by then, the message says so.
    """
    outputs: list[tuple[str, Path | None]] = [("--out", options.plugin_form)]
    if not options.onnx_only:
        outputs += [("--out", path) for path in (options.out, sidecar_path(options.out), options.log)]
        outputs.append(("--timing-cache", options.timing_cache))
    check_files(options, outputs)
    options = _suit_int8(options)
    if not options.onnx_only:
        try:
            flavor = find_flavor(options.flavor_asked)
            capabilities = _capabilities(options, flavor)
        except RetinaFaceError as error:
            again = f"; then {options.command()}" if isinstance(error, MissingPackageError) else ""
            otherwise = "--onnx-only writes what an engine is built of, for another machine"
            raise type(error)(f"{error}{again}. {otherwise}") from None
    profile = options.profile
    last = _likely_flavor(options).channels_last
    graph = export_graph(
        options, options.plugin_form, profile.fixed_hw, profile.sizes_hw[1], plugin=True, channels_last=last
    )
    print(f"wrote {graph.path}: {graph.spec.backbone}, convolutions {graph.shares}, {len(graph.content) / 1e6:.1f} MB")
    if options.onnx_only:
        return None
    try:
        if find_library("plugin") is None:
            print(f"compiling the plugin for {len(ARCHITECTURES)} architectures, once; about 15 s", flush=True)
        plugin = ensure_library("plugin", runs_here=flavor is not RTX)
        _note_missing_code(plugin, capabilities)
        engine, built_with, kernels = _build(options, graph, flavor, capabilities, plugin)
    except RetinaFaceError as error:
        missing = isinstance(error, (MissingPackageError, MissingToolError))
        again = f"; then {options.command()}" if missing else ""
        raise type(error)(f"{error}{again}. No engine was built; its ONNX form is there: {graph.path}") from None
    sidecar = Sidecar(
        engine_sha256=hashlib.sha256(engine).hexdigest(),
        engine_bytes=len(engine),
        flavor=flavor.name,
        version=built_with,
        compute_capabilities=capabilities,
        plugin={
            "name": PLUGIN.name,
            "version": PLUGIN.version,
            "namespace": PLUGIN.namespace,
            "sources_sha256": str(read_report(plugin).get("sources_sha256", "")),
        },
        precision=options.precision,
        convolutions=graph.convolutions,
        calibration=graph.calibration,
        parity=graph.report.summary(),
        profile=profile.shapes,
        onnx_sha256=hashlib.sha256(graph.content).hexdigest(),
        spec=graph.spec,
        built=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        toolkit=version(),
        command=options.command(flavor.name, capabilities if flavor is RTX else ()),
        kernels=kernels,
    )
    with atomic_path(options.out) as temporary:
        temporary.write_bytes(engine)
        if problems := check_engine(temporary, sidecar):
            raise BuildError(f"{options.out} is not written: {problems[0]}")
        _note_precision(temporary, sidecar)
    write_text(sidecar_path(options.out), sidecar.to_json())
    options.log.unlink(missing_ok=True)  # of an earlier build that failed
    return sidecar


def _likely_flavor(options: EngineOptions) -> Flavor:
    """Return the flavour an engine would be built with; nothing need be installed for its plugin form alone."""
    with suppress(MissingPackageError):  # raised where the engine would be built
        return find_flavor(options.flavor_asked)
    return FLAVORS.get(options.flavor_asked, RTX)


def _suit_int8(options: EngineOptions) -> EngineOptions:
    """Return the options with which INT8 costs TensorRT-RTX the fewest kernels, and say what INT8 is worth there."""
    with suppress(MissingPackageError):  # raised where the engine would be built
        if options.precision == "int8" and not options.onnx_only and find_flavor(options.flavor_asked) is RTX:
            print(
                "note: INT8 is probably slower than FP16 in TensorRT-RTX, and was never timed: of mobilenet0.25 it "
                f"makes 81 kernels, FP16 53; on sm_{TURING} nothing computes in INT8. Take --fp16 unless you time both"
            )
            return replace(options, float_first=True)
    return options


def _note_precision(engine: Path, sidecar: Sidecar) -> None:
    """Say where an engine seems to compute in another precision than its graph says, as far as that is seen here.

    That is no reason to refuse the engine: the network is strongly typed, and what EngineInspector says of layers that
    are fused differs from version to version.
    """
    if not is_readable(sidecar):
        return
    try:
        shares, doubts = engine_shares(engine, sidecar)
    except BuildError as error:
        print(f"note: what the layers compute in could not be read back: {error}")
        return
    if UNKNOWN in shares:
        print(f"note: EngineInspector does not tell what {shares[UNKNOWN]:.0%} of the multiply-accumulates compute in")
    if doubts:
        more = f", and {len(doubts) - 1} more (python -m export.inspect)" if len(doubts) > 1 else ""
        print(f"warning: by EngineInspector, {doubts[0]}{more}")


def _note_missing_code(plugin: Path, capabilities: Sequence[int]) -> None:
    """Say so if a plugin library has no machine code for a GPU, nor PTX that the GPU could take."""
    known = read_report(plugin).get("architectures")
    if isinstance(known, list):
        served = {c for c in capabilities if c >= PTX_ARCHITECTURE or any(a // 10 == c // 10 and a <= c for a in known)}
        lacking = ", ".join(f"sm_{c}" for c in capabilities if c not in served)
        if lacking:
            print(f"note: the plugin library here has no code for {lacking}: there, python -m plugins.build")


def _capabilities(options: EngineOptions, flavor: Flavor) -> tuple[int, ...]:
    """Return the compute capabilities an engine is for."""
    present = gpu_capability()
    if flavor is RTX:
        default = (present,) if present in RTX.capabilities else AHEAD_OF_TIME
        if present and not options.capabilities and present not in RTX.capabilities:
            print(f"note: TensorRT-RTX does not build for the GPU here, sm_{present}; building for others")
        capabilities = tuple(sorted(set(options.capabilities or default)))
        if TURING in capabilities[:-1]:
            print(f"note: with sm_{TURING} among them, all GPUs run more kernels: build an engine for it alone")
        return capabilities
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
    return options.timing_cache or cache_folder() / f"timing-{flavor.version()}.cache"


def _build(
    options: EngineOptions, graph: ExportedGraph, flavor: Flavor, capabilities: tuple[int, ...], plugin: Path
) -> tuple[bytes, str, int | None]:
    """Build in a child process, in a folder of its own; return the engine, TensorRT's version, and its kernels."""
    cache = _timing_cache(options, flavor)
    with child_environment(flavor) as environment, work_folder() as work:
        (work / "graph.onnx").write_bytes(graph.content)
        request = {
            "module": flavor.module,
            "onnx": str(work / "graph.onnx"),
            "plugin": str(plugin),
            "plugin_name": [PLUGIN.name, PLUGIN.version, PLUGIN.namespace],
            "profile": options.profile.shapes,
            "capabilities": capabilities if flavor is RTX else [],
            "timing_cache": str(cache.resolve()) if cache else None,
            "timing_cache_out": str(work / "timing.cache"),
            "optimization_level": None if flavor is RTX else options.optimization_level,
            "timing_iterations": None if flavor is RTX else options.timing_iterations,
            "aux_streams": options.aux_streams,
            "log": str(work / "build.log"),
            "out": str(work / "engine"),
        }
        log = work / "build.log"
        try:
            version = run_builder(request, environment, flavor, options.progress)
        except BuildError as error:
            write_text(options.log, log.read_text(encoding="utf-8") if log.exists() else "")
            raise BuildError(f"{error} (log: {options.log})") from None
        if cache and (work / "timing.cache").exists():
            with suppress(OutputError), atomic_path(cache) as temporary:  # it saves time, no more
                temporary.write_bytes((work / "timing.cache").read_bytes())
        return (work / "engine").read_bytes(), version, count_kernels(log.read_text(encoding="utf-8"))


def parse_batch(text: str) -> tuple[int, int, int]:
    """Return (min, opt, max) from "N" or "MIN:OPT:MAX".

    Raises:
        SpecError: Not of this form.
    """
    if not re.fullmatch(r"\d{1,5}(:\d{1,5}:\d{1,5})?", text, re.ASCII):
        raise SpecError(f"{text!r}: give one number, or MIN:OPT:MAX, for instance 1:1:8")
    numbers = [int(part) for part in text.split(":")]
    return (numbers[0], numbers[len(numbers) // 2], numbers[-1])


def parse_sizes(text: str) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return (min, opt, max), each (height, width), from "HxW" or "HxW:HxW:HxW".

    Raises:
        SpecError: Not of this form, or not sizes a network can have.
    """
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise SpecError(f"{text!r}: give HEIGHTxWIDTH, or three of them, for instance 320x320:640x640:1088x1920")
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
        "--size",
        dest="sizes_hw",
        type=argument(parse_sizes),
        default="640x640",
        help="HEIGHTxWIDTH, multiples of 32; or MIN:OPT:MAX, as 320x320:640x640:1088x1920",
    )
    parser.add_argument(
        "--batch", type=argument(parse_batch), default="1:1:8", help="frames in a call: a number, or MIN:OPT:MAX"
    )
    parser.add_argument(
        "--flavor",
        default=AUTO,
        choices=[AUTO, *FLAVORS],
        help="tensorrt: 10 or 11, builds on the GPU it is for; rtx: TensorRT-RTX, builds ahead of time, without a GPU; "
        "auto: tensorrt where it and a GPU are at hand, else rtx",
    )
    parser.add_argument(
        "--compute-capability",
        dest="capabilities",
        type=argument(parse_capabilities),
        default=(),
        metavar="LIST",
        help=f"GPUs of a TensorRT-RTX engine, for instance 86,89 (default: the one at hand, else "
        f"{','.join(map(str, AHEAD_OF_TIME))})",
    )
    parser.add_argument("--out", type=Path, default=Path("retinaface.engine"), help="engine to write")
    parser.add_argument("--onnx-only", action="store_true", help="write the plugin form alone")
    cache = "what TensorRT measured (default: in ~/.cache/retinaface-trt)"
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help=cache)
    for option, (name, least, most, text) in BUILDER_OPTIONS.items():
        text = f"{text}, {least} to {most}{'; TensorRT alone' if option in TENSORRT_ALONE else ''}"
        parser.add_argument(option, dest=name, type=int, default=getattr(EngineOptions, name), metavar="N", help=text)
    add_export_arguments(parser)
    given = export_fields(parser.parse_args(argv))
    return EngineOptions(profile=Profile(given.pop("batch"), given.pop("sizes_hw")), **given)


def engine_line(path: Path, sidecar: Sidecar) -> str:
    """Return what was built, in a line."""
    gpus = " ".join(f"sm_{number}" for number in sidecar.compute_capabilities)
    title = f"{FLAVORS[sidecar.flavor].title} {sidecar.version}"
    size = f"{sidecar.engine_bytes / 1e6:.1f} MB{f', {sidecar.kernels} kernels' if sidecar.kernels else ''}"
    return f"wrote {path}: {title}, {sidecar.precision}, {gpus}, {size}, and {sidecar_path(path).name}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    start = time.perf_counter()
    sidecar = build_engine(options)
    if sidecar is not None:
        print(f"{engine_line(options.out, sidecar)}; {time.perf_counter() - start:.1f} s")
        if TURING in sidecar.compute_capabilities and sidecar.engine_bytes > 20e6:
            print(
                f"note: for sm_{TURING}, TensorRT-RTX makes large engines of one fixed shape; "
                "--batch 1:1:2 makes a small one"
            )
    if sidecar is None or sidecar.flavor == RTX.name:
        for option, name in TENSORRT_ALONE.items():
            if getattr(options, name) != getattr(EngineOptions, name):
                print(f"note: {option} was not used: it is for TensorRT alone")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
