"""From a checkpoint to what runs in production: ONNX graphs, and proof that they give the same faces."""
