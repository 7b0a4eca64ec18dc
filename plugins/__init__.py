"""The CUDA and C++ sources of the decode + NMS plugin and of the letterbox; `plugins.build` compiles them."""
