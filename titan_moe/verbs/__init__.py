"""The verbs of `titan-moe`, a module each: `run(words)` does one and returns the exit status. Raises UserError."""
