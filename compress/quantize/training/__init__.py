"""What quantization in a fit needs beside the callback: data, ranks, averages, bits that fall."""
