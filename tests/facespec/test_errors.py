from __future__ import annotations

import inspect

import pytest

from facespec import errors

ALSO = {  # what callers who do not know our classes may catch
    "SpecError": (ValueError,),
    "FrameError": (ValueError,),
    "ConfigError": (ValueError,),
    "NonFiniteError": (ArithmeticError,),
    "MissingPackageError": (ImportError,),
    "NoLabelsError": (errors.DataError,),
    "WeightsError": (errors.ModelFileError,),
    "MissingToolError": (errors.BuildError,),
    "DeviceMemoryError": (errors.GpuError,),
    "DeviceLostError": (errors.GpuError,),
    "KernelFaultError": (errors.DeviceLostError,),
    "DriverGoneError": (errors.DeviceLostError,),
}
CLASSES = {name: found for name, found in vars(errors).items() if inspect.isclass(found)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_one_a_command_ends_with_in_a_line(name: str) -> None:
    assert issubclass(CLASSES[name], errors.RetinaFaceError)
    assert not issubclass(CLASSES[name], (OSError, KeyboardInterrupt))
    assert issubclass(CLASSES[name], ALSO.get(name, ()) or Exception)
    for base in ALSO.get(name, ()):
        assert issubclass(CLASSES[name], base)


def test_the_list_is_complete() -> None:
    assert ALSO.keys() <= CLASSES.keys()
    assert {name for name, found in CLASSES.items() if found.__bases__ != (errors.RetinaFaceError,)} - {
        "RetinaFaceError"
    } == ALSO.keys()
