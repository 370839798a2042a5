"""What data sheets say of GPUs: the one table for utilization in a run and for predicted step times. Imports no torch."""

from typing import NamedTuple

from titan_moe.errors import UserError


class Card(NamedTuple):
    """Peaks of one GPU. Links are per direction and card."""

    bfloat16: float
    """Dense FLOP/s, without sparsity."""
    memory: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second to the other cards of its node."""
    network: float
    """Bytes per second to other nodes, in the vendor's reference machine; yours may have less."""


# By a part of the name that the driver reports; of two that fit, the first. Sources: the vendors' data sheets (NVIDIA H100,
# H200, A100 80GB; HGX B200; AMD Instinct MI300X) and, for the network, of DGX A100 (200 Gb/s per card), DGX H100, DGX H200
# and DGX B200 (400 Gb/s per card) and of MI300X machines with 400 Gb/s per card. NVLink and Infinity Fabric are given there
# for both directions together, PCIe 5 x16 too (128 GB/s).
CARDS = {
    "H100 PCIe": Card(756e12, 2.0e12, 64e9, 50e9),
    "H100": Card(989e12, 3.35e12, 450e9, 50e9),
    "H200": Card(989e12, 4.8e12, 450e9, 50e9),
    "B200": Card(2250e12, 8.0e12, 900e9, 50e9),
    "A100": Card(312e12, 2.04e12, 300e9, 25e9),
    "MI300X": Card(1307e12, 5.3e12, 448e9, 50e9),
}
CARDS_PER_NODE = 8


def find_card(device_name: str) -> Card | None:
    """The card whose name is part of this one, as "NVIDIA H100 80GB HBM3" contains "H100"; None: none is."""
    return next((card for name, card in CARDS.items() if name in device_name), None)


def card_named(name: str) -> Card:
    """The same for a name that a user typed, in any case. Raises UserError."""
    for known, card in CARDS.items():
        if known.lower() == name.lower():
            return card
    raise UserError(f"--card = {name[:80]!r} is not in the table; there are {', '.join(CARDS)}")
