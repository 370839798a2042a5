"""Whether a checkpoint's files are large enough for the model that its configuration declares, before memory is asked for."""

from pathlib import Path

from titan_moe.checkpoint.manifest import DamageError, read_manifest
from titan_moe.config.tables import Model
from titan_moe.errors import UserError

BYTES_PER_PARAMETER = 2  # at least: checkpoints hold float32 or float64


def check_size(model: Model, checkpoint: Path) -> None:
    """Raises UserError when the model can't be in the checkpoint's files, or their sizes are not those of the manifest."""
    try:
        there = sum(entry.size for entry in read_manifest(checkpoint).values())
    except DamageError as error:
        raise UserError(f"{checkpoint} is damaged: {error}") from error
    needed = BYTES_PER_PARAMETER * parameters_at_least(model)
    if needed > there:
        raise UserError(
            f"{checkpoint}: its configuration declares a model of at least {needed:,} bytes, but its files have {there:,}"
        )


def parameters_at_least(model: Model) -> int:
    """Parameters of the matrices, without an embedding whose size the tokenizer decides."""
    moe = model.moe
    attention = 2 * model.dim * model.head_width * (model.heads + (model.kv_heads or model.heads))
    dense = 3 * model.dim * moe.dense_width
    sparse = 3 * model.dim * moe.hidden_dim * (moe.experts + moe.shared_experts) + model.dim * moe.experts
    layers = (
        model.layers * attention + moe.first_dense_layers * dense + (model.layers - moe.first_dense_layers) * sparse
    )
    return layers + model.vocab_size * model.dim
