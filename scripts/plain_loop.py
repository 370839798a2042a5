"""The losses in a training loop of your own, in plain PyTorch. Runs in seconds: python scripts/plain_loop.py"""

# %% Text: the source code of a module of the standard library, as bytes.
import argparse
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_ext.losses import coupling_loss, load_balance_loss, specialization_loss
from torchtitan_ext.metrics import expert_overlap, max_vio, topk_mass

TEXT = torch.tensor(list(inspect.getsource(argparse).encode()))
DIM, HIDDEN, EXPERTS, TOP_K, LAYERS, LENGTH = 64, 64, 8, 2, 3, 64


# %% An MoE layer. Beside its output it returns what the losses need: scores (T, E), ids (T, k), activations z (T, k, F).
class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(DIM, EXPERTS, bias=False)
        # All experts start as copies of one, as after upcycling a dense model.
        gate, up, down = (torch.randn(shape) / 8 for shape in ((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN)))
        self.gate, self.up, self.down = (nn.Parameter(w.repeat(EXPERTS, 1, 1)) for w in (gate, up, down))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores = self.router(x).softmax(-1)
        gates, ids = scores.topk(TOP_K)
        out, z = torch.zeros_like(x), x.new_zeros(len(x), TOP_K, HIDDEN)
        for e in range(EXPERTS):
            token, slot = (ids == e).nonzero(as_tuple=True)
            hidden = F.silu(x[token] @ self.gate[e].t()) * (x[token] @ self.up[e].t())
            z[token, slot] = hidden
            out = out.index_add(0, token, gates[token, slot, None] * (hidden @ self.down[e].t()))
        return out, scores, ids, z


# %% A byte-level model: what was seen so far is a running mean; each layer adds its experts' output.
class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, DIM), nn.Linear(DIM, 256)
        self.layers = nn.ModuleList(MoE() for _ in range(LAYERS))

    def forward(self, text: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        x, seen = self.embedding(text), []
        for layer in self.layers:
            past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            out, *what = layer(F.layer_norm(x + past, (DIM,)).flatten(0, 1))
            x = x + out.view_as(x)
            seen.append(tuple(what))
        return self.head(x), seen


# %% Training. Each term is a mean over tokens; it is summed over layers, and cp sees all layers at once.
def train(sp: float, cp: float, steps: int = 100) -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        start = torch.randint(len(TEXT) - LENGTH, (8, 1)) + torch.arange(LENGTH + 1)
        logits, seen = model(TEXT[start[:, :-1]])
        scores, ids, z = zip(*seen, strict=True)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), TEXT[start[:, 1:]].flatten())
        loss = cross_entropy + 0.01 * sum(load_balance_loss(s, i) for s, i in zip(scores, ids, strict=True))
        loss = loss + sp * sum(specialization_loss(one) for one in z) + cp * coupling_loss(scores, TOP_K)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = torch.stack([i.flatten().bincount(minlength=EXPERTS) for i in ids])
    overlap = torch.stack([expert_overlap(one) for one in z]).mean()
    mass = torch.stack([topk_mass(s, i) for s, i in zip(scores, ids, strict=True)]).mean()
    print(f"sp {sp:<5} cp {cp:<5}  cross-entropy {cross_entropy:.3f}  overlap {overlap:.3f}", end="  ")
    print(f"top-k mass {mass:.3f}  max_vio {max_vio(counts).mean():.2f}")


# %% Without sp and cp, and with each.
if __name__ == "__main__":
    for weights in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.05)):
        train(*weights)
