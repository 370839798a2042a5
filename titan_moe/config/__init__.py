"""Configuration: `tables` declares it, `load` reads and checks it, `describe` prints help, schema and `config.toml`."""

from importlib import import_module

from titan_moe.config.load import load_config
from titan_moe.config.tables import Config

__all__ = ["Config", "load_config"]

import_module("titan_moe.optim")  # registers the built-in optimizers and their tables, by name as a user's module is
