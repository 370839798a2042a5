"""Adapters that bring the losses into other libraries' models. Each is imported by its own name."""
