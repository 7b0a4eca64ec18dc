"""Engines on a GPU: devices and their frames, TensorRT, what is checked before an engine is loaded."""
