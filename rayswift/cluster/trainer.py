"""Job + Plan -> TorchTrainer: runs the worker function on placed workers and turns failures into our errors."""

from __future__ import annotations

import logging
import time
from typing import Any, cast

from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupContext
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from rayswift.cluster.nodes import picture, room_on_nodes
from rayswift.cluster.session import configure, process_environment
from rayswift.cluster.worker import work
from rayswift.config.job import Job
from rayswift.errors import PlanError, RaySwiftError, WorkerError
from rayswift.parallel.mesh import collective_backend
from rayswift.planning.placement import Placement, num_groups, whole_groups
from rayswift.training.order import WorkOrder
from rayswift.training.run_dir import RunDir

_RAY_FOLDER = "ray"
_NODE_LABEL = "ray.io/node-id"  # every node has it
_LOOK_AGAIN_S = 0.2


def fit(order: WorkOrder) -> None:
    """Train to the end on the connected cluster, restarting from checkpoints after worker failures.

    Raises the worker's own RaySwiftError at once, PlanError when the workers cannot be placed within
    `cluster.scheduling_timeout_s`, and WorkerError when workers died more than `cluster.max_failures` times.
    """
    job, plan = order.job, order.plan
    placement, group, timeout_s = plan.placement, plan.layout.tp, job.cluster.scheduling_timeout_s
    configure(timeout_s)
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = _Trainer(
        work,
        train_loop_config={"order": order},
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu="GPU" in placement.resources_per_worker,
            resources_per_worker=placement.resources_per_worker,
            placement_strategy=placement.strategy,
            # Ray makes a selector per worker of it for each start, which _KeepGroupsWhole may complete.
            label_selector=placement.label_selector if placement.label_selector or group > 1 else None,
        ),
        torch_config=TorchConfig(backend=collective_backend(plan.device)),
        run_config=cast(
            Any,
            RunConfig(
                name=_RAY_FOLDER,
                failure_config=FailureConfig(
                    max_failures=job.cluster.max_failures, controller_failure_limit=job.cluster.max_failures
                ),
                worker_runtime_env={"env_vars": process_environment(placement.resources_per_worker.get("CPU", 1.0))},
                callbacks=cast(Any, _callbacks(placement, group, timeout_s)),
                **_storage(job.run_dir),
            ),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        if _has_timed_out(error):  # with max_failures=0 the controller gives up before a callback hears of it
            raise _not_placed(placement, group, timeout_s) from error
        raise _translate(error, job) from error
    finally:
        RunDir(job.run_dir).remove(_RAY_FOLDER)


def _callbacks(placement: Placement, group: int, timeout_s: float) -> list[Any]:
    """What watches over the run inside Ray's controller."""
    watching = [_StopOnUserError(), _StopWithoutWorkers(placement, group, timeout_s)]
    several = 1 < group < placement.num_workers
    return [*watching, _KeepGroupsWhole(placement, group, timeout_s)] if several else watching


class _Trainer(TorchTrainer):
    """Ray's trainer without the actor that would split datasets: the stream is split by the workers."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


class _StopOnUserError(WorkerGroupCallback):
    """A RaySwiftError in a worker is final: restarting cannot mend the user's data or settings.

    Ray's failure policy retries every worker error and cannot be replaced, but an exception raised here, in the
    controller, ends the run.
    """

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        """Raise the first RaySwiftError that a worker ended with."""
        for error in worker_group_status.errors.values():
            found = find_user_error(error)
            if found is not None:
                raise found


class _KeepGroupsWhole(WorkerGroupCallback):
    """Names the node of each worker where Ray's packing, which counts workers only, would tear groups apart.

    A placement has no node names of its own: they would outlive the nodes. They are chosen at each start, from what is
    free then.
    """

    def __init__(self, placement: Placement, group: int, timeout_s: float) -> None:
        self._placement, self._group, self._timeout_s = placement, group, timeout_s

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        """Complete the selectors of the placement group about to be made. Raises PlanError at the deadline."""
        deadline = time.monotonic() + self._timeout_s
        while (nodes := self._choose()) is None:
            if time.monotonic() > deadline:
                raise _not_placed(self._placement, self._group, self._timeout_s)
            time.sleep(_LOOK_AGAIN_S)
        for selector, node in zip(worker_group_context.label_selector or [], nodes, strict=False):
            selector[_NODE_LABEL] = node

    def _choose(self) -> tuple[str, ...] | None:
        return whole_groups(room_on_nodes(self._placement), self._placement.num_workers, self._group)


class _StopWithoutWorkers(ControllerCallback):
    """Workers that were not placed in time end the run; a node that died while they started is worth another try.

    Ray counts both as failures of its controller and would wait for the whole deadline again each time.
    """

    def __init__(self, placement: Placement, group: int, timeout_s: float) -> None:
        self._placement, self._group, self._timeout_s = placement, group, timeout_s

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Raise PlanError when the controller is about to try again because the deadline has passed."""
        error = getattr(current_state, "training_failed_error", None)
        failure = getattr(error, "controller_failure", None)
        if isinstance(failure, PlanError):
            raise failure
        if _has_timed_out(error):
            raise _not_placed(self._placement, self._group, self._timeout_s)


def _has_timed_out(error: object) -> bool:
    """Whether the controller failed because the workers were not placed in time."""
    return isinstance(getattr(error, "controller_failure", None), WorkerGroupStartupTimeoutError)


def _not_placed(placement: Placement, group: int, timeout_s: float) -> PlanError:
    """The refusal, with what is free on each node."""
    fitting = num_groups(room_on_nodes(placement).values(), group) * group
    need = ", ".join(f"{name} {amount:g}" for name, amount in placement.resources_per_worker.items())
    together = f", {group} on a node" if group > 1 else ""
    return PlanError(
        f"passed with room for {min(fitting, placement.num_workers)} of {placement.num_workers} workers "
        f"(each {need}{together})",
        path="cluster.scheduling_timeout_s",
        value=timeout_s,
        fix=f"lower cluster.workers, free the cluster, or add nodes\n{picture(placement)}",
    )


def find_user_error(error: BaseException | None) -> RaySwiftError | None:
    """The RaySwiftError behind what Ray wrapped, if there is one."""
    seen: set[int] = set()
    pending: list[Any] = [error]
    while pending:
        current = pending.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RaySwiftError):
            return current
        if isinstance(current, BaseException):
            pending += [current.__cause__, current.__context__]
        pending += [getattr(current, name, None) for name in ("cause", "_base_exc", "controller_failure")]
        pending += list(getattr(current, "worker_failures", {}).values())
    return None


def _translate(error: Exception, job: Job) -> RaySwiftError:
    """Our error for Ray's: what to do, in one line."""
    found = find_user_error(error)
    if found is not None:
        return found
    text = str(error).strip()
    last = next((line for line in reversed(text.splitlines()) if line.strip()), type(error).__name__)
    return WorkerError(
        f"training stopped, cluster.max_failures={job.cluster.max_failures} used up: {last.strip()}",
        path="run",
        value=job.run_dir,
        fix="run the same command again to continue from the newest checkpoint; set RAYSWIFT_DEBUG=1 for the traceback",
    )


def _storage(run_dir: str) -> dict[str, Any]:
    """Where Ray Train keeps its own small state: inside the run directory, on the same file system."""
    place = RunDir(run_dir)
    if place.is_local:
        return {"storage_path": place.root}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {"storage_path": place.root, "storage_filesystem": PyFileSystem(FSSpecHandler(place.fs))}
