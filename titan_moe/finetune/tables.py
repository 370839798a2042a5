"""The configuration of `titan-moe finetune`: one class per TOML table. Docstrings of fields are their help texts.

Tables that mean the same as in `titan-moe train` are the same classes.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model

from titan_moe.config.tables import (
    Balancer,
    Beta,
    Fraction,
    Job,
    Metrics,
    NaturalInt,
    PathText,
    Positive,
    PositiveInt,
    Regularizers,
    Table,
    config_class,
    expand_user,
)
from torchtitan_ext.terms import Weight

Paths = Annotated[list[str], AfterValidator(lambda names: [expand_user(name) for name in names])]


class Model(Table):
    """The model to fine-tune: a directory that Transformers loads, or a name on the Hugging Face hub."""

    path: PathText = ""
    """A directory with config.json, safetensors and a tokenizer, or a repository of the hub. Must be given."""
    revision: str = ""
    """Branch, tag or commit of the hub's repository; empty: its main branch."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of computation. In full fine-tuning the parameters stay in float32; with LoRA the model's are in this type."""
    experts: Literal["grouped_mm", "batched_mm", "eager"] = "grouped_mm"
    """How Transformers multiplies by the experts' weights; "eager" is a loop over experts."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Transformers' implementation of attention; the flash ones need their package and a GPU."""


class Lora(Table):
    """Low-rank adapters (PEFT) in place of the model's own parameters."""

    rank: NaturalInt = 0
    """Rank of the adapters; 0: no adapters, all parameters are trained."""
    alpha: Positive = 128.0
    """Scale of the adapters' output, which is alpha / rank times the product."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout before the adapters of attention. All others are on parameters, where PEFT has none: it needs them off."""
    attention: bool = True
    """Adapters on the linear layers of attention."""
    feed_forward: bool = True
    """Adapters on the linear layers of dense feed-forward layers and of shared experts."""
    experts: bool = True
    """Adapters on the routed experts, one pair of matrices per expert."""
    router: bool = True
    """Adapters on the routers."""
    merge: bool = False
    """At the end, also write the model with the adapters added to its weights."""


class Data(Table):
    """Files of JSON lines: rows with "messages" (chat), or with "prompt" and "completion"."""

    train: Paths = []
    """Files to train on. Must be given; rows of all files are of the same kind."""
    validation: Paths = []
    """Files to validate on; empty: `validation_fraction` of the rows of `train`."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the rows of `train` that are kept for validation."""
    seq_len: Annotated[int, Field(ge=2)] = 2048
    """Tokens per sequence; longer rows are cut at the end."""
    packing: Literal["none", "bfd", "wrapped"] = "bfd"
    """Rows in a sequence: one ("none"), as many as fit, which don't see each other ("bfd"), or cut anywhere ("wrapped")."""
    completion_only: bool = True
    """Only tokens of completions, or of the assistant's messages, count in the loss and in the terms."""
    chat_template: PathText = ""
    """A file with a Jinja chat template in place of the tokenizer's own."""


class Training(Table):
    """The loop."""

    epochs: Positive = 3.0
    """Passes over the rows, unless `steps` is given."""
    steps: NaturalInt = 0
    """Optimizer steps; 0: by `epochs`."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all ranks and micro-batches."""
    microbatch_size: PositiveInt = 1
    """Sequences per forward pass and rank."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this total 2-norm."""


class Optimizer(Table):
    """AdamW."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.999
    """Decay of the second moment."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay on matrices."""
    eps: Positive = 1e-8
    """Epsilon in the denominator."""


class LRScheduler(Table):
    """Learning rate over the steps."""

    warmup_fraction: Fraction = 0.03
    """Share of all steps over which it rises linearly from 0."""
    decay: Literal["cosine", "linear", "none"] = "cosine"
    """Shape after warm-up; cosine and linear fall to 0."""


class Parallelism(Table):
    """Several ranks: each has its own sequences."""

    shard: bool = True
    """Shard parameters, gradients and the optimizer's state over all ranks (FSDP2); off: each rank has all (DDP)."""
    timeout_seconds: PositiveInt = 600
    """A collective that takes longer than this ends the run."""


class ActivationCheckpoint(Table):
    """Recomputation of activations in the backward pass."""

    enable: bool = True
    """Recompute every layer."""


class Checkpoint(Table):
    """Saving and resuming."""

    interval: NaturalInt = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""


class Validation(Table):
    """The loss on rows that are not trained on."""

    interval: NaturalInt = 0
    """Steps between validations; 0: only at the end. Without rows for validation there is none."""


class FinetuneConfig(Table):
    """Everything that makes a fine-tuning run."""

    job: Job = Job()
    model: Model = Model()
    lora: Lora = Lora()
    regularizers: Regularizers = Regularizers()
    balancer: Balancer = Balancer()
    data: Data = Data()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()


def finetune_class() -> type[FinetuneConfig]:
    """`FinetuneConfig` with a table `[regularizers.NAME]` for every registered term, and the same defaults as in `train`."""
    regularizers: Any = config_class().model_fields["regularizers"]
    fields: Any = {"regularizers": (regularizers.annotation, regularizers.default)}
    return create_model("FinetuneConfig", __base__=FinetuneConfig, __doc__=FinetuneConfig.__doc__, **fields)
