"""The decoder: embedding, blocks `(h, carry) -> (h, carry)`, norm, and a head that returns the cross-entropy.

B sequences, S tokens per sequence, T = B * S, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import Model
from titan_moe.model.attention import Attention, RMSNorm, rotary_tables
from titan_moe.model.comm import SINGLE_RANK, TPComm
from titan_moe.model.feed_forward import FeedForward
from titan_moe.model.gemm import Linear, linear, local
from titan_moe.model.head import chunked_cross_entropy
from titan_moe.model.masks import Mask, make_mask
from titan_moe.model.moe import MoELayer
from torchtitan_ext.carry import Carry, empty_carry
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.terms import Terms, Tokens


class Inputs(NamedTuple):
    """One microbatch. Tokens without a label (padding, the last token of a document) have `token_weights` 0."""

    tokens: Tensor
    """(B, S) int64."""
    labels: Tensor
    """(B, S) int64, the next token."""
    document_ids: Tensor
    """(B, S) int64, equal for tokens of the same document."""
    positions: Tensor
    """(B, S) int64, the position used by the rotary embeddings."""
    token_weights: Tensor
    """(B, S), 1 / (labelled tokens of the global batch) or 0; at least float32."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch."""
    step: Tensor
    """() int64, the optimizer step; with `sequences` it is the key of every random draw."""
    sequence_positions: Tensor
    """(S,) int64, index of each of these tokens in its sequence; with `sequences` it is the key of draws per token."""
    fraction: float = 1.0
    """Factor on terms that do not depend on tokens (erc), with sum 1 over the step's microbatches; 0 skips them."""


class Output(NamedTuple):
    ce: Tensor
    """Sum over this microbatch of token weight times cross-entropy, in nats."""
    carry: Carry


