"""The file of keys that holds none: what is written, who may read it, two writers, and what errors do not show."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rayswift import cli
from rayswift.errors import ConfigError
from rayswift.serving import auth, keys, spec
from rayswift.serving.spec import ServeSpec

_SHA = "ab" * 32
_SECRET = "rsk-a-key-that-nobody-may-see"


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.yaml")


def _write(file: str, text: str, mode: int = 0o600) -> str:
    Path(file).write_text(text)
    os.chmod(file, mode)
    return file


def _spec(file: str, **fields: object) -> ServeSpec:
    return spec.parse({"models": {"a": "x"}, "api_key_file": file, **fields})


def test_the_file_has_the_hash_and_not_the_key(file: str) -> None:
    key = keys.add(file, "alice", requests_per_minute=60, max_concurrency=2, models=["a", "b/c"])
    other = keys.add(file, "bob")
    assert re.fullmatch(r"rsk-[A-Za-z0-9_-]{43}", key)
    text = Path(file).read_text()
    assert key not in text
    assert other not in text
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    alice, bob = keys.read(file)
    assert (alice.name, alice.sha256, alice.models) == ("alice", auth.fingerprint(key), ("a", "b/c"))
    assert (alice.requests_per_minute, alice.max_concurrency) == (60, 2)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", alice.created or "")
    assert (bob.name, bob.is_limited, bob.models) == ("bob", False, None)
    assert alice.sha256 not in repr(alice)


def test_json_is_read_as_well(file: str) -> None:
    _write(file, json.dumps({"rayswift_keys": 1, "keys": [{"name": "alice", "sha256": _SHA}]}))
    assert [key.name for key in keys.read(file)] == ["alice"]
    keys.add(file, "bob")
    assert [key.name for key in keys.read(file)] == ["alice", "bob"]


def test_a_revoked_key_is_refused_once_the_file_is_read_again(file: str) -> None:
    mine, other = keys.add(file, "alice"), keys.add(file, "bob")

    def allowed(key: str) -> bool:
        hashes = [one.sha256 for one in auth.secured(_spec(file), {}).api_keys]
        return auth.is_allowed(f"Bearer {key}", hashes)

    assert allowed(mine)
    keys.revoke(file, "alice")
    assert (allowed(mine), allowed(other)) == (False, True)
    keys.revoke(file, "bob")
    with pytest.raises(ConfigError, match=r"api_key_file=.* holds no key; make one with: rayswift keys add"):
        auth.secured(_spec(file, host="0.0.0.0"), {})
    keys.add(file, "alice")  # a name is free again
    assert not allowed(mine)


def test_replicas_are_given_hashes_and_limits_and_no_key(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = keys.add(file, "alice", requests_per_minute=5)
    made = auth.secured(_spec(file, host="0.0.0.0"), {auth.VARIABLE: "not-used-0123"})
    assert (made.api_key_file, made.api_key_sha256, made.has_keys) == (None, (), True)
    assert [(one.name, one.requests_per_minute) for one in made.api_keys] == [("alice", 5)]
    assert key not in made.model_dump_json()
    assert made.api_keys[0].sha256 not in repr(made)
    assert auth.secured(made, {auth.VARIABLE: "not-used-0123"}) == made  # serve/app.py secures it twice
    assert auth.secured_anywhere(_spec(file), {}).has_keys
    assert spec.parse(made.model_dump(mode="json")) == made
    assert capsys.readouterr().err == ""
    auth.secured(_spec(file, num_replicas=3), {})
    assert "limits hold for each of up to 3 replicas by itself" in capsys.readouterr().err
    auth.secured(_spec(file, max_replicas=5), {})
    assert "up to 5 replicas" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o660])
def test_a_file_that_others_may_touch_is_refused_with_the_chmod_that_mends_it(file: str, mode: int) -> None:
    keys.add(file, "alice")
    before = Path(file).read_text()
    os.chmod(file, mode)
    told = rf"=\S+ may be read or written by others; (chmod go-rwx {re.escape(file)})$"
    with pytest.raises(ConfigError, match=f"api_key_file{told}") as caught:
        auth.secured(_spec(file), {})
    for change in (lambda: keys.add(file, "bob"), lambda: keys.revoke(file, "alice"), lambda: keys.read(file)):
        with pytest.raises(ConfigError, match=f"file{told}"):
            change()
    assert Path(file).read_text() == before
    subprocess.run(str(caught.value).partition("; ")[2], shell=True, check=True)
    assert auth.secured(_spec(file), {}).has_keys


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o444, 0o440])
def test_lines_that_others_may_touch_are_refused_with_the_chmod_that_mends_it(file: str, mode: int) -> None:
    _write(file, _SECRET, mode)
    told = rf"api_key_file={re.escape(file)} holds keys that others may read or write; chmod .*set RAYSWIFT_API_KEY"
    with pytest.raises(ConfigError, match=told) as caught:
        auth.secured(_spec(file), {})
    assert caught.value.exit_code == 2
    assert _SECRET not in str(caught.value)
    subprocess.run(str(caught.value).partition("; ")[2], shell=True, check=True)
    assert auth.secured(_spec(file), {}).api_key_sha256 == (auth.fingerprint(_SECRET),)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_lines_that_only_their_owner_may_read_are_taken_without_a_word(
    file: str, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(file, _SECRET, mode)
    assert auth.secured(_spec(file), {}).has_keys
    assert capsys.readouterr().err == ""


def test_a_mounted_secret_is_judged_by_the_file_its_links_lead_to(tmp_path: Path) -> None:
    """As Kubernetes mounts one: key -> ..data/key, ..data -> ..2026_11_30, and links have mode 0777."""
    (folder := tmp_path / "..2026_11_30").mkdir()
    _write(str(folder / "key"), _SECRET, 0o644)
    (tmp_path / "..data").symlink_to(folder.name)
    (tmp_path / "key").symlink_to("..data/key")
    mounted = str(tmp_path / "key")
    with pytest.raises(ConfigError, match="a mounted secret: defaultMode 0400, or have it set RAYSWIFT_API_KEY"):
        auth.secured(_spec(mounted), {})
    os.chmod(folder / "key", 0o400)
    assert auth.secured(_spec(mounted), {}).has_keys
    assert auth.secured(spec.parse({"models": {"a": "x"}}), {auth.VARIABLE: _SECRET}).has_keys


@pytest.mark.parametrize(
    ("owner", "me", "mode", "is_open"),
    [(0, 1000, 0o440, False), (0, 1000, 0o640, False), (0, 1000, 0o660, True), (0, 1000, 0o444, True),
     (0, 1000, 0o644, True), (0, 0, 0o440, True), (1000, 1000, 0o440, True), (1001, 1000, 0o440, True),
     (1000, 1000, 0o400, False)],
)  # fmt: skip
def test_root_may_lend_a_file_to_a_group(
    monkeypatch: pytest.MonkeyPatch, owner: int, me: int, mode: int, is_open: bool
) -> None:
    monkeypatch.setattr(keys.os, "geteuid", lambda: me)
    status = os.stat_result((mode, 0, 0, 1, owner, 2000, 0, 0, 0, 0))
    assert keys.is_open(status) is is_open


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rayswift_keys: 2\nkeys: []", "key_file.rayswift_keys=2 is not one of 1"),
        ("rayswift_keys: 1", "key_file.keys is missing"),
        (f"rayswift_keys: 1\nkeys: {_SECRET}", "key_file.keys is not a list"),
        (f"rayswift_keys: 1\nkeys: {{alice: {_SECRET}}}", "key_file.keys is not a list"),
        (f"rayswift_keys: 1\nkeys: [{_SECRET}]", "key_file.keys.0 is not a mapping of name, sha256"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SECRET}}}]", "key_file.keys.0.sha256 is not a sha256"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: [{_SECRET}]}}]", "key_file.keys.0.sha256 is not a sha256"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, key: {_SECRET}}}]", "key_file.keys.0.key"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SHA}, requests_per_minute: 0}}]", "=0 is less than 1"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SHA}, models: []}}]", "models"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SHA}}}, {{name: b, sha256: {_SHA}}}]", "as a and as b"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SHA}}}, {{name: a, sha256: {'cd' * 32}}}]", "the name a"),
        (f"rayswift_keys: 1\nkeys: [{{name: a, sha256: {_SHA}", "is not YAML"),
        (f"rayswift_keys:1\n{_SECRET}", "is not"),
    ],
)
def test_a_wrong_file_is_named_and_neither_key_nor_hash_is_shown(file: str, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        auth.secured(_spec(_write(file, text)), {})
    assert told in str(caught.value)
    assert caught.value.exit_code == 2
    assert "that-nobody-may-see" not in str(caught.value)
    assert _SHA[:8] not in str(caught.value)


@pytest.mark.parametrize("given", [_SECRET, [_SECRET], {"a": _SECRET}, [[_SECRET]], 12345678])
def test_a_key_in_place_of_its_hash_is_not_shown(given: object) -> None:
    for field in ("api_key_sha256", "api_keys"):
        with pytest.raises(ConfigError, match=f"serve.{field}") as caught:
            spec.parse({"models": {"a": "x"}, field: given})
        assert "that-nobody-may-see" not in str(caught.value)
        assert "12345678" not in str(caught.value)


def test_a_key_in_place_of_its_file_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="api_key_file is a key and no file of keys; set RAYSWIFT_API_KEY") as caught:
        auth.secured(_spec(_SECRET), {})
    assert _SECRET not in str(caught.value)


def test_lines_of_keys_are_no_file_to_add_to(file: str) -> None:
    _write(file, _SECRET)
    with pytest.raises(ConfigError, match="is not a file of `rayswift keys add`") as caught:
        keys.add(file, "alice")
    assert _SECRET not in str(caught.value)
    assert Path(file).read_text() == _SECRET


def test_a_link_is_followed_and_an_empty_file_filled(tmp_path: Path) -> None:
    target, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    target.touch()
    link.symlink_to(target)
    keys.add(str(link), "alice")
    assert link.is_symlink()
    assert [key.name for key in keys.read(str(target))] == ["alice"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_what_root_edits_stays_its_owners(file: str) -> None:
    keys.add(file, "alice")
    os.chown(file, 12345, 12345)
    keys.add(file, "bob")
    for name in (file, f"{file}.lock"):
        assert (os.stat(name).st_uid, os.stat(name).st_mode & 0o777) == (12345, 0o600)


def test_two_writers_lose_no_key(file: str, root: Path) -> None:
    code = (
        "import sys; from rayswift.serving import keys\n"
        "for number in range(15): keys.add(sys.argv[1], f'{sys.argv[2]}-{number}')"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, file, name], cwd=root) for name in ("a", "b")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    names = [key.name for key in keys.read(file)]
    assert sorted(names) == sorted(f"{who}-{number}" for who in "ab" for number in range(15))
    assert sorted(os.listdir(Path(file).parent)) == ["keys.yaml", "keys.yaml.lock"]  # no temporary file is left


def test_a_held_lock_is_waited_for_with_a_bound(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_LOCK_WAIT_S", 0.05)
    with keys._sole_writer(file), pytest.raises(ConfigError, match="is being written by another process"):
        keys.add(file, "alice")
    keys.add(file, "alice")


def test_a_failed_write_leaves_the_file_as_it_was(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.add(file, "alice")
    before = Path(file).read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        keys.add(file, "bob")
    assert Path(file).read_text() == before
    assert sorted(os.listdir(Path(file).parent)) == ["keys.yaml", "keys.yaml.lock"]


def _call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["keys", *args])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_commands(capsys: pytest.CaptureFixture[str], file: str) -> None:
    code, out, err = _call(capsys, "add", file, "--name", "alice", "--requests-per-minute", "3", "--models", "a, b")
    key = out.strip()
    assert (code, keys.fingerprint(key)) == (0, keys.read(file)[0].sha256)
    assert key not in err
    code, out, _ = _call(capsys, "list", file)
    assert (code, out.split("  ")[0], out.split("  ")[2:]) == (0, "alice", ["3 requests/min", "only a, b\n"])
    code, listed, _ = _call(capsys, "list", file, "--json")
    assert json.loads(listed)[0]["models"] == ["a", "b"]
    for text in (out, listed):
        assert key not in text
        assert keys.fingerprint(key)[:8] not in text
    assert _call(capsys, "revoke", file, "alice")[:2] == (0, "")
    assert _call(capsys, "list", file)[:2] == (0, f"{file} holds no key\n")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["add", "FILE", "--name", "alice"], "key.name=alice is the name of a key in"),
        (["add", "FILE", "--name", "a b"], "key.name=a b does not match"),
        (["add", "FILE", "--name", "b", "--requests-per-minute", "0"], "key.requests_per_minute=0 is less than 1"),
        (["add", "FILE", "--name", "b", "--max-concurrency", "-1"], "key.max_concurrency=-1 is less than 1"),
        (["add", "FILE", "--name", "b", "--models", "a,"], "key.models.1= does not match"),
        (["add", "FILE"], "Missing option '--name'"),
        (["add", "absent/FILE", "--name", "b"], "cannot be written: No such file or directory"),
        (["revoke", "FILE", "alicf"], "did you mean alice?"),
        (["revoke", "FILE", "zoe"], "shows the names"),
        (["revoke", "absent", "zoe"], "file=absent cannot be read"),
        (["list", "absent"], "file=absent cannot be read"),
    ],
)
def test_a_wrong_command_ends_with_code_2(
    capsys: pytest.CaptureFixture[str], file: str, args: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(file).parent)
    keys.add(file, "alice")
    before = Path(file).read_text()
    code, out, err = _call(capsys, *[file if arg == "FILE" else arg for arg in args])
    assert (code, out) == (2, "")
    assert told in err
    assert Path(file).read_text() == before
    assert not Path("absent.lock").exists()


def test_what_is_printed_when_ready_names_no_hash_as_the_key(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayswift.serving.process import ready_text

    key = keys.add(file, "alice")
    monkeypatch.setenv(auth.VARIABLE, "of-something-else")
    text = ready_text(_spec(file))
    assert "export RAYSWIFT_API_KEY=KEY   # a key that `rayswift keys add` has shown" in text
    assert "Authorization: Bearer $RAYSWIFT_API_KEY" in text
    assert key not in text
    assert "grep" not in text
