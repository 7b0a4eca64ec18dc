"""Lay a detector out for NVIDIA Triton Inference Server: a folder of its model repository.

python -m export.to_triton retinaface.engine --out model_repository
python -m export.to_triton retinaface.onnx --out model_repository --name retinaface_cpu --instances 2
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facespec.cli import ArgumentParser, run
from facespec.errors import BuildError, ModelFileError, OutputError, SpecError
from facespec.files import work_folder
from facespec.kinds import model_kind
from facespec.spec import SPEC_KEY, ModelSpec
from plugins.build import read_report
from trt_runtime.cpu import OrtRetinaFace
from trt_runtime.gpu.flavor import TENSORRT
from trt_runtime.gpu.sidecar import Sidecar, check_engine, read_sidecar, sidecar_path
from trt_runtime.kernels import ensure_library
from trt_runtime.onnx_model import OnnxModel

ONNX_BATCH = 8
"""Most frames in a call of an ONNX file, which itself sets no limit."""

PLUGIN_FILE = "libretinaface_plugin.so"
PLUGIN_REPORT = "libretinaface_plugin.json"

SIZE_KEY = "retinaface.size_hw"
"""Parameter: HEIGHTxWIDTH clients letterbox to; missing where each frame is sent at its own size, padded."""

_TYPES = {"int32": "TYPE_INT32", "float32": "TYPE_FP32"}


@dataclass(frozen=True)
class TritonOptions:
    """What to lay out, and where.

    Attributes:
        model: TensorRT engine with its sidecar, or portable ONNX file.
        out: The model repository; it may exist, and hold other models.
        version: The server takes the highest.
        instances: Copies that run at once.
        max_batch: Most frames in a call; None takes all the engine's profile allows, or `ONNX_BATCH`.
        max_queue_delay_us: How long a request may wait for others to share its batch, in microseconds.
        gpu: Run an ONNX file on the GPU; engines always do.
        force: Replace the folder of the model.
    """

    model: Path
    out: Path
    name: str = "retinaface"
    version: int = 1
    instances: int = 1
    max_batch: int | None = None
    max_queue_delay_us: int = 0
    gpu: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name, re.ASCII):
            raise SpecError(f"--name {self.name!r}: give letters, digits, and _ . - after the first, 100 at most")
        for option, value, least, most in (
            ("--version", self.version, 1, 10**9),
            ("--instances", self.instances, 1, 256),
            ("--max-batch", 1 if self.max_batch is None else self.max_batch, 1, 65535),
            ("--max-queue-delay-us", self.max_queue_delay_us, 0, 10**7),
        ):
            if not least <= value <= most:
                raise SpecError(f"{option} {value}: give a number from {least} to {most}")

    @property
    def folder(self) -> Path:
        """The folder of the model in the repository."""
        return self.out / self.name


@dataclass(frozen=True)
class Layout:
    """What goes into the folder of a model.

    Attributes:
        fixed_hw: The one network size it takes, or None if it takes several.
        size_hw: Network size it does best, which clients should letterbox to; None if no size is special.
        best_batch: Frames in a call that it is fastest with.
        sidecar: Of an engine; None for an ONNX file.
        versioned: File to copy, by its name in the folder of the version.
        shared: File to copy, by its name beside the configuration.
    """

    options: TritonOptions
    spec: ModelSpec
    fixed_hw: tuple[int, int] | None
    size_hw: tuple[int, int] | None
    best_batch: int
    max_batch: int
    sidecar: Sidecar | None
    versioned: dict[str, Path]
    shared: dict[str, Path]

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.options.gpu or self.sidecar is not None

    def config(self) -> dict[str, Any]:
        """Return config.pbtxt as a message: the fields of model_config.proto."""
        height, width = self.fixed_hw or (-1, -1)
        kind = "KIND_GPU" if self.on_gpu else "KIND_CPU"
        config: dict[str, Any] = {
            "name": self.options.name,
            **({"platform": "tensorrt_plan"} if self.sidecar else {"backend": "onnxruntime"}),
            "max_batch_size": self.max_batch,
            "input": [{"name": "images", "data_type": Keyword("TYPE_UINT8"), "dims": [height, width, 3]}],
            "output": [_output(name, *found) for name, found in self.spec.decode.outputs.items()],
            "instance_group": [{"count": self.options.instances, "kind": Keyword(kind)}],
            "version_policy": {"latest": {"num_versions": 1}},
        }
        if self.max_batch > 1:
            config["dynamic_batching"] = {
                "preferred_batch_size": sorted({self.best_batch, self.max_batch} - {1}),
                "max_queue_delay_microseconds": self.options.max_queue_delay_us,
            }
        if self.sidecar and self.fixed_hw:  # a graph serves one shape; Triton captures batch 1 and the preferred ones
            config["optimization"] = {"cuda": {"graphs": True}}
        config["model_warmup"] = [self._warmup(batch) for batch in sorted({1, self.best_batch, self.max_batch})]
        known = self.parameters().items()
        config["parameters"] = [{"key": key, "value": {"string_value": value}} for key, value in known]
        return config

    def parameters(self) -> dict[str, str]:
        """Return what clients must know; backends pass over parameters whose names they do not know."""
        size = {SIZE_KEY: "x".join(map(str, self.size_hw))} if self.size_hw else {}
        fitted = "scaled by one factor, bilinear, until it touches the size" if size else "not scaled"
        colour = ",".join(map(str, self.spec.preprocess.mean_bgr))
        return {
            SPEC_KEY: self.spec.to_json(),
            f"{SPEC_KEY}_sha256": self.spec.sha256(),
            "retinaface.score_floor": repr(self.spec.decode.score_threshold),
            **size,
            "retinaface.letterbox": f"a uint8 BGR frame, {fitted}, top left, padded right and below to "
            f"{'it' if size else 'multiples of 32'} with BGR {colour}; boxes and landmarks are in pixels of that input",
        }

    def _warmup(self, batch: int) -> dict[str, Any]:
        height, width = self.fixed_hw or self.size_hw or (640, 640)
        images = {"data_type": Keyword("TYPE_UINT8"), "dims": [height, width, 3], "zero_data": True}
        return {"name": f"batch {batch}", "batch_size": batch, "inputs": [{"key": "images", "value": images}]}

    def readme(self) -> str:
        """Return how to serve it."""
        name, sidecar = self.options.name, self.sidecar
        server = ["tritonserver --model-repository=/models"]
        if sidecar:
            gpus = " ".join(f"sm_{number}" for number in sidecar.compute_capabilities)
            about = (
                f"A TensorRT {sidecar.version} engine for {gpus}, {sidecar.precision}. It runs on that GPU, in the "
                f"release of the container whose TensorRT is\n{sidecar.version}: https://docs.nvidia.com/deeplearning/frameworks/"
                "support-matrix. The plugin library needs a glibc no older than\nthat of the machine that compiled it."
            )
            server.append(f"--backend-config=tensorrt,plugins=/models/{name}/{PLUGIN_FILE}")
        else:
            about = "A portable ONNX file; ONNX Runtime runs it, in any recent release of the container."
        gpus = "--gpus all " if self.on_gpu else ""
        container = f'docker run --rm {gpus}-p 8000:8000 -p 8001:8001 -v "$PWD":/models:ro'
        command = " \\\n      ".join([container, "nvcr.io/nvidia/tritonserver:YY.MM-py3", *server])
        return f"""# {name}