class Block(nn.Module):
    """Pre-norm block: attention, then a dense or MoE feed-forward layer, each with a residual connection."""

    def __init__(self, model: Model, terms: Terms, layer: int) -> None:
        super().__init__()
        moe = model.moe
        self.comm: TPComm = SINGLE_RANK
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model)
        self.feed_forward_norm = RMSNorm(model.dim, model.norm_eps)
        self.feed_forward: FeedForward | None = None
        self.moe: MoELayer | None = None
        if layer < moe.first_dense_layers:
            self.feed_forward = FeedForward(model.dim, moe.dense_width)
        else:
            self.moe = MoELayer(model.dim, moe, terms, layer - moe.first_dense_layers)

    def forward(
        self,
        h_BSD: Tensor,
        carry: Carry,
        rotary: tuple[Tensor, Tensor],
        mask: Mask,
        tokens: Tokens,
    ) -> tuple[Tensor, Carry, Tensor | None]:
        """New hidden states, new carry, and the chosen experts (T, k) if this is an MoE layer.

        Under tensor parallelism h_BSD holds this rank's tokens; carry, rotary tables, mask and tokens cover all tokens.
        """
        h_BSD, x_BSD = self.attend(h_BSD, rotary, mask)
        x_TD = x_BSD.flatten(0, 1)
        topk_ids = None
        if self.moe is not None:
            out_TD, carry, topk_ids = self.moe(x_TD, carry, tokens)
        else:
            assert self.feed_forward is not None
            out_TD = self.feed_forward(x_TD)
            # Copies: FSDP's hooks on a block's inputs and outputs do not allow outputs that alias inputs.
            carry = Carry(
                carry.terms.clone(), carry.previous.clone(), carry.term_sums.clone(), carry.counts, carry.sums
            )
        return h_BSD + self.comm.reduce_scatter_sequence(out_TD.view_as(x_BSD)), carry, topk_ids

    def attend(self, h_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> tuple[Tensor, Tensor]:
        """Hidden states after attention, and the inputs (B, S, D) of the feed-forward layer."""
        x_BSD = self.comm.gather_sequence(self.attention_norm(h_BSD))
        h_BSD = h_BSD + self.comm.reduce_scatter_sequence(self.attention(x_BSD, rotary, mask))
        return h_BSD, self.comm.gather_sequence(self.feed_forward_norm(h_BSD))

    def choose_experts(self, h_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        """The experts (T, k) that the router of this MoE layer chooses. The experts themselves do not run."""
        assert self.moe is not None
        _, x_BSD = self.attend(h_BSD, rotary, mask)
        choice, _ = self.moe.router(x_BSD.flatten(0, 1))
        return choice.topk_ids_TK


class Transformer(nn.Module):
    """A Mixture-of-Experts language model, written as for one device; parallel/parallelize.py spreads it over ranks."""

    def __init__(self, model: Model, terms: Terms, dtype: torch.dtype) -> None:
        """model: settings with the vocabulary size filled in. dtype: of activations and products; parameters are at
        least float32."""
        super().__init__()
        assert model.vocab_size > 0, "the vocabulary size comes from the tokenizer"
        self.settings = model
        self.comm: TPComm = SINGLE_RANK
        self.terms = terms
        self.dtype = dtype
        self.moe_layers = model.layers - model.moe.first_dense_layers
        self.embedding = nn.Parameter(torch.empty(model.vocab_size, model.dim))
        self.layers = nn.ModuleDict({str(n): Block(model, terms, n) for n in range(model.layers)})
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.make_mask: Callable[[Tensor, Tensor | None, torch.dtype], Mask] = make_mask
        """Indices of tokens in their sequence (s,), document ids (B, s) and the compute type to an attention mask."""
        self.output = None if model.tie_embeddings else Linear(model.dim, model.vocab_size)
        self.to(accumulation_dtype(dtype))
        for moe in self.moe_modules():
            moe.router.expert_bias = moe.router.expert_bias.to(torch.float32)

    def blocks(self) -> list[Block]:
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def moe_modules(self) -> list[MoELayer]:
        return [block.moe for block in self.blocks() if block.moe is not None]

    def forward(self, inputs: Inputs) -> Output:
        """Cross-entropy and carry of one microbatch."""
        # Not `self.evaluate`: its FSDP hooks, nested in those of `forward`, would free the root's weights too early.
        ce, carry, _ = Transformer.evaluate(self, inputs)
        return Output(ce, carry)

    def evaluate(self, inputs: Inputs) -> tuple[Tensor, Carry, list[Tensor]]:
        """Cross-entropy, carry, and the chosen experts (T, k) of every MoE layer."""
        carry = self.empty_carry(inputs.tokens.numel(), inputs.tokens.device)
        h_BSD, carry, routing = self.run_blocks(inputs, self.embed(inputs.tokens), carry)
        return self.loss(h_BSD, inputs), self.terms.complete(carry), routing

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Embedding vectors (B, S, D). Under tensor parallelism each rank looks up its part of the vocabulary."""
        embedding_VD = local(self.embedding)
        rows_BS = tokens_BS - self.comm.shard_offset(embedding_VD.shape[0])
        on_rank_BS = (rows_BS >= 0) & (rows_BS < embedding_VD.shape[0])
        h_BSD = F.embedding(rows_BS.clamp(0, embedding_VD.shape[0] - 1), embedding_VD).to(self.dtype)
        return self.comm.reduce_scatter_sequence(h_BSD * on_rank_BS.unsqueeze(2))

    def empty_carry(self, tokens: int, device: torch.device) -> Carry:
        """The carry that enters the first block."""
        terms, experts, dtype = self.terms, self.settings.moe.experts, accumulation_dtype(self.dtype)
        width, measures = terms.carried_width(experts), len(terms.measures)
        return empty_carry(
            len(terms.names),
            tokens,
            self.moe_layers,
            experts,
            dtype,
            device,
            width,
            measures,
            terms.sums_width(experts),
        )

    def run_blocks(
        self, inputs: Inputs, h_BSD: Tensor, carry: Carry, layers: Iterable[int] | None = None
    ) -> tuple[Tensor, Carry, list[Tensor]]:
        """Hidden states (B, S, D), carry, and chosen experts (T, k) per MoE layer. layers: which blocks; None: all."""
        settings = self.settings
        rotary, mask = self.attention_inputs(inputs)
        tokens = Tokens(inputs.token_weights, inputs.sequences, inputs.step, inputs.sequence_positions, inputs.fraction)
        routing = []
        for layer in range(settings.layers) if layers is None else layers:
            h_BSD, carry, topk_ids = self.layers[str(layer)](h_BSD, carry, rotary, mask, tokens)
            if topk_ids is not None:
                routing.append(topk_ids)
        return h_BSD, carry, routing

    def attention_inputs(self, inputs: Inputs) -> tuple[tuple[Tensor, Tensor], Mask]:
        """The rotary tables and the mask of a microbatch."""
        settings = self.settings
        rotary = rotary_tables(
            inputs.positions, settings.rotary_width, settings.rope_theta, accumulation_dtype(self.dtype)
        )
        documents = inputs.document_ids if settings.document_mask else None
        return rotary, self.make_mask(inputs.sequence_positions, documents, self.dtype)

    def first_choices(self, inputs: Inputs) -> Tensor:
        """The experts (T, k) that the first MoE layer's router chooses, at the cost of the dense layers before it and of its
        attention."""
        carry = self.empty_carry(inputs.tokens.numel(), inputs.tokens.device)
        first = self.settings.moe.first_dense_layers
        h_BSD, _, _ = self.run_blocks(inputs, self.embed(inputs.tokens), carry, range(first))
        chosen_TK: Tensor = self.blocks()[first].choose_experts(h_BSD, *self.attention_inputs(inputs))
        return chosen_TK

    def loss(self, h_BSD: Tensor, inputs: Inputs) -> Tensor:
        """Final norm, vocabulary projection and weighted cross-entropy, from the last block's hidden states."""
        weights_T = inputs.token_weights.flatten()
        hidden_TD = self.comm.gather_sequence_replicated(self.norm(h_BSD)).flatten(0, 1)
        return chunked_cross_entropy(hidden_TD, self.output_weight, inputs.labels.flatten(), weights_T, self.comm)

    def logits(self, inputs: Inputs, chosen_N: Tensor | None = None) -> Tensor:
        """Logits of short texts, (B, S, V). chosen_N: indices into the flattened (B, S) of the only tokens whose logits are
        computed; the result is (N, V)."""
        carry = self.empty_carry(inputs.tokens.numel(), inputs.tokens.device)
        h_BSD, _, _ = self.run_blocks(inputs, self.embed(inputs.tokens), carry)
        hidden_TD = self.comm.gather_sequence_replicated(self.norm(h_BSD)).flatten(0, 1)
        if chosen_N is not None:
            return self.comm.gather_from_tp(linear(hidden_TD[chosen_N], self.output_weight))
        return self.comm.gather_from_tp(linear(hidden_TD, self.output_weight)).unflatten(0, inputs.tokens.shape)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), or under tensor parallelism this rank's part of the vocabulary."""
        return local(self.embedding if self.output is None else self.output.weight)
