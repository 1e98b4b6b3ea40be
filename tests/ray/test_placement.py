"""Workers on a Ray cluster of several nodes: a tensor parallel group never crosses one, and a refusal shows why.

The nodes are processes of this machine with CPUs that Ray only counts, and they all share one IP address.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train.v2.api.config import ScalingConfig

from rayswift.cluster import trainer
from rayswift.cluster.preflight import prepare
from rayswift.cluster.session import cluster_spec, configure, worker_python
from rayswift.config.job import Job
from rayswift.errors import PlanError
from rayswift.planning.hardware import find_gpu
from rayswift.planning.layout import Layout
from rayswift.planning.placement import place
from rayswift.planning.planner import Plan, plan
from rayswift.training.order import WorkOrder
from tests.job_cases import CPU_BOX, ENGINES, SMALL_SHAPE
from tests.run_cases import losses, wait_for

pytestmark = pytest.mark.ray

GB = 10**9
SLOTS = {"a": 1, "b": 3, "c": 2, "d": 1}  # CPUs of each node; the head has none, like that of cluster.yaml
NAME, SIZE = "test/name", "test/size"


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_temp_dir: str) -> Iterator[Cluster]:
    """A head and four nodes, which nobody else on this machine finds."""
    configure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.utils.write_ray_address", lambda *_, **__: None)
        patch.setattr("ray._common.utils.reset_ray_address", lambda *_, **__: None)
        made = Cluster(shutdown_at_exit=False)
        try:
            made.add_node(num_cpus=0, temp_dir=ray_temp_dir, include_dashboard=False)
            for name in SLOTS:
                add(made, name)
            ray.init(address=made.address, log_to_driver=False, configure_logging=False, runtime_env=worker_python())
            yield made
        finally:
            ray.shutdown()
            made.shutdown()


def add(cluster: Cluster, name: str) -> None:
    """A node with its labels; `d` also has eight GPUs that are not there."""
    count = SLOTS[name]
    labels = {NAME: name, SIZE: "one" if count == 1 else "many", "rayswift.io/node-shape": "h100-8x80"}
    cluster.add_node(num_cpus=count, num_gpus=8 * (name == "d"), labels=labels)


@pytest.fixture
def names() -> dict[str, str]:
    """The name of each node by its id."""
    return {node["NodeID"]: node["Labels"].get(NAME, "head") for node in ray.nodes() if node["Alive"]}


def make_job(output: Path, **changes: Any) -> Job:
    plain: dict[str, Any] = {
        "name": "placed", "output": str(output), "model": {"path": "none"}, "data": {"train": [{"path": "none"}]},
        "cluster": {"scheduling_timeout_s": 60, "max_failures": 0, "device": "cpu"},
    }  # fmt: skip
    for key, value in changes.items():
        plain[key] = {**plain.get(key, {}), **value}
    return Job.model_validate(plain)


def make_order(job: Job, layout: Layout, **placement: Any) -> WorkOrder:
    """Work for workers of one CPU each, planned without a look at the nodes."""
    parallel = {**dict(layout.axes), "ep": layout.ep}
    asked = job.model_copy(update={"parallel": job.parallel.model_copy(update=parallel)})
    engines = {"fsdp2": replace(ENGINES["fsdp2"], supports=ENGINES["fsdp2"].supports | {"tp", "cp"})}
    made: Plan = plan(asked, SMALL_SHAPE, CPU_BOX, engines=engines)
    assert made.layout == layout
    changes = {"resources_per_worker": {"CPU": 1.0}, **placement}
    return WorkOrder(asked, replace(made, placement=replace(made.placement, **changes)), None, None)  # type: ignore[arg-type]


def run_seats(order: WorkOrder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Where each rank came to sit, from workers that do nothing else."""
    monkeypatch.setattr(trainer, "work", reporting(folder, lambda config: None))
    trainer.fit(order)
    return seats_in(folder)


def seats_in(folder: Path) -> list[dict[str, Any]]:
    """What workers wrote down, in the order of their ranks."""
    return sorted((json.loads(path.read_text()) for path in folder.glob("seat-*.json")), key=lambda seat: seat["rank"])


