"""Trained weights for other programs: Transformers directories and GGUF files.

entries.py         the tensors of a file and the parts of our tensors that they hold, in both directions
names.py           the tensor names of each Transformers architecture
architectures.py   its config.json, and which architecture fits a model
"""
