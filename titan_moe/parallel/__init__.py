"""What makes the one-device network run as configured: recomputation and compilation, and all that knows of ranks."""
