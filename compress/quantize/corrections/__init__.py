"""What makes post-training quantization better: each a correction that ``improve.py`` knows by name."""
