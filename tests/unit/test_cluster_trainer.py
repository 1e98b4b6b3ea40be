"""What Ray wraps is unwrapped to the user's error, and what the user set in the environment stays. No cluster here."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from rayswift.cluster import session, trainer
from rayswift.cluster.trainer import find_user_error
from rayswift.errors import CheckpointError, ConfigError, DataError, PlanError, WorkerError
from rayswift.parallel.mesh import collective_backend
from rayswift.planning.placement import Placement
from tests.job_cases import make_job

MINE = DataError("3 of 9 rows are bad", path="data.max_bad_fraction", value=0.01)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it looks after being raised from its cause."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def in_context(error: BaseException, context: BaseException) -> BaseException:
    try:
        try:
            raise context
        except BaseException:
            raise error  # noqa: B904 - the implicit context is what is tested
    except BaseException as caught:
        return caught


class Holder(Exception):
    """As Ray's errors do, keeps the original in an attribute."""

    def __init__(self, **attributes: object) -> None:
        super().__init__("wrapped")
        self.__dict__.update(attributes)


def cycle() -> BaseException:
    one, two = Holder(), Holder()
    one.__cause__, two.__cause__ = two, one
    return one


@pytest.mark.parametrize(
    "error",
    [
        MINE,
        raised(RuntimeError("x"), raised(ValueError("y"), MINE)),
        in_context(RuntimeError("x"), MINE),
        WorkerGroupError("workers failed", {0: RuntimeError("other"), 1: raised(RuntimeError("x"), MINE)}),
        raised(RuntimeError("controller"), WorkerGroupError("workers failed", {1: MINE})),
        Holder(cause=Holder(_base_exc=MINE)),
        Holder(controller_failure=raised(RuntimeError("x"), MINE)),
    ],
    ids=["itself", "cause of cause", "context", "worker", "workers behind a cause", "attributes", "controller"],
)
def test_the_users_error_is_found_behind_what_ray_wrapped(error: BaseException) -> None:
    assert find_user_error(error) is MINE


@pytest.mark.parametrize("error", [None, RuntimeError("x"), cycle(), WorkerGroupError("w", {0: OSError("gone")})])
def test_other_errors_are_not_the_users(error: BaseException | None) -> None:
    assert find_user_error(error) is None


def test_a_users_error_in_a_worker_ends_the_run_at_once() -> None:
    status = mock.Mock(errors={0: RuntimeError("other"), 1: raised(RuntimeError("x"), MINE)})
    with pytest.raises(DataError) as caught:
        trainer._StopOnUserError().after_worker_group_poll_status(status)
    assert caught.value is MINE
    trainer._StopOnUserError().after_worker_group_poll_status(mock.Mock(errors={0: RuntimeError("node lost")}))


class Failed(TrainingFailedError):
    """Ray's error with a text of our choice."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)

    def __str__(self) -> str:
        return str(self.args[0])


def test_dead_workers_become_one_line_that_says_how_to_go_on() -> None:
    found = trainer._translate(Failed("Traceback ...\n  File x\nOSError: node lost\n"), make_job())
    assert type(found) is WorkerError
    assert str(found).startswith(
        "run=runs/demo training stopped, cluster.max_failures=3 used up: OSError: node lost; run"
    )
    assert "\n" not in str(found)


def state_after(failure: Exception) -> mock.Mock:
    """The controller's state when it is about to try again."""
    return mock.Mock(training_failed_error=ControllerError(failure))


TWO_WORKERS = Placement(2, {"CPU": 1.0}, "PACK", 0.0)


def test_workers_that_were_not_placed_in_time_end_the_run_with_a_plan_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "room_on_nodes", lambda _: {"a": 1, "b": 0})
    monkeypatch.setattr(trainer, "picture", lambda _: "node  free")
    callback = trainer._StopWithoutWorkers(TWO_WORKERS, 1, 5.0)
    with pytest.raises(PlanError) as caught:
        callback.after_controller_state_update(mock.Mock(), state_after(WorkerGroupStartupTimeoutError(2)))
    assert str(caught.value) == (
        "cluster.scheduling_timeout_s=5.0 passed with room for 1 of 2 workers (each CPU 1); "
        "lower cluster.workers, free the cluster, or add nodes\nnode  free"
    )


def test_a_node_that_dies_while_workers_start_is_survived() -> None:
    callback = trainer._StopWithoutWorkers(TWO_WORKERS, 1, 5.0)
    failure = WorkerGroupStartupFailedError("a node died")
    callback.after_controller_state_update(mock.Mock(), state_after(failure))
    callback.after_controller_state_update(mock.Mock(), mock.Mock(training_failed_error=None))
    policy = DefaultFailurePolicy(FailureConfig(max_failures=1, controller_failure_limit=1))
    decisions = [policy.make_decision(ControllerError(failure)) for _ in range(2)]
    assert decisions == [FailureDecision.RETRY, FailureDecision.RAISE]


