"""The endpoint inside Ray Serve: builds, deploys, waits until it answers, and takes it down again.

Knows Ray Serve and processes. What is answered is decided in `serving/http.py`, which this only hosts.

One deployment, not an ingress before model deployments: a token then crosses one process boundary on its way to the
client instead of two, the bounded queue counts exactly because it lives where the requests run, and a client that goes
away is noticed in the process that generates for it. An engine that needs a Python environment of its own can still be
an actor behind the engine protocol.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray import serve

from rayswift.cluster.session import is_token_asked, session
from rayswift.errors import ConfigError
from rayswift.models.loading import check_folder
from rayswift.serving import adapter_store, auth, controller, environment, front, process
from rayswift.serving.controller import APP_NAME
from rayswift.serving.http import build_asgi
from rayswift.serving.placement import (
    SURGE_PERCENT,
    actor_options,
    replica_options,
    serve_options,
    surge_percent,
    with_cores,
    with_gpus,
)
from rayswift.serving.served import ServedModel, open_model
from rayswift.serving.spec import ServeSpec


class EndpointReplica:
    """One replica: an engine per model, and the ASGI app over them."""

    async def __init__(self, spec: ServeSpec) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        self._spec, self._models = spec, dict[str, ServedModel]()
        for number, (name, folder) in enumerate(spec.models.items()):
            self._models[name] = await open_model(spec, folder, number)
        gc.freeze()  # a body of many objects would have the collector walk through all of torch

    def __serve_build_asgi_app__(self) -> Any:
        return build_asgi(self._spec, self._models)

    async def __del__(self) -> None:  # Ray Serve awaits it before it ends the replica
        for model in self._models.values():
            await model.engine.close()

    async def check_health(self) -> None:
        """Raises when an engine cannot answer any more; Serve then replaces this replica."""
        for model in self._models.values():
            model.engine.check()


def build_app(spec: ServeSpec) -> serve.Application:
    """The Ray Serve application of a spec whose folders and keys have been checked.

    Only `run` and `serve_in_background` make Serve listen on the spec's host. Whoever deploys it by other means secures
    the spec with `auth.secured_anywhere` first, as `serve/app.py` does.

    Raises ConfigError for a folder that cannot be served, ExportError for an export that has changed since it was
    verified, ServeError for an endpoint that would be open to the network.
    """
    if spec.promotable:
        raise ConfigError(
            "needs several applications, and this is one", path="promotable", value=True,
            fix="use `rayswift serve --promotable`; under Ray Serve's own commands an update is another `serve deploy`",
        )  # fmt: skip
    spec, num_gpus = checked(spec), _num_gpus()
    if spec.gpus_per_replica is None and not num_gpus and not ray.is_initialized():
        print("note: gpus_per_replica=0, as this machine has none; name it for the GPUs of a cluster", file=sys.stderr)
    spec = chosen(spec, num_gpus)
    surge, told = surge_percent(spec, num_gpus)
    if told:
        print(f"note: {told}", file=sys.stderr)
    return application(spec, surge)


def checked(spec: ServeSpec) -> ServeSpec:
    """The spec with keys and folders looked at."""
    return _with_checked_models(auth.secured(spec))


def chosen(spec: ServeSpec, num_gpus: float) -> ServeSpec:
    """The spec with GPUs and engine, of a cluster with so many of the former; what was chosen for the user is told.

    Raises ConfigError for an engine, or a device, that cannot be had.
    """
    spec, told = with_gpus(spec, num_gpus)
    spec, note = environment.resolved(spec)
    for text in (told, note):
        if text:
            print(f"note: {text}", file=sys.stderr)
    return spec


def _num_gpus() -> float:
    """GPUs of the connected cluster, or of this machine: `serve run` connects after it has read the application."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))
    import torch

    return torch.cuda.device_count()


def application(spec: ServeSpec, max_surge_percent: int = SURGE_PERCENT) -> serve.Application:
    """The Ray Serve application of a spec that is `checked`, `chosen` and not promotable."""
    options = {**replica_options(spec), **serve_options(spec, max_surge_percent)}
    deployment: Any = serve.deployment(name="endpoint", **options, ray_actor_options=actor_options(spec))(
        serve.ingress()(EndpointReplica)
    )
    application: serve.Application = deployment.bind(spec)
    return application


