"""The configurations that ship with titan_moe: `--config NAME` finds them here."""