FOUR_WORKERS = Placement(4, {"CPU": 1.0}, "PACK", 0.0)


def started(room: Iterator[dict[str, int]], monkeypatch: pytest.MonkeyPatch, timeout_s: float = 60) -> list[Any]:
    """The selectors of four workers in groups of two, as they are when Ray makes their placement group."""
    monkeypatch.setattr(trainer, "room_on_nodes", lambda _: next(room))
    monkeypatch.setattr(trainer, "picture", lambda _: "node  free")
    monkeypatch.setattr(trainer, "_LOOK_AGAIN_S", 0)
    selectors: list[dict[str, str]] = [{"pool": "x"} for _ in range(4)]
    callback = trainer._KeepGroupsWhole(FOUR_WORKERS, 2, timeout_s)
    callback.before_worker_group_start(mock.Mock(label_selector=selectors))
    return selectors


def test_workers_are_sent_to_nodes_where_packing_would_tear_groups_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    selectors = started(iter([{"a": 3, "b": 3}]), monkeypatch)
    assert selectors == [{"pool": "x", "ray.io/node-id": node} for node in "aabb"]
    assert started(iter([{"a": 2, "b": 2}]), monkeypatch) == [{"pool": "x"}] * 4, "packing is right by itself"


def test_workers_that_are_just_being_stopped_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = iter([{"a": 1, "b": 1}, {"a": 1, "b": 3}, {"a": 3, "b": 3}])
    assert [selector["ray.io/node-id"] for selector in started(rooms, monkeypatch)] == ["a", "a", "b", "b"]


def test_groups_that_find_no_node_end_the_run_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match=r"room for 2 of 4 workers \(each CPU 1, 2 on a node\)") as caught:
        started(itertools.repeat({"a": 3, "b": 1}), monkeypatch, timeout_s=0)
    with pytest.raises(PlanError) as final:
        trainer._StopWithoutWorkers(FOUR_WORKERS, 2, 0).after_controller_state_update(
            mock.Mock(), state_after(caught.value)
        )
    assert final.value is caught.value


def test_only_several_groups_of_several_workers_are_watched_over() -> None:
    kinds = [len(trainer._callbacks(FOUR_WORKERS, group, 1)) for group in (1, 2, 4)]
    assert kinds == [2, 3, 2]


def test_the_users_error_wins_over_rays() -> None:
    error = Failed("WorkerGroupStartupFailed")
    error.__cause__ = CheckpointError("is broken", path="runs/demo")
    assert trainer._translate(error, make_job()) is error.__cause__


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl"), ("npu", "cpu:gloo,npu:hccl"), ("mps", "gloo")],
)
def test_the_host_always_has_gloo(device: str, backend: str) -> None:
    assert collective_backend(device) == backend


@pytest.mark.parametrize("by_user", [True, False])
def test_configure_sets_what_the_user_has_not_set(by_user: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    monkeypatch.setattr(session, "_SET_BY_USER", frozenset({name} if by_user else ()))
    with mock.patch.dict(os.environ, {name: "7"}, clear=True):
        session.configure(42.0)
        assert (os.environ[name] == "7") == by_user
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "42"
        assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        session.configure(43.0)  # the next job of this process asks for another deadline
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "43"


@pytest.mark.parametrize(("cpus", "threads"), [(0.25, "1"), (1.0, "1"), (6.0, "6")])
def test_workers_get_threads_for_their_share_of_the_cores(cpus: float, threads: str) -> None:
    assert session.process_environment(cpus)["OMP_NUM_THREADS"] == threads


def test_a_missing_place_for_rays_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_TMPDIR", "/tmp/absent")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"RAYSWIFT_TMPDIR=.*absent has no room .*No such file"), session.session():
        pass


@pytest.mark.parametrize(("error", "kept"), [(PlanError("x"), False), (KeyboardInterrupt(), False), (OSError(), True),
                                             (WorkerError("x"), True)])  # fmt: skip
def test_rays_logs_are_kept_when_the_error_does_not_explain_itself(
    error: BaseException,
    kept: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="p") as place:
        monkeypatch.setenv("RAYSWIFT_TMPDIR", place)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(session.ray, "init", lambda **_: None)
        with pytest.raises(type(error)), session.session():
            raise error
        assert bool(os.listdir(place)) == kept
    assert ("logs of this session are kept in" in capsys.readouterr().err) == kept


def test_an_address_where_nothing_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.socket() as held:  # bound and not listening: nobody else takes the port, and it refuses
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            refusal = rf"cluster\.address={given} cannot be reached: .*refused"
            with pytest.raises(PlanError, match=refusal), session.session(given):
                pass


def test_an_address_without_a_port_is_rays_to_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(session.ray, "init", lambda **options: asked.append(options["address"]))
    with session.session("auto"):
        assert asked == ["auto"]
