"""ONNX files: written from an exported program, and rewritten until engines compute them in integers."""
