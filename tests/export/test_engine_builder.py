"""What the builder tells TensorRT, and how it tells what went wrong.

TensorRT itself needs a GPU; its real bindings and TensorRT-RTX run in test_to_trt.py. Here a stand-in notes the calls.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from export import engine_builder
from export.engine_builder import BuildFailedError, build, make_logger, make_monitor, parse, read_layers


@pytest.fixture
def trt() -> MagicMock:
    """A TensorRT with whose builder everything goes well."""
    trt = MagicMock()
    trt.ILogger = trt.IProgressMonitor = type("Base", (), {})
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    builder = trt.Builder.return_value
    builder.create_network.return_value.num_outputs = 5
    builder.create_builder_config.return_value.add_optimization_profile.return_value = 0
    builder.create_builder_config.return_value.get_timing_cache.return_value.serialize.return_value = b"measured"
    return trt


@pytest.fixture
def request_(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "m.onnx").write_bytes(b"graph")
    return {
        "onnx": str(tmp_path / "m.onnx"),
        "plugin": "plugin.so",
        "plugin_name": ["Name", "3", "space"],
        "profile": {"min": [1, 32, 64, 3], "opt": [2, 64, 96, 3], "max": [4, 96, 128, 3]},
        "capabilities": [],
        "timing_cache": None,
        "optimization_level": None,
        "timing_iterations": None,
        "aux_streams": None,
        "timing_cache_out": str(tmp_path / "cache.out"),
    }


def _events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events go to the stdout of the test, and not to that of the import."""

    def tell(**event: Any) -> None:
        print(json.dumps(event))

    monkeypatch.setattr(engine_builder, "tell", tell)


def test_what_a_network_is_built_with(trt: MagicMock, request_: dict[str, Any]) -> None:
    engine = build(request_, trt, "logger")
    builder = trt.Builder.return_value
    config = builder.create_builder_config.return_value
    trt.Builder.assert_called_once_with("logger")
    trt.get_plugin_registry.return_value.load_library.assert_called_once_with("plugin.so")
    trt.get_plugin_registry.return_value.get_creator.assert_called_once_with("Name", "3", "space")
    builder.create_network.assert_called_once_with(2)  # the bit of STRONGLY_TYPED
    network = builder.create_network.return_value
    trt.OnnxParser.assert_called_once_with(network, "logger")
    trt.OnnxParser.return_value.parse.assert_called_once_with(b"graph")
    config.clear_flag.assert_called_once_with(trt.BuilderFlag.TF32)
    assert config.profiling_verbosity is trt.ProfilingVerbosity.DETAILED
    assert isinstance(config.progress_monitor, trt.IProgressMonitor)
    profile = builder.create_optimization_profile.return_value
    profile.set_shape.assert_called_once_with("images", (1, 32, 64, 3), (2, 64, 96, 3), (4, 96, 128, 3))
    config.add_optimization_profile.assert_called_once_with(profile)
    builder.build_serialized_network.assert_called_once_with(network, config)
    assert engine is builder.build_serialized_network.return_value
    config.set_compute_capability.assert_not_called()
    config.set_timing_cache.assert_not_called()
    assert not Path(request_["timing_cache_out"]).exists()


