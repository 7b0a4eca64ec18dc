"""The decode + NMS plugin: CUDA kernels, their TensorRT plugin, and the same kernels on the host.

`plugins.build` compiles them, `plugins.host` runs the kernels on a CPU, `PLUGIN` is what an ONNX node names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PluginName:
    """How TensorRT finds the plugin: as in plugins/src/plugin.cpp."""

    name: str = "RetinaFaceDecodeNMS"
    version: str = "1"
    namespace: str = "retinaface_trt"
    domain: str = "trt.plugins"
    node: str = "decode_nms"
    """Name of its node in our graphs, and so of its layer in engines."""


PLUGIN = PluginName()
