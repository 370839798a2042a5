"""Megatron-LM's pretrain_gpt.py with flags for the losses' coefficients. Run it in a checkout of Megatron-LM of the version of
the installed megatron-core, where you would run pretrain_gpt.py, with its arguments and these:

    torchrun ... -m torchtitan_ext.adapters.megatron.pretrain ... --moe-sp-loss-coeff 2e-3 --moe-cp-loss-coeff 1e-3

Data, forward step and training loop are those of that checkout. Only the model's configuration and its spec are changed.
"""

# mypy: disable-error-code="import-untyped,import-not-found"

import functools
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from torchtitan_ext.adapters.megatron.configuration import add_arguments, coefficients_of, specialized_config
from torchtitan_ext.adapters.megatron.spec import layer_spec
from torchtitan_ext.adapters.megatron.tracking import log_also, log_names

SPEC = ("torchtitan_ext.adapters.megatron", "layer_spec")
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer"}


def main() -> None:
    """Reads sys.argv and trains."""
    try:
        import pretrain_gpt
        from megatron.core.enums import ModelType
        from megatron.training import arguments, inprocess_restart, pretrain
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: {error}: run this in a checkout of Megatron-LM (its folder with pretrain_gpt.py), "
            "with its requirements installed"
        )
    datasets = pretrain_gpt.train_valid_test_datasets_provider
    datasets.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    kind, step = ModelType.encoder_or_decoder, pretrain_gpt.forward_step
    words = {"store": store, "get_embedding_ranks": pretrain_gpt.get_embedding_ranks}
    extra = functools.partial(_with_further_arguments, pretrain_gpt)
    if not hasattr(arguments, "parse_and_validate_args"):  # up to 0.17
        words |= {"args_defaults": DEFAULTS, "extra_args_provider": extra}
        pretrain(datasets, functools.partial(build, log=True), kind, step, **words)
        return
    from megatron.training import argument_utils

    args = arguments.parse_and_validate_args(extra_args_provider=extra, args_defaults=DEFAULTS)
    if hasattr(argument_utils, "gpt_config_from_args"):  # since 0.19
        model = model_config(args)
        log_also(log_names(model.transformer))
        pretrain(argument_utils.pretrain_cfg_container_from_args(args, model), datasets, kind, step, **words)
        return
    container = argument_utils.pretrain_cfg_container_from_args(args)
    pretrain(container, datasets, functools.partial(build, log=True), kind, step, **words)


def _with_further_arguments(pretrain_gpt: Any, parser: ArgumentParser) -> ArgumentParser:
    """The flags of pretrain_gpt.py's own extra arguments, if it has any, and of the losses."""
    if getattr(pretrain_gpt, "has_nvidia_modelopt", False):
        parser = pretrain_gpt.add_modelopt_args(parser)
    return add_arguments(parser)


def transformer_config(args: Namespace) -> Any:
    """Megatron's configuration of the model from its arguments, with coefficients. Raises ValueError for refused settings."""
    if getattr(args, "yaml_cfg", None) is not None:
        raise ValueError("--yaml-cfg has no coefficients of losses: give the model by flags")
    try:
        from megatron.training.argument_utils import core_transformer_config_from_args
    except ImportError:  # before 0.18
        from megatron.training.arguments import core_transformer_config_from_args
    return specialized_config(core_transformer_config_from_args(args), **coefficients_of(args))


def model_config(args: Namespace) -> Any:
    """Megatron-LM's GPTModelConfig (since 0.19), with coefficients and `layer_spec`."""
    from megatron.training.argument_utils import gpt_config_from_args

    _check_spec(args)
    args.spec = SPEC
    return gpt_config_from_args(args, config=transformer_config(args))


def build(
    args: Namespace | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
    log: bool = False,
) -> Any:
    """Megatron-LM's model provider up to 0.18, with coefficients: what its gpt_builder builds from `layer_spec`.

    args: Megatron-LM's, taken from its global ones if not given. log: make its training loop log the losses' values."""
    from gpt_builders import gpt_builder
    from megatron.training import get_args

    args = args or get_args()
    config = specialized_config(config, **coefficients_of(args)) if config is not None else transformer_config(args)
    if log:
        log_also(log_names(config))
    _check_spec(args)
    # Its builder takes a ready spec from a module's variable.
    globals()["BUILT"] = layer_spec(config, vp_stage)
    args.spec = (__name__, "BUILT")
    return gpt_builder(args, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection)


def _check_spec(args: Namespace) -> None:
    if args.spec is not None and tuple(args.spec) not in (SPEC, (__name__, "BUILT")):
        raise ValueError(
            f"--spec {' '.join(args.spec)} would be replaced: leave it out, or pass it through `specialized`"
        )


if __name__ == "__main__":
    main()
