"""titan_moe: a composable trainer for Mixture-of-Experts language models whose experts specialise.

./run_train.sh                        the default job: a small MoE on real text, on a laptop CPU or one GPU
titan-moe train --help                every option
"""

__version__ = "0.1.0"
