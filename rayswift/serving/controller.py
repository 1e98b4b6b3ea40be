"""Ray Serve's own processes: started for an endpoint, watched while applications come up, and taken down again.

Knows Ray Serve's controller, proxy and replicas by name; knows nothing of what they answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from rayswift.errors import ServeError
from rayswift.serving import process, proxy
from rayswift.serving.spec import ServeSpec

APP_NAME = "rayswift"
"""The application that answers HTTP; names of others that belong to it begin with it."""
_POLL_S, _STOP_TIMEOUT_S, _LAST_WORDS_S, _END_TIMEOUT_S, _IDLE_STOP_S = 0.1, 30.0, 8.0, 3.0, 10.0
"""Who stops containers kills them 10 s after the signal, unless told otherwise."""


@contextmanager
def serving(spec: ServeSpec) -> Iterator[None]:
    """Ray Serve with its proxy on the spec's address for the duration. Raises ServeError when it already runs."""
    if _serve_controller() is not None:
        raise ServeError(
            "Ray Serve already runs on this cluster with an address of its own",
            fix="deploy beside it with `serve run serve.app:app`, or stop it with `serve shutdown`",
        )
    variables = proxy.environment(spec.max_body_bytes + 2 * spec.max_media_bytes)  # media come in base64
    # Serve tells the driver's terminal about its inner life at INFO; warnings still get through.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    has_started = False
    try:
        _start(spec, variables)
        has_started = True
        yield
    finally:
        _stop_serve()
        if has_started:  # else somebody else has the port
            _wait_for_the_port(spec)


def _start(spec: ServeSpec, variables: dict[str, str]) -> None:
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(
                host=spec.host.strip("[]"),
                port=spec.port,
                # Ends what our own deadline cannot: a client that stopped reading.
                request_timeout_s=spec.request_timeout_s + 30,
            ),
            controller_options={"runtime_env": {"env_vars": variables}},
        )
    except (RayError, TimeoutError) as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())[:600]
        raise ServeError(
            f"Ray Serve's proxy could not start: {reason}", path="port", value=spec.port,
            fix="see that nothing else uses the port, or, with HAProxy, its own: 8404 and 9101",
        ) from error  # fmt: skip


def _stop_serve() -> None:
    """Take all of Ray Serve down. A controller that does not end in time is told again by Serve's own shutdown.

    Answers that are being generated have _LAST_WORDS_S to end, with Serve's proxy there to carry them: told to shut
    down, the controller kills that first. Replicas that still live a while after it are killed.
    That one waits on the controller inside a call that dies with it, which Ray reports as a failed task on stdout,
    where a program's answer belongs. So the controller is told without waiting, and watched. (ray 2.60)
    """
    if (controller := _serve_controller()) is not None:
        is_idle = False
        try:
            is_idle = _are_answers_over(_LAST_WORDS_S) or _end_answers()
        finally:  # also where a second Ctrl-C has ended the wait: a controller that was not told outlives us
            with suppress(RayActorError):  # told, and gone before it has said so
                ray.get(controller.graceful_shutdown.remote(wait=False))
        _wait_for_stop(_IDLE_STOP_S if is_idle else _POLL_S)
        if _serve_controller() is not None:
            for replica in _replicas():
                ray.kill(replica)
            _wait_for_stop(_STOP_TIMEOUT_S)
    serve.shutdown()  # also makes this process forget the controller


def _wait_for_the_port(spec: ServeSpec) -> None:
    """Until the proxy's process has left it, a moment after Ray has declared it dead: the next endpoint wants it."""
    deadline = time.monotonic() + _IDLE_STOP_S
    while time.monotonic() < deadline:
        with suppress(ServeError):
            process.check_port(spec.host, spec.port)
            return
        time.sleep(_POLL_S)


def _are_answers_over(timeout_s: float) -> bool:
    """Whether all answers have ended within a time. None is begun from then on: who asks is told to come back."""
    deadline, is_told = time.monotonic() + timeout_s, False
    while time.monotonic() < deadline and _serve_controller() is not None:
        with suppress(RayError, RayServeException, TimeoutError):  # a controller that is started again answers later
            if APP_NAME not in serve.status().applications:
                return True
            if not is_told:
                serve.delete(APP_NAME, _blocking=False)
                is_told = True
        time.sleep(_POLL_S)
    return False


def _end_answers() -> bool:
    """Ends what is still answered, for which the proxy has a last word while it lives; whether that is over."""
    for replica in _replicas(f"{APP_NAME}#"):
        ray.kill(replica)
    return _are_answers_over(_END_TIMEOUT_S)


def _wait_for_stop(timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while _serve_controller() is not None and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _replicas(name: str = APP_NAME) -> list[Any]:
    """The handles of the replicas that live, of applications whose name begins so."""
    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == "serve" and actor["name"].startswith(f"SERVE_REPLICA::{name}"):
            with suppress(ValueError):  # it has ended since
                found.append(ray.get_actor(actor["name"], namespace="serve"))
    return found


def _serve_controller() -> Any:
    """The handle of the cluster's Serve controller, or None where Serve does not run."""
    try:
        return ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None


def deploy(name: str, application: serve.Application, route_prefix: str | None = None) -> None:
    """Have Serve start an application; see `wait_until_running`."""
    target = serve.RunTarget(application, name=name, route_prefix=route_prefix)
    serve.run_many([target], wait_for_applications_running=False)


def wait_until_answering(spec: ServeSpec) -> None:
    """Returns when the endpoint answers over HTTP. Raises ServeError when it failed or took too long."""
    wait_until_running(APP_NAME, spec, lambda: process.answers(spec))


def wait_until_running(
    name: str, spec: ServeSpec, is_ready: Callable[[], bool] = lambda: True, what: str = "the endpoint"
) -> None:
    """Returns when an application runs and is ready. Raises ServeError, in which it is `what`, when it failed or took
    too long."""
    deadline = time.monotonic() + spec.start_timeout_s
    while time.monotonic() < deadline:
        application = serve.status().applications.get(name)
        if application is not None and application.status in (
            ApplicationStatus.DEPLOY_FAILED,
            ApplicationStatus.UNHEALTHY,
        ):
            raise ServeError(f"{what} could not start: {_reason(application)}")
        if application is not None and application.status == ApplicationStatus.RUNNING and is_ready():
            return
        time.sleep(_POLL_S)
    needs = f"{spec.num_replicas} x {spec.cpus:g} CPU, {spec.gpus:g} GPU"
    raise ServeError(
        f"{what} was not ready after {spec.start_timeout_s:g} s",
        fix=f"check that the cluster has {needs} free, or raise start_timeout_s",
    )


def _reason(application: Any) -> str:
    """The last line of what Serve reports, which is the exception a replica ended with."""
    messages = [deployment.message for deployment in application.deployments.values()] + [application.message]
    text = next((message for message in messages if message.strip()), "no reason was given")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines)[-1].removeprefix("rayswift.errors.")