class RunningEndpoint:
    """A served spec. `close` takes it down; as a context it does so at the end."""

    def __init__(self, spec: ServeSpec, resources: ExitStack) -> None:
        self.spec, self.url, self._resources = spec, spec.url, resources

    def close(self) -> None:
        """Stop serving, and the Ray cluster too if it was started for this. May be called twice."""
        self._resources.close()

    def __enter__(self) -> RunningEndpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_in_background(spec: ServeSpec, *, address: str | None = None) -> RunningEndpoint:
    """The endpoint once every model has generated its first token, on the caller's Ray connection if there is one.

    Raises ConfigError, ExportError or ServeError; then nothing is left running.
    """
    process.check_port(spec.host, spec.port)
    spec = checked(spec)
    with ExitStack() as resources:
        is_own = resources.enter_context(session(address))
        spec = chosen(spec, _num_gpus())
        if is_own:
            spec = with_cores(spec, ray.cluster_resources()["CPU"])
        else:
            _tell_of_an_open_cluster(spec)
        resources.enter_context(controller.serving(spec))
        if spec.promotable:
            resources.enter_context(front.serving_versions(spec))
        else:
            controller.deploy(APP_NAME, application(spec), route_prefix="/")
            controller.wait_until_answering(spec)
        return RunningEndpoint(spec, resources.pop_all())


def run(
    spec: ServeSpec,
    *,
    address: str | None = None,
    blocking: bool = True,
    on_ready: Callable[[RunningEndpoint], None] | None = None,
) -> RunningEndpoint:
    """Serve until Ctrl-C or SIGTERM; the endpoint, closed again. Not blocking: the running endpoint.

    `on_ready` is told when it answers; without one the URL and two ways to ask are printed. Errors as
    `serve_in_background`.
    """
    endpoint = serve_in_background(spec, address=address)
    try:
        if on_ready is None:
            print(process.ready_text(spec), flush=True)
        else:
            on_ready(endpoint)
        if blocking:
            process.wait_for_stop_signal()
    except BaseException:
        endpoint.close()
        raise
    if blocking:
        with process.told_to_stop():  # a second signal ends the wait for answers, and what is served all the same
            endpoint.close()
    return endpoint


def _tell_of_an_open_cluster(spec: ServeSpec) -> None:
    """Says where a cluster asks nobody for a token, whatever the endpoint's host; one that asks is joined with it."""
    if not is_token_asked():
        where = "" if auth.is_loopback(spec.host) else f"the endpoint listens on {spec.host}, and "
        print(
            f"note: {where}this Ray cluster asks for no token: who reaches its ports (6379, 8265, 10001, those of its "
            "agents) runs code on it, key or not; close them to others, or start Ray with RAY_AUTH_MODE=token",
            file=sys.stderr,
        )


def _with_checked_models(spec: ServeSpec) -> ServeSpec:
    """The spec with absolute folders, each complete and, if it is an export, unchanged since it was verified."""
    models = {}
    for name, folder in spec.models.items():
        check_folder(folder, field=f"models.{name}", read_only=True)
        models[name] = str(Path(folder).resolve()) if os.path.isdir(folder) else folder
        _check_export(name, folder, spec.promotable)
    return spec.model_copy(update={"models": models, "adapters": _checked_roots(spec)})


def _checked_roots(spec: ServeSpec) -> dict[str, str]:
    """The folders of adapters, absolute; URLs as they are. Raises ConfigError for a folder that is not there.

    Adapters that will not answer as they were trained to are told; of those in a storage the replica's log tells.
    """
    roots = {}
    for name, root in spec.adapters.items():
        if "://" not in root and not os.path.isdir(root):
            raise ConfigError("is not a folder", path=f"adapters.{name}", value=root, fix="check the path")
        roots[name] = root if "://" in root else str(Path(root).resolve())
        if "://" not in root and (packed := adapter_store.packed_in_training(root)):
            told = adapter_store.told_of_packed(f"{', '.join(packed)}:", " and ".join(sorted(set(packed.values()))))
            print(f"note: adapters.{name}={root}: {told}", file=sys.stderr)
    return roots


def _check_export(name: str, folder: str, is_promotable: bool) -> None:
    from rayswift.export.manifest import MANIFEST, read_valid

    if (Path(folder) / MANIFEST).is_file():
        read_valid(folder)
    elif is_promotable:
        raise ConfigError(f"has no {MANIFEST}, and only exports have versions", path=f"models.{name}", value=folder,
                          fix="export it, or serve it without promotable")  # fmt: skip
    else:
        print(f"models.{name}={folder} has no {MANIFEST}: it is served as it is, unverified", file=sys.stderr)
