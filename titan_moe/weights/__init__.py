"""Trained weights for other programs: Transformers directories and GGUF files.

entries.py              the tensors of a file and the parts of our tensors that they hold, in both directions
names.py                the tensor names of each Transformers architecture
architectures.py        its config.json, and which architecture fits a model
gguf_names.py           the tensor names of llama.cpp
tokenizer.py            sentencepiece models in other formats
source.py, target.py    the checkpoint that is read, the place that is written
transformers_folder.py, gguf_file.py, card.py    what is written
"""
