"""What nodes are is read from Ray's own tables and labels; a table shows it to a person. No cluster here."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from rayswift.cluster import nodes, session
from rayswift.planning.hardware import GB, GpuSpec, NodeSpec, find_gpu
from rayswift.planning.placement import Placement

A100_80 = find_gpu("A100", 80 * GB)


def node(name: str, port: int = 0, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    """A node as `ray.nodes()` lists it."""
    return {
        "NodeID": name, "Alive": True, "Resources": {"memory": 8.0 * GB, **resources}, "Labels": labels or {},
        "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port,
    }  # fmt: skip


def shaped(name: str, shape: str, gpus: int = 8) -> dict[str, Any]:
    return node(name, labels={"rayswift.io/node-shape": shape}, CPU=96.0, GPU=float(gpus))


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The nodes of the cluster; the driver is on the node `here`, and its torch finds nothing."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(nodes.ray, "nodes", lambda: found)
    context = type("Context", (), {"get_node_id": lambda self: "here"})
    monkeypatch.setattr(nodes.ray, "get_runtime_context", context)
    monkeypatch.setattr(nodes, "_local_device", lambda device: None)
    return found


def weakest(device: str = "cuda") -> tuple[str | None, int | None]:
    gpu, size = nodes.weakest_device(device, nodes.living_nodes(device))
    return (gpu.name if gpu else None), size


def test_nodes_are_read_with_their_labels(listed: list[dict[str, Any]]) -> None:
    lost = {**shaped("lost", "a100-8x80"), "Alive": False}
    listed += [node("here"), shaped("g", "a100-8x80"), lost]
    listed[1]["Labels"]["ray.io/accelerator-type"] = "A100"
    assert nodes.living_nodes("cuda") == (
        NodeSpec("here", 0, 0.0, 8 * GB),
        NodeSpec("g", 8, 96.0, 8 * GB, shape="a100-8x80", accelerator_type="A100"),
    )
    assert [n.num_devices for n in nodes.living_nodes("cpu")] == [0, 0]


def test_a_driver_without_gpus_learns_of_them_from_the_shapes(
    listed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_local_device", lambda device: pytest.fail("torch of the head knows nothing"))
    listed += [node("here"), shaped("g", "a100-8x80"), node("data", CPU=32.0)]
    assert weakest() == ("A100-80GB", 80 * GB)
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"GPU": 8.0, "CPU": 128.0, "memory": 24.0 * GB})
    spec = session.cluster_spec("cuda")
    assert (spec.gpu, spec.device_memory_bytes, spec.num_devices, spec.num_nodes) == (A100_80, 80 * GB, 8, 3)
    assert [n.id for n in spec.nodes] == ["here", "g", "data"]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([shaped("g", "h100-8x80"), shaped("h", "a100-8x80")], ("A100-80GB", 80 * GB)),
        ([shaped("g", "h200-8x141"), shaped("h", "h100-8x80")], ("H100", 80 * GB)),
        ([node("g", labels={"ray.io/accelerator-type": "A100"}, GPU=8.0)], ("A100-40GB", 40 * GB)),
        ([node("g", labels={"ray.io/accelerator-type": "V100"}, GPU=8.0)], (None, None)),
        ([shaped("g", "h100-8x80"), node("h", GPU=8.0)], (None, 80 * GB)),
        ([], (None, None)),
    ],
)
def test_the_weakest_device_counts(
    others: list[dict[str, Any]], expected: tuple[str | None, int | None], listed: list[dict[str, Any]]
) -> None:
    listed += [node("here", CPU=8.0), *others]
    assert weakest() == expected


TYPED = {"ray.io/accelerator-type": "A100"}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ("A100-80GB", 85 * GB)),
        ([node("g", labels=TYPED, GPU=8.0)], ("A100-80GB", 85 * GB)),  # of the same type as the driver's own
        ([shaped("g", "a100-8x40")], ("A100-40GB", 40 * GB)),
        ([node("g", labels={"ray.io/accelerator-type": "L40S"}, GPU=8.0)], ("A100-80GB", 48 * GB)),
    ],
)
def test_a_driver_on_a_gpu_node_measures_what_labels_leave_open(
    others: list[dict[str, Any]],
    expected: tuple[str | None, int | None],
    listed: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    local: tuple[GpuSpec | None, int] = (A100_80, 85 * GB)
    monkeypatch.setattr(nodes, "_local_device", lambda device: local)
    listed += [node("here", labels=TYPED, GPU=8.0), *others]
    assert weakest() == expected


@pytest.fixture
def answering() -> Iterator[int]:
    """A port that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_room_is_counted_where_nodes_answer_and_have_the_label(
    listed: list[dict[str, Any]], answering: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"rayswift.io/node-shape": "a100-8x80"}
    with socket.socket() as held:  # bound and not listening: it refuses, like the port of a node that has just died
        held.bind(("127.0.0.1", 0))
        listed += [
            node("busy", answering, labels, CPU=8.0, GPU=8.0),
            node("full", answering, labels, CPU=8.0, GPU=8.0),
            node("dead", held.getsockname()[1], labels, CPU=8.0, GPU=8.0),
            node("other", answering, CPU=8.0, GPU=8.0),
        ]
        free = {"busy": {"CPU": 8.0, "GPU": 3.0}, "dead": {"CPU": 8.0, "GPU": 8.0}, "other": {"CPU": 8.0, "GPU": 8.0}}
        monkeypatch.setattr(nodes, "available_resources_per_node", lambda: free)
        wanted = Placement(4, {"CPU": 1.0, "GPU": 1.0}, "PACK", 0.0, labels)
        assert nodes.room_on_nodes(wanted) == {"busy": 3, "full": 0}


def test_the_picture_has_a_line_per_node(listed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    listed += [shaped("0123456789", "a100-8x80"), node("b", labels=TYPED, GPU=8.0), node("c", CPU=32.0)]
    free = {"0123456789": {"CPU": 90.0, "GPU": 3.0}, "c": {"CPU": 32.0}}
    monkeypatch.setattr(nodes, "available_resources_per_node", lambda: free)
    wanted = Placement(4, {"CPU": 2.0, "GPU": 1.0}, "PACK", 0.0)
    assert nodes.picture(wanted).splitlines() == [
        "node      shape      fits  free",
        "01234567  a100-8x80  3     CPU 90 of 96, GPU 3 of 8",
        "b         A100       0     CPU 0 of 0, GPU 0 of 8",
        "c         -          0     CPU 32 of 32, GPU 0 of 0",
    ]
    assert nodes.picture(wanted, {"0123456789": [0, 1, 2], "b": [3]}).splitlines()[:3] == [
        "node      shape      ranks  free",
        "01234567  a100-8x80  0 1 2  CPU 90 of 96, GPU 3 of 8",
        "b         A100       3      CPU 0 of 0, GPU 0 of 8",
    ]