{about}

Serve it, from the folder above this one:

    {command}

Ask it, from a checkout of the toolkit (pip install -e '.[serve]'):

    python -m examples.triton_client photo.jpg --out faces.jpg --server localhost:8001 --model {name}

Other clients send `images`, uint8 (B, H, W, 3), BGR; what else they must know stands in `parameters` of config.pbtxt,
which the server hands out. The first `num_detections` rows of `boxes`, `scores` and `landmarks` are faces, best first.
`num_candidates` of -1 means that the network gave NaN or infinity.
"""


class Keyword(str):
    """A value of an enum: written without quotes."""


def _output(name: str, kind: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return a field of ModelConfig; of shape (B,) it is `dims: [1]` with an empty reshape, as Triton's guide asks."""
    output = {"name": name, "data_type": Keyword(_TYPES[kind])}
    return {**output, "dims": list(shape)} if shape else {**output, "dims": [1], "reshape": {"shape": []}}


def to_pbtxt(message: dict[str, Any], indent: str = "") -> str:
    """Return the protobuf text form of a message: dicts are messages, lists are repeated fields."""
    return "".join(f"{indent}{name}{_value(value, indent)}\n" for name, value in message.items())


def _value(value: Any, indent: str) -> str:
    if isinstance(value, dict):
        return f" {{\n{to_pbtxt(value, indent + '  ')}{indent}}}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = indent + "  "
        return " [\n" + ",\n".join(f"{inner}{_value(item, inner)[1:]}" for item in value) + f"\n{indent}]"
    if isinstance(value, list):
        return f": [{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return f": {str(value).lower()}"
    if isinstance(value, str) and not isinstance(value, Keyword):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f': "{escaped}"'
    return f": {value}"


