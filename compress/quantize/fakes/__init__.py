"""Fake quantization of a tensor: modules that round to integers and back, and learn by which steps."""
