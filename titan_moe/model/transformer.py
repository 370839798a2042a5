"""The decoder: embedding, blocks `(h, carry) -> (h, carry)`, norm, and a head that returns the cross-entropy itself.

B sequences, S tokens, T = B * S, D model width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.config.tables import Model
from titan_moe.model.attention import Attention, RMSNorm, rotary_tables
from titan_moe.model.feed_forward import FeedForward
from titan_moe.model.gemm import Linear, linear, local
from titan_moe.model.head import chunked_cross_entropy
from titan_moe.model.moe import MoELayer
from titan_moe.model.shares import ALONE, Shares
from torchtitan_ext.carry import Carry, empty_carry
from torchtitan_ext.dtypes import accumulation_dtype
from torchtitan_ext.terms import Terms, Tokens


class Inputs(NamedTuple):
    """One micro-batch. What has no label (padding, the last token of a document) has `token_weights` 0."""

    tokens: Tensor
    """(B, S) int64."""
    labels: Tensor
    """(B, S) int64, the next token."""
    document_ids: Tensor
    """(B, S) int64, equal inside a document."""
    positions: Tensor
    """(B, S) int64, the position that rotary embeddings see."""
    token_weights: Tensor
    """(B, S), 1 / (labelled tokens of the global batch) or 0; at least float32."""
    sequences: Tensor
    """(B,) int64, index of each sequence in the global batch."""
    step: Tensor
    """() int64, the optimizer step; with `sequences` it keys every random draw."""
    places: Tensor
    """(S,) int64, where each of these tokens stands in its sequence; with `sequences` it keys draws per token."""
    share: float = 1.0
    """Of the terms that no token enters (erc): 1 over all micro-batches of a step; one with 0 need not compute them."""


class Output(NamedTuple):
    ce: Tensor
    """Sum over this micro-batch of token weight times cross-entropy, in nats."""
    carry: Carry


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual path."""

    def __init__(self, model: Model, terms: Terms, layer: int) -> None:
        super().__init__()
        moe = model.moe
        self.shares: Shares = ALONE
        self.attention_norm = RMSNorm(model.dim, model.norm_eps)
        self.attention = Attention(model)
        self.feed_forward_norm = RMSNorm(model.dim, model.norm_eps)
        self.feed_forward: FeedForward | None = None
        self.moe: MoELayer | None = None
        if layer < moe.first_dense_layers:
            self.feed_forward = FeedForward(model.dim, moe.hidden_dim * (moe.top_k + moe.shared_experts))
        else:
            self.moe = MoELayer(model.dim, moe, terms, layer - moe.first_dense_layers)

    def forward(
        self,
        h_BSD: Tensor,
        carry: Carry,
        rotary: tuple[Tensor, Tensor],
        mask_BSS: Tensor | None,
        tokens: Tokens,
    ) -> tuple[Tensor, Carry, Tensor | None]:
        """The new hidden states and carry, and the chosen experts (T, k) of an MoE layer. Under tensor parallelism h_BSD is
        this rank's part of the tokens, everything else is whole."""
        x_BSD = self.shares.gather(self.attention_norm(h_BSD))
        h_BSD = h_BSD + self.shares.scatter(self.attention(x_BSD, rotary, mask_BSS))
        x_BSD = self.shares.gather(self.feed_forward_norm(h_BSD))
        x_TD = x_BSD.flatten(0, 1)
        topk_ids = None
        if self.moe is not None:
            out_TD, carry, topk_ids = self.moe(x_TD, carry, tokens)
        else:
            assert self.feed_forward is not None
            out_TD = self.feed_forward(x_TD)
            # Copies: wrappers of a block (FSDP's) hang their hooks on its outputs, and mistrust views of its inputs.
            carry = carry._replace(terms=carry.terms.clone(), previous=carry.previous.clone())
        return h_BSD + self.shares.scatter(out_TD.view_as(x_BSD)), carry, topk_ids


