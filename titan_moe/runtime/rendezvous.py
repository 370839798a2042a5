"""Where the ranks of a run meet: a TCP store, which listens on the loopback interface alone when all are on one node.

torch's store reads pickled data from whoever connects, and by default listens on every interface of the machine.
"""

import datetime
import errno
import os
import socket

from torch.distributed import DistNetworkError, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.rendezvous import rendezvous

from titan_moe.errors import UserError
from titan_moe.runtime.ranks import LOOPBACK, master_address, master_port, on_one_node, split_address

BACKLOG = 2048  # connections that wait to be accepted: ranks connect all at once
ONE_NODE, SEVERAL_NODES = "titan_moe_loopback", "titan_moe_nodes"  # names for torchrun's --rdzv-backend


def loopback_store(port: int, ranks: int, timeout: datetime.timedelta) -> TCPStore:
    """The server of a store that only processes of this machine reach. port: 0 for a free one. Raises OSError."""
    server = socket.socket()
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, port))
        server.listen(BACKLOG)
    except OSError:
        server.close()
        raise
    port = server.getsockname()[1]
    return TCPStore(LOOPBACK, port, ranks, True, timeout, wait_for_workers=False, master_listen_fd=server.detach())


def join(timeout: datetime.timedelta) -> tuple[Store, int, int]:
    """The store of a run, this rank and the number of ranks, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Raises UserError for variables that can't be right, and torch.distributed.DistError when ranks are missing.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = (LOOPBACK, master_port()) if on_one_node() else master_address()
    if on_one_node():
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback_interface())
    in_use = f"environment: MASTER_PORT = {port}: another program on this host uses the port; choose another"
    launcher_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and on_one_node() and not launcher_has_store:
        try:
            return loopback_store(port, ranks, timeout), rank, ranks
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(in_use) from error
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    try:
        return next(rendezvous("env://", timeout=timeout))
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(in_use) from error
        raise


def loopback_interface() -> str:
    """The name of the loopback interface: "lo" on Linux, "lo0" on macOS."""
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


class OneNode(StaticTCPRendezvous):
    """torchrun's rendezvous of one node, which needs neither its host name nor a port that others can reach."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        timeout = datetime.timedelta(seconds=parameters.get_as_int("timeout", 600) or 600)
        store = loopback_store(0, 1, timeout)
        super().__init__(LOOPBACK, store.port, 0, 1, parameters.run_id, int(timeout.total_seconds()))
        self._store = store

    def get_backend(self) -> str:
        return ONE_NODE


class SeveralNodes(StaticTCPRendezvous):
    """torchrun's static rendezvous, which remembers whether the nodes have met."""

    met = False

    def __init__(self, parameters: RendezvousParameters) -> None:
        host, port = split_address(parameters.endpoint)
        rank, timeout = parameters.get_as_int("node_rank", 0) or 0, parameters.get_as_int("timeout", 600) or 600
        super().__init__(host, int(port), rank, parameters.max_nodes, parameters.run_id, timeout)

    def get_backend(self) -> str:
        return SEVERAL_NODES

    def next_rendezvous(self) -> RendezvousInfo:
        meeting = super().next_rendezvous()
        SeveralNodes.met = True
        return meeting


def register() -> None:
    """Makes both known to torchrun."""
    rendezvous_handler_registry.register(ONE_NODE, OneNode)
    rendezvous_handler_registry.register(SEVERAL_NODES, SeveralNodes)
