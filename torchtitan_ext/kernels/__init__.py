"""Triton kernels for CUDA tensors in bfloat16 and float32, as PyTorch operators.

    operators.py    the operators torch.ops.torchtitan_ext.*, with fakes; imports no triton
    swiglu.py       SwiGLU, alone or with the inner products of each token's activations (sp)
    router.py       choice of experts, scores, gate weights, and sums for the terms
    rotary.py       rotary positions
    cross_entropy.py    the vocabulary's cross-entropy and its gradient
    combine.py      weighted sums of each token's rows, and the gradients

`torchtitan_ext.ops.select.fused` says when they are used. PyTorch's operations that they replace define them:
docs/kernels.md lists both.
"""
