"""Configuration: `tables` declares it, `load` reads and checks it, `describe` prints help, schema and `config.toml`."""

from titan_moe.config.load import load_config
from titan_moe.config.tables import Config

__all__ = ["Config", "load_config"]
