"""How Ray Serve is taken down: answers may end, and a controller is told whatever becomes of the wait for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rayswift.serving import controller
from rayswift.serving.controller import APP_NAME


class _Serve:
    """Serve with one application, which is gone so many looks after it was deleted. It fails at some looks."""

    def __init__(self, num_looks: int, fails_at: tuple[int, ...] = ()) -> None:
        self.left, self.fails_at, self.num_looks = num_looks, fails_at, 0
        self.told: list[str] = []

    def status(self) -> Any:
        self.num_looks += 1
        if self.num_looks in self.fails_at:
            raise RayActorError
        self.left -= "delete" in self.told
        return SimpleNamespace(applications={APP_NAME: None} if self.left >= 0 else {})

    def delete(self, name: str, *, _blocking: bool) -> None:
        assert (name, _blocking) == (APP_NAME, False)
        self.told.append("delete")


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A controller that lives until it is told; what it was told."""
    told: list[str] = []
    graceful = SimpleNamespace(remote=lambda wait: told.append(f"wait={wait}"))
    actor = SimpleNamespace(graceful_shutdown=graceful)
    monkeypatch.setattr(controller, "_serve_controller", lambda: None if told else actor)
    monkeypatch.setattr("ray.get", lambda found: found)
    monkeypatch.setattr("ray.serve.shutdown", lambda: None)
    monkeypatch.setattr(controller, "_POLL_S", 0.001)
    return told


@pytest.mark.parametrize("fails_at", [(), (1, 3)], ids=["well", "started again"])
def test_answers_are_waited_for_once_their_application_is_taken_down(
    monkeypatch: pytest.MonkeyPatch, fails_at: tuple[int, ...]
) -> None:
    monkeypatch.setattr(controller, "serve", fake := _Serve(5, fails_at))
    assert controller._are_answers_over(60)
    assert fake.told == ["delete"]
    assert fake.num_looks == 7 + len(fails_at)


def test_answers_that_take_longer_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "serve", _Serve(10**9))
    assert not controller._are_answers_over(0.01)


def test_a_controller_is_told_though_nobody_waits_for_answers_any_more(
    monkeypatch: pytest.MonkeyPatch, there: list[str]
) -> None:
    def interrupted(_: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(controller, "_are_answers_over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        controller._stop_serve()
    assert there == ["wait=False"]