def test_a_capture_is_promised_where_the_flavour_can(trt: MagicMock, request_: dict[str, Any]) -> None:
    """TensorRT-RTX alone has the flag."""
    config = trt.Builder.return_value.create_builder_config.return_value
    build(request_, trt, "logger")
    config.set_flag.assert_called_once_with(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    config.set_flag.reset_mock()
    del trt.BuilderFlag.REQUIRE_USER_ALLOCATION
    build(request_, trt, "logger")
    config.set_flag.assert_not_called()


def test_the_gpus_it_is_built_for(trt: MagicMock, request_: dict[str, Any]) -> None:
    build({**request_, "capabilities": [86, 120]}, trt, "logger")
    config = trt.Builder.return_value.create_builder_config.return_value
    assert config.num_compute_capabilities == 2
    given = [call.args for call in config.set_compute_capability.call_args_list]
    assert given == [(trt.ComputeCapability.SM86, 0), (trt.ComputeCapability.SM120, 1)]


def test_the_settings_of_the_builder(trt: MagicMock, request_: dict[str, Any]) -> None:
    """Those that are asked for, 0 too; the others stay as TensorRT has them."""

    def built(**settings: int) -> tuple[int, int, int]:
        made = trt.Builder.return_value.create_builder_config.return_value
        made.builder_optimization_level, made.avg_timing_iterations, made.max_aux_streams = 3, 1, -1
        build({**request_, **settings}, trt, "logger")
        return made.builder_optimization_level, made.avg_timing_iterations, made.max_aux_streams

    assert built() == (3, 1, -1)
    assert built(optimization_level=0, timing_iterations=8, aux_streams=0) == (0, 8, 0)
    assert built(optimization_level=5) == (5, 1, -1)


def test_the_timing_cache(trt: MagicMock, request_: dict[str, Any], tmp_path: Path) -> None:
    """What was measured before is given, a cache that is refused or missing gives way to an empty one."""
    path, out = tmp_path / "cache", Path(request_["timing_cache_out"])
    config = trt.Builder.return_value.create_builder_config.return_value
    for content, taken, expected in (
        (None, True, [b""]),
        (b"old", True, [b"old"]),
        (b"old", False, [b"old", b""]),
    ):
        config.create_timing_cache.reset_mock()
        config.set_timing_cache.reset_mock()
        config.set_timing_cache.return_value = taken
        path.unlink(missing_ok=True)
        if content:
            path.write_bytes(content)
        build({**request_, "timing_cache": str(path)}, trt, "logger")
        assert [call.args[0] for call in config.create_timing_cache.call_args_list] == expected
        given = [call.args for call in config.set_timing_cache.call_args_list]
        assert given == [(config.create_timing_cache.return_value, False)] * len(expected)  # not of another GPU
        assert out.read_bytes() == b"measured"
        out.unlink()
    # no engine, nothing measured
    trt.Builder.return_value.build_serialized_network.return_value = None
    assert build({**request_, "timing_cache": str(path)}, trt, "logger") is None
    assert not out.exists()


def _set(name: str, value: object) -> Callable[[MagicMock], None]:
    def change(trt: MagicMock) -> None:
        *path, last = name.split(".")
        place: Any = trt
        for part in path:
            place = getattr(place, part)
        setattr(place, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("get_plugin_registry.return_value", None), "plugin library plugin.so cannot be loaded"),
        (
            _set("get_plugin_registry.return_value.load_library.return_value", None),
            "plugin library plugin.so cannot be loaded",
        ),
        (
            _set("get_plugin_registry.return_value.get_creator.return_value", None),
            "plugin.so does not bring the plugin Name version 3",
        ),
        (_set("ComputeCapability", SimpleNamespace(SM89=1)), "does not build for compute capability 86"),
        (
            _set("Builder.return_value.create_builder_config.return_value.set_compute_capability.return_value", False),
            "does not build for compute capability 86",
        ),
        (
            _set("Builder.return_value.create_builder_config.return_value.add_optimization_profile.return_value", -1),
            "the sizes of the profile are refused",
        ),
        (_set("Builder.return_value.create_network.return_value.num_outputs", 0), "found no outputs in the graph"),
    ],
)
def test_steps_that_fail(
    change: Callable[[MagicMock], None], message: str, trt: MagicMock, request_: dict[str, Any]
) -> None:
    change(trt)
    with pytest.raises(BuildFailedError, match=message):
        build({**request_, "capabilities": [86]}, trt, "logger")
    trt.Builder.return_value.build_serialized_network.assert_not_called()


def test_what_the_parser_says(trt: MagicMock) -> None:
    parser = trt.OnnxParser.return_value
    parser.parse.return_value = False
    parser.num_errors = 0
    with pytest.raises(BuildFailedError, match="refuses the graph: no reason given"):
        parse(trt, MagicMock(), "logger", b"x")
    parser.num_errors = 2
    parser.get_error.side_effect = lambda index: SimpleNamespace(desc=lambda: f"reason {index}")
    with pytest.raises(BuildFailedError, match="refuses the graph: reason 0"):
        parse(trt, MagicMock(), "logger", b"x")


def test_everything_is_logged_and_errors_are_collected(trt: MagicMock) -> None:
    log, errors = io.StringIO(), list[str]()
    logger = make_logger(trt, log, errors)
    for severity, message in (
        ("Severity.VERBOSE", "a"),
        ("Severity.WARNING", "b"),
        ("Severity.ERROR", "checkMacros.cpp: no driver"),
        ("Severity.INTERNAL_ERROR", "c"),
        ("Severity.ERROR", "d"),
    ):
        logger.log(severity, message)
    assert errors == ["c", "d"]
    lines = [line.split(maxsplit=1) for line in log.getvalue().splitlines()]
    words = ["VERBOSE a", "WARNING b", "ERROR checkMacros.cpp: no driver", "INTERNAL_ERROR c", "ERROR d"]
    assert [text for _, text in lines] == words
    assert all(float(seconds) >= 0 for seconds, _ in lines)


