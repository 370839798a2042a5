"""The verbs of `titan-moe`, a module each, imported only when its verb is used (the table is in `titan_moe.cli`).

A module's docstring opens its `--help`. `add_arguments(parser)` declares the options, `run(arguments)` returns the exit
status. Slow imports (torch) belong inside `run`, so that `--help` and wrong options answer at once.
"""
