"""ONNX graphs of the towers."""
