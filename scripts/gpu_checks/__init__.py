"""The stages of `scripts/check_gpu.py`, one module each, and what they share."""