def plan(options: TritonOptions) -> Layout:
    """Return what will be written; nothing is, except that the plugin library is compiled if it is not there.

    Raises:
        ModelFileError: Missing, damaged, or not what Triton can serve.
        SpecError: The options do not fit the model.
    """
    kind = model_kind(options.model)
    if kind == "checkpoint":
        raise ModelFileError(
            f"{options.model}: a checkpoint; export it first: python -m export.to_onnx --weights {options.model}"
        )
    if not options.model.is_file():
        raise ModelFileError(f"{options.model}: no such model file")
    if not kind:
        raise ModelFileError(f"{options.model}: expected an ONNX file (.onnx) or an engine (.engine)")
    return _plan_onnx(options) if kind == "onnx" else _plan_engine(options)


def _plan_onnx(options: TritonOptions) -> Layout:
    opened = OnnxModel(options.model)
    if opened.is_plugin_form:
        raise ModelFileError(
            f"{options.model}: a plugin form, which ONNX Runtime in Triton cannot run: write a portable file with "
            "python -m export.to_onnx, or an engine with python -m export.to_trt --flavor tensorrt"
        )
    with OrtRetinaFace(opened) as detector:  # it checks inputs and outputs
        spec, fixed = detector.spec, detector.size_hw if isinstance(detector.size_hw, tuple) else None
    max_batch = options.max_batch or ONNX_BATCH
    weights = {str(path.relative_to(options.model.resolve().parent)): path for path in opened.weights}
    return Layout(
        options,
        spec,
        fixed_hw=fixed,
        size_hw=fixed,
        best_batch=max_batch,
        max_batch=max_batch,
        sidecar=None,
        versioned={"model.onnx": options.model, **weights},
        shared={},
    )


def _plan_engine(options: TritonOptions) -> Layout:
    if options.gpu:
        raise SpecError("--gpu is for ONNX files: an engine always runs on the GPU")
    sidecar = read_sidecar(options.model)
    if sidecar.flavor != TENSORRT.name:
        raise ModelFileError(
            f"{options.model}: an engine of TensorRT-RTX, and Triton runs those of TensorRT: on a machine with "
            f"the GPU, {_for_tensorrt(sidecar.command)}"
        )
    if problems := check_engine(options.model, sidecar):
        raise ModelFileError(f"{options.model}: {problems[0]}")
    least, best, most = (sidecar.profile[name] for name in ("min", "opt", "max"))
    if least[0] > 1:
        raise SpecError(
            f"{options.model} takes {least[0]} frames or more in a call, and Triton may send one: "
            f"build it again with --batch 1:{best[0]}:{most[0]}"
        )
    if (options.max_batch or 1) > most[0]:
        raise SpecError(
            f"--max-batch {options.max_batch}: {options.model} takes {most[0]} frames in a call at most: "
            f"build it again with --batch 1:{best[0]}:{options.max_batch}"
        )
    plugin = ensure_library("plugin")
    headers = str(read_report(plugin).get("headers_version") or sidecar.version)
    if headers.split(".")[0] != sidecar.version.split(".")[0]:  # the registry it joins has another layout
        raise BuildError(
            f"{plugin} was compiled with the headers of TensorRT {headers}, and {options.model} is of TensorRT "
            f"{sidecar.version}: set TENSORRT_INCLUDE_DIR to the folder of those headers, then python -m plugins.build"
        )
    shared = {PLUGIN_FILE: plugin}
    if plugin.with_suffix(".json").is_file():
        shared[PLUGIN_REPORT] = plugin.with_suffix(".json")
    max_batch = options.max_batch or most[0]
    size_hw = (best[1], best[2])
    return Layout(
        options,
        sidecar.spec,
        fixed_hw=size_hw if least[1:3] == most[1:3] else None,
        size_hw=size_hw,
        best_batch=min(best[0], max_batch),
        max_batch=max_batch,
        sidecar=sidecar,
        versioned={"model.plan": options.model, "model.plan.json": sidecar_path(options.model)},
        shared=shared,
    )


