"""The parts of `python -m scripts.compare_quality`."""