class Transformer(nn.Module):
    def __init__(self, model: Model, terms: Terms, dtype: torch.dtype) -> None:
        """model: with its vocabulary size filled in. dtype: of the computation; parameters are at least float32."""
        super().__init__()
        assert model.vocab_size > 0, "the vocabulary size comes from the tokenizer"
        self.settings = model
        self.shares: Shares = ALONE
        self.pipeline: Any = None
        """Set where other ranks hold other blocks (parallel/pipeline.py)."""
        self.terms = terms
        self.dtype = dtype
        self.moe_layers = model.layers - model.moe.first_dense_layers
        self.embedding = nn.Parameter(torch.empty(model.vocab_size, model.dim))
        self.layers = nn.ModuleDict({str(n): Block(model, terms, n) for n in range(model.layers)})
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.mask: Callable[[Tensor, Tensor | None], Tensor | None] = own_mask
        """Places (s,) and document ids (B, s) to (query, key) pairs; context parallelism has its own."""
        self.output = None if model.tie_embeddings else Linear(model.dim, model.vocab_size)
        self.to(accumulation_dtype(dtype))
        for moe in self.moe_modules():
            moe.router.expert_bias = moe.router.expert_bias.to(torch.float32)

    def blocks(self) -> list[Block]:
        return [block for block in self.layers.values() if isinstance(block, Block)]

    def moe_modules(self) -> list[MoELayer]:
        moes = (block.moe for block in self.layers.values())
        return [moe for moe in moes if isinstance(moe, MoELayer)]

    def forward(self, inputs: Inputs) -> Output:
        """Cross-entropy and carry of one micro-batch: what training needs."""
        ce, carry, _ = self._evaluate(inputs)
        return Output(ce, carry)

    def evaluate(self, inputs: Inputs) -> tuple[Tensor, Carry, list[Tensor]]:
        """The same, and every MoE layer's chosen experts (T, k)."""
        return self._evaluate(inputs)

    def _evaluate(self, inputs: Inputs) -> tuple[Tensor, Carry, list[Tensor]]:
        # Apart from `evaluate`, as FSDP's hooks on a method inside those of forward would shard the root too early.
        h_BSD, carry, routing = self.blocks_of(inputs, *self.start(inputs), range(self.settings.layers))
        return self.loss(h_BSD, inputs), carry, routing

    def start(self, inputs: Inputs) -> tuple[Tensor, Carry]:
        """What enters the first block."""
        return self.embed(inputs.tokens), self.empty_carry(inputs.tokens.numel(), inputs.tokens.device)

    def empty_carry(self, tokens: int, device: torch.device) -> Carry:
        terms, experts, exact = self.terms, self.settings.moe.experts, accumulation_dtype(self.dtype)
        width, measures = terms.carried_width(experts), len(terms.measures)
        return empty_carry(len(terms.names), tokens, self.moe_layers, experts, exact, device, width, measures)

    def run_stage(
        self,
        inputs: Inputs,
        received: tuple[Tensor, ...] | None,
        layers: range,
        last: bool,
        routing: list[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """A pipeline stage (parallel/pipeline.py). received: what the stage before returned, None for the first. Returns hidden
        states and carry; after the last block the cross-entropy (1,) and the carry without `previous`. routing: is filled with
        what these layers chose."""
        if received is None:
            h_BSD, carry = self.start(inputs)
            if torch.is_grad_enabled():
                carry = carry._replace(terms=carry.terms.requires_grad_(), previous=carry.previous.requires_grad_())
        else:
            h_BSD, carry = received[0], Carry(*received[1:])
        h_BSD, carry, chosen = self.blocks_of(inputs, h_BSD, carry, layers)
        if routing is not None:
            routing += chosen
        if last:
            return torch.stack([self.loss(h_BSD, inputs)]), carry.terms.clone(), carry.counts, carry.sums
        return h_BSD, carry.terms.clone(), carry.previous.clone(), carry.counts, carry.sums

    def drop_embedding(self) -> None:
        """For a pipeline stage that is not the first."""
        del self.embedding

    def drop_head(self) -> None:
        """For a pipeline stage that is not the last."""
        del self.norm, self.output

    def blocks_of(
        self, inputs: Inputs, h_BSD: Tensor, carry: Carry, layers: range
    ) -> tuple[Tensor, Carry, list[Tensor]]:
        """Some of the blocks: hidden states (B, S, D), the carry, and the experts that their MoE layers chose (T, k)."""
        settings = self.settings
        head_dim = settings.head_dim or settings.dim // settings.heads
        rotary = rotary_tables(inputs.positions, head_dim, settings.rope_theta, accumulation_dtype(self.dtype))
        mask_BSS = self.attention_mask(inputs)
        tokens = Tokens(inputs.token_weights, inputs.sequences, inputs.step, inputs.places, inputs.share)
        routing = []
        for layer in layers:
            h_BSD, carry, topk_ids = self.layers[str(layer)](h_BSD, carry, rotary, mask_BSS, tokens)
            if topk_ids is not None:
                routing.append(topk_ids)
        return h_BSD, carry, routing

    def loss(self, h_BSD: Tensor, inputs: Inputs) -> Tensor:
        """Weighted cross-entropy of what left the last block."""
        weights_T = inputs.token_weights.flatten()
        hidden_TD = self.shares.whole(self.norm(h_BSD)).flatten(0, 1)
        return chunked_cross_entropy(hidden_TD, self.output_weight, inputs.labels.flatten(), weights_T, self.shares)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), or this rank's part of the vocabulary."""
        return local(self.embedding if self.output is None else self.output.weight)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Each token's vector, by the rank that has its row."""
        embedding_VD = local(self.embedding)
        rows_BS = tokens_BS - self.shares.first_row(embedding_VD.shape[0])
        here_BS = (rows_BS >= 0) & (rows_BS < embedding_VD.shape[0])
        found_BSD = F.embedding(rows_BS.clamp(0, embedding_VD.shape[0] - 1), embedding_VD).to(self.dtype)
        return self.shares.scatter(found_BSD * here_BS.unsqueeze(2))

    def attention_mask(self, inputs: Inputs) -> Tensor | None:
        return self.mask(inputs.places, inputs.document_ids if self.settings.document_mask else None)

    def logits(self, inputs: Inputs) -> Tensor:
        """(B, S, V), for evaluation of short texts."""
        h_BSD, _, _ = self.blocks_of(inputs, *self.start(inputs), range(self.settings.layers))
        hidden_TD = self.shares.whole(self.norm(h_BSD)).flatten(0, 1)
        return self.shares.widen(linear(hidden_TD, self.output_weight)).unflatten(0, inputs.tokens.shape)


def own_mask(places_S: Tensor, document_ids: Tensor | None) -> Tensor | None:  # noqa: ARG001 - context.py's signature
    """Which (query, key) pairs may attend when all keys are here: (B, S, S) bool; None: all earlier ones."""
    return None if document_ids is None else document_mask(document_ids)


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention inside each document: (B, S) -> (B, S, S) bool."""
    seq = document_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)) & causal