def _for_tensorrt(command: str) -> str:
    """Return the command of a TensorRT-RTX engine, changed to build one of TensorRT."""
    return re.sub(r" --compute-capability \S+", "", re.sub(r"--flavor \S+", f"--flavor {TENSORRT.name}", command))


def write(layout: Layout) -> Path:
    """Write the folder of the model, or of one more version of it, whole or not at all; return it.

    Raises:
        OutputError: It is there already, is of another model, or cannot be written.
    """
    options, folder, config = layout.options, layout.options.folder, to_pbtxt(layout.config())
    read = [path.resolve() for path in (*layout.versioned.values(), *layout.shared.values())]
    if any(path.is_relative_to(folder.resolve()) for path in read):
        raise OutputError(f"--out {options.out}: {options.model} lies in {folder}, which would be written")
    target, only_version = folder, False
    if folder.exists() and not options.force:
        target, only_version = folder / str(options.version), True
        if target.exists():
            raise OutputError(f"{target} is there: give another --version or --name, or --force to replace {folder}")
        if _text(folder / "config.pbtxt") != config:
            raise OutputError(f"{folder} holds another model or other settings: give another --name, or --force")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        with work_folder(options.out) as temporary:
            new = temporary / "new"
            _fill(new if only_version else new / str(options.version), layout.versioned)
            if not only_version:
                _fill(new, layout.shared)
                (new / "config.pbtxt").write_text(config, encoding="utf-8")
                (new / "README.md").write_text(layout.readme(), encoding="utf-8")
            # the old one is moved to where nothing is swept, should the process be killed
            with tempfile.TemporaryDirectory(prefix=f".{options.name}.", dir=options.out) as aside:
                old = Path(aside) / "old"
                if target.exists():
                    target.rename(old)
                try:
                    new.rename(target)
                except BaseException:  # an interrupt, too, brings the old one back
                    if old.exists():
                        old.rename(target)
                    raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _fill(folder: Path, files: dict[str, Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def parse_arguments(argv: Sequence[str] | None) -> TritonOptions:
    """Return the options of a command line."""
    parser = ArgumentParser(
        prog="python -m export.to_triton",
        description="Lay a detector out for NVIDIA Triton Inference Server: OUT/NAME with config.pbtxt, the model, for "
        "an engine its plugin library, and a README.md with the command that serves it. If OUT/NAME is there with the "
        "same configuration, a new --version is added.",
    )
    parser.add_argument("model", type=Path, help="TensorRT engine (not TensorRT-RTX), or portable ONNX file")
    parser.add_argument("--out", type=Path, required=True, help="model repository")
    parser.add_argument("--name", default="retinaface", help="name of the model")
    parser.add_argument("--version", type=int, default=1, help="the server takes the highest")
    parser.add_argument("--instances", type=int, default=1, help="copies that run at once")
    most = f"most frames in a call (default: what the engine takes; ONNX: {ONNX_BATCH}); 1 turns batching off"
    parser.add_argument("--max-batch", type=int, help=most)
    wait = "microseconds a request waits for others to share its batch; those that come while one runs share the next"
    parser.add_argument("--max-queue-delay-us", type=int, default=TritonOptions.max_queue_delay_us, help=wait)
    parser.add_argument("--gpu", action="store_true", help="run an ONNX file on the GPU")
    parser.add_argument("--force", action="store_true", help="replace OUT/NAME, with all its versions")
    return TritonOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(argv)
    layout = plan(options)
    written = write(layout)
    size = f"{layout.fixed_hw[0]}x{layout.fixed_hw[1]}" if layout.fixed_hw else "any size"
    readme = options.folder / "README.md"
    print(f"wrote {written}: {size}, up to {layout.max_batch} frames in a call; {readme} serves it")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
