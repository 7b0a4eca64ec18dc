"""Errors a user can mend: each message is one line that says what was expected, what was found and what to do."""


class RetinaFaceError(Exception):
    """Base of every error that ends a command in one line and exit code 1."""


class SpecError(RetinaFaceError, ValueError):
    """A ModelSpec, or a part of it, holds an impossible value or cannot be read."""


class FrameError(RetinaFaceError, ValueError):
    """A frame is not what a detector takes: uint8, HWC, BGR."""


class ImageError(RetinaFaceError):
    """An image file is missing, damaged, too large or of an unsupported format."""


class VideoError(RetinaFaceError):
    """A video or camera cannot be opened, holds no frames or cannot be written."""


class ModelFileError(RetinaFaceError):
    """A model file is missing, damaged, unsafe or not a detector of this toolkit."""


class WeightsError(ModelFileError):
    """A checkpoint is missing, unsafe, or does not hold the weights of a known architecture."""


class NonFiniteError(RetinaFaceError, ArithmeticError):
    """The network gave NaN or infinity for an image: that is never reported as "no faces"."""


class ParityError(RetinaFaceError):
    """An exported model does not give the outputs of the model it was exported from."""


class OutputError(RetinaFaceError):
    """A file cannot be written where it should go."""


class DataError(RetinaFaceError):
    """A data set, prediction file or ground-truth file is missing or malformed."""


class NoLabelsError(DataError):
    """There are no labels in a folder; of what there is, images may be."""


class MissingPackageError(RetinaFaceError, ImportError):
    """An optional package is not installed; the message names the command that installs it."""


class ConfigError(RetinaFaceError, ValueError):
    """A setting of a training run is unknown or impossible."""


class ClosedError(RetinaFaceError):
    """A detector was used after it was closed."""


class BuildError(RetinaFaceError):
    """A plugin library or an engine cannot be built."""


class MissingToolError(BuildError):
    """A compiler, its headers or a GPU is not there; the message names what brings it."""


class GpuError(RetinaFaceError):
    """There is no GPU to use, or a call of CUDA failed; the message names the call and CUDA's own error."""


class DeviceMemoryError(GpuError):
    """There is not enough memory on the device; the message names what it was for, what is free and what there is."""


class DeviceLostError(GpuError):
    """The GPU, or CUDA's context on it, is lost: everything that a detector holds there fails from now on."""


class KernelFaultError(DeviceLostError):
    """A kernel broke CUDA's context, by an illegal address for instance; only a restart of the process helps."""


class DriverGoneError(DeviceLostError):
    """CUDA's driver does not serve this process any more: it has shut down, or the process is a fork of one."""


def reason(error: BaseException, limit: int | None = 200) -> str:
    """Return what a library or the system says of its failure: one line, not empty, without the name of a file."""
    said = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return said[:limit] or type(error).__name__
