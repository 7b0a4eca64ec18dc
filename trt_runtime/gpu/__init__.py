"""Engines on a GPU: devices, frames that lie on them, TensorRT, and the checks before an engine is loaded."""