def reporting(folder: Path, then: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    """A worker function that writes down its seat first. It is sent by value: workers cannot import the tests."""

    def work(config: dict[str, Any]) -> None:
        import ray.train

        from rayswift.cluster.worker import take_seat

        seat, local_rank = take_seat(config["order"].plan, ray.train.get_context().get_world_rank())
        found = {"rank": seat.rank, "place": seat.place, "data_rank": seat.data_rank, "local_rank": local_rank,
                 "node": ray.get_runtime_context().get_node_id(), **seat.coordinate}  # fmt: skip
        draft = folder / f"draft-{seat.rank}"
        draft.write_text(json.dumps(found))
        draft.rename(folder / f"seat-{seat.rank}.json")
        then(config)

    return work


def send_to(nodes: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Send worker after worker to these nodes, whatever RaySwift would have decided."""
    selectors = [{NAME: name} for name in nodes]

    def scaling(**options: Any) -> ScalingConfig:
        return ScalingConfig(**{**options, "label_selector": selectors, "placement_strategy": "PACK"})

    monkeypatch.setattr(trainer, "ScalingConfig", scaling)
    monkeypatch.setattr(trainer, "_KeepGroupsWhole", lambda *_: trainer._StopOnUserError())


def test_the_cluster_is_known_by_the_labels_of_its_nodes(names: dict[str, str]) -> None:
    spec = cluster_spec("cuda")
    assert (spec.num_devices, spec.num_cpus, spec.num_nodes) == (8, 7, 5)
    assert (spec.gpu, spec.device_memory_bytes) == (find_gpu("H100", 80 * GB), 80 * GB), "torch finds no GPU here"
    found = {names[node.id]: (node.num_cpus, node.num_devices, node.shape) for node in spec.nodes}
    expected = {name: (count, 8 * (name == "d"), "h100-8x80") for name, count in SLOTS.items()}
    assert found == {**expected, "head": (0, 0, "")}
    assert place(Layout(tp=8), spec).resources_per_worker == {"CPU": 1 / 16, "GPU": 1.0}
    with pytest.raises(PlanError, match=r"parallel\.tp=4 is more than the 3 workers that one node holds"):
        place(Layout(tp=4, dp_shard=1), replace(cluster_spec("cpu"), num_cpus=8))


@pytest.mark.long
def test_groups_are_kept_whole_where_packing_counts_workers_only_and_after_a_node_is_lost(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = tmp_path / "go"
    monkeypatch.setattr(trainer, "work", reporting(tmp_path, waiting_for(go)))
    order = make_order(make_job(tmp_path, cluster={"max_failures": 3, "device": "cpu"}), Layout(tp=2, dp_shard=2))
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(trainer.fit, order)
        wait_for(lambda: run.done() or len(seats_in(tmp_path)) == 4, "seats")
        first = check_groups(seats_in(tmp_path))
        for path in tmp_path.glob("seat-*.json"):
            path.unlink()
        (lost,) = [node for node in cluster.worker_nodes if node.node_id == first["c"]]
        cluster.remove_node(lost, allow_graceful=False)
        add(cluster, "c")
        go.touch()
        run.result(timeout=180)
    second = check_groups(seats_in(tmp_path))
    assert first["b"] == second["b"]
    assert first["c"] != second["c"]


def waiting_for(file: Path) -> Callable[[dict[str, Any]], None]:
    """Work that lasts until the file is there."""

    def wait(config: dict[str, Any]) -> None:
        deadline = time.monotonic() + 120
        while not file.exists():
            assert time.monotonic() < deadline, f"no {file}"
            time.sleep(0.1)

    return wait


def check_groups(seats: list[dict[str, Any]]) -> dict[str, str]:
    """Name -> id of the nodes, after a look at who sits where."""
    labels = {node["NodeID"]: node["Labels"].get(NAME) for node in ray.nodes()}
    assert [seat["place"] for seat in seats] == [0, 1, 2, 3], "nobody had to change seats"
    assert [seat["data_rank"] for seat in seats] == [0, 0, 1, 1]
    assert [seat["local_rank"] for seat in seats] == [0, 1, 0, 1], "although the nodes share an IP address"
    nodes = [seat["node"] for seat in seats]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert {labels[node] for node in nodes} == {"b", "c"}
    return {str(labels[node]): node for node in nodes}


def test_workers_that_would_tear_a_group_apart_stop_with_a_picture(
    tmp_path: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    send_to("ac", monkeypatch)
    with pytest.raises(PlanError, match=r"^parallel\.tp=2 lets a tensor parallel group cross nodes") as caught:
        run_seats(make_order(make_job(tmp_path), Layout(tp=2)), tmp_path, monkeypatch)
    assert caught.value.exit_code == 3
    lines = {names_of(line, names): line.split()[1:] for line in str(caught.value).splitlines()[2:]}
    assert {name: line[1] for name, line in lines.items()} == {"a": "0", "c": "1", "b": "-", "d": "-", "head": "-"}
    assert lines["a"] == ["h100-8x80", "0", "CPU", "0", "of", "1"]


def names_of(line: str, names: dict[str, str]) -> str:
    (found,) = [name for node, name in names.items() if node.startswith(line.split()[0])]
    return found


@pytest.mark.parametrize(
    ("layout", "found"), [(Layout(tp=2), "0 of 2"), (Layout(tp=2, dp_shard=2), "0 of 4")], ids=["one", "several"]
)
def test_groups_without_a_node_end_the_run_at_the_deadline(
    layout: Layout, found: str, tmp_path: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, cluster={"scheduling_timeout_s": 4, "device": "cpu"})
    order = make_order(job, layout, label_selector={SIZE: "one"})
    began = time.monotonic()
    with pytest.raises(PlanError, match=rf"scheduling_timeout_s=4\.0 passed with room for {found} work") as caught:
        run_seats(order, tmp_path, monkeypatch)
    assert time.monotonic() - began < 60
    lines = {names_of(line, names): line.split()[1:] for line in str(caught.value).splitlines()[2:]}
    assert {name: line[1] for name, line in lines.items()} == {"a": "1", "d": "1", "b": "0", "c": "0", "head": "0"}
    assert lines["b"] == ["h100-8x80", "0", "CPU", "3", "of", "3"]


@pytest.mark.long
def test_a_run_whose_ranks_changed_seats_computes_the_same_losses(
    tmp_path: Path, tiny_model_dir: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"query": f"What is {i}?", "response": "It is " + f"{3 * i} " * (1 + i % 5)} for i in range(80)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = make_job(
        tmp_path,
        model={"path": str(tiny_model_dir)},
        data={"train": [{"path": str(rows)}], "max_length": 32},
        train={"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "lr": 0.05, "optimizer": "sgd",
               "schedule": "constant", "save_every": 3},
        logging={"tensorboard": False},
    )  # fmt: skip
    alone = train(job.model_copy(update={"name": "alone"}), Layout())
    send_to("abbd", monkeypatch)
    monkeypatch.setattr(trainer, "work", reporting(tmp_path, trainer.work))
    moved = train(job, Layout(dp_replicate=2, dp_shard=2))
    seats = sorted(seats_in(tmp_path), key=lambda seat: seat["place"])
    assert [names[seat["node"]] for seat in seats] == list("bbad"), "one sharded copy of the model lies on one node"
    assert [seat["rank"] for seat in seats] == [1, 2, 0, 3]
    assert [seat["data_rank"] for seat in seats] == [0, 1, 2, 3]
    assert [seat["local_rank"] for seat in seats] == [0, 1, 0, 0]
    assert len(moved) == 3
    assert moved == pytest.approx(alone, abs=1e-5)


def train(job: Job, layout: Layout) -> list[float]:
    """The losses of a run with this layout, workers taking half a CPU so that the other half prepares rows."""
    prepared = prepare(job)
    order = make_order(prepared.job, layout, resources_per_worker={"CPU": 0.5})
    trainer.fit(replace(order, train_stream=prepared.train_stream))
    return losses(job.run_dir)
