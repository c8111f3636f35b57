"""What quantization does to a captured graph, before it is rounded and after."""