def test_the_share_that_is_done(trt: MagicMock, to_stdout: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Phases lie in phases: an inner one is a step of the outer."""
    monitor = make_monitor(trt)
    monitor.phase_start("outer", None, 4)
    assert monitor.step_complete("outer", 0)
    monitor.phase_start("inner", "outer", 2)
    assert monitor.step_complete("inner", 0)
    assert monitor.step_complete("inner", 1)
    monitor.phase_finish("inner")
    assert monitor.step_complete("outer", 1)
    monitor.phase_start("without steps", "outer", 0)
    assert monitor.step_complete("without steps", 0)
    monitor.phase_finish("without steps")
    for step in (2, 3, 4):
        assert monitor.step_complete("outer", step)
    monitor.phase_finish("outer")
    assert monitor.share() == 0
    events = _events(capsys)
    assert {event["event"] for event in events} == {"progress"}
    shares = [event["share"] for event in events]
    assert shares == pytest.approx([0, 0.25, 0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 0.75, 1, 1])
    assert [event["phase"] for event in events][:4] == ["outer", "outer", "inner", "inner"]


def _main(request: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, result: Any) -> int:
    """Run main over a `build` that returns or raises; stdout stays where it is."""

    def build(request: dict[str, Any], trt: Any, logger: Any) -> Any:
        logger.log("Severity.ERROR", "first")
        logger.log("Severity.ERROR", "second")
        if isinstance(result, Exception):
            raise result
        return result

    module = SimpleNamespace(ILogger=type("Base", (), {}), __version__="10.1")
    monkeypatch.setattr(engine_builder, "build", build)
    monkeypatch.setitem(sys.modules, "the_module", module)
    monkeypatch.setattr(engine_builder.os, "dup2", lambda *numbers: None)
    files = {"module": "the_module", "log": str(folder / "log"), "out": str(folder / "out")}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({**request, **files})))
    return engine_builder.main()


def test_how_a_build_ends(
    request_: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to_stdout: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for result, message in (
        (None, "the builder failed"),
        (BuildFailedError("a step"), "a step"),
        (TypeError("no builder"), "no builder"),
        (ImportError("no library"), "no library"),
    ):
        with monkeypatch.context() as patch:
            assert _main(request_, tmp_path, patch, result) == 1
        assert _events(capsys) == [{"event": "failed", "message": message, "detail": ["first"]}]
        assert not (tmp_path / "out").exists()
        assert ("ERROR second" in (tmp_path / "log").read_text()) is True
        assert (message in (tmp_path / "log").read_text()) == (result is not None)
    with monkeypatch.context() as patch:
        assert _main(request_, tmp_path, patch, b"an engine") == 0
    assert _events(capsys) == [{"event": "done", "version": "10.1"}]
    assert (tmp_path / "out").read_bytes() == b"an engine"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # what nobody expects is not hidden
        _main(request_, tmp_path, patch, ZeroDivisionError())


def test_how_layers_are_read(trt: MagicMock, tmp_path: Path) -> None:
    """At the shape asked for, as types are not known before there is one, and as JSON."""
    (tmp_path / "e").write_bytes(b"engine")
    request = {"plugin": "plugin.so", "engine": str(tmp_path / "e"), "shape": [2, 64, 96, 3]}
    runtime = trt.Runtime.return_value
    engine = runtime.deserialize_cuda_engine.return_value
    context = engine.create_execution_context.return_value
    inspector = engine.create_engine_inspector.return_value
    inspector.get_engine_information.return_value = "{}"
    assert read_layers(request, trt, "logger") == "{}"
    trt.Runtime.assert_called_once_with("logger")
    runtime.get_plugin_registry.return_value.load_library.assert_called_once_with("plugin.so")
    runtime.deserialize_cuda_engine.assert_called_once_with(b"engine")
    context.set_input_shape.assert_called_once_with("images", (2, 64, 96, 3))
    assert inspector.execution_context is context
    inspector.get_engine_information.assert_called_once_with(trt.LayerInformationFormat.JSON)
    for change, message in (
        (_set("set_input_shape.return_value", False), "no execution context"),
        (_set("create_execution_context.return_value", None), "no execution context"),
        (_set("deserialize_cuda_engine.return_value", None), "the engine cannot be loaded"),
        (_set("load_library.return_value", None), "plugin library plugin.so cannot be loaded"),
    ):
        for place in (context, engine, runtime, runtime.get_plugin_registry.return_value):
            change(place)
        with pytest.raises(BuildFailedError, match=message):
            read_layers(request, trt, "logger")
