"""The network, written as for one device: transformer, attention, moe, head, init."""
