"""A job from a YAML or Python file plus dotted overrides, with the origin of every value.

Knows files and the command line's `key=value`. What a method's options mean is asked of the method's own
Config. Relative paths inside a job (`data.*.path`, `model.path`, `output`) are taken from the current directory.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rayswift import plugins
from rayswift.config import keys, problems, spellings, yamlfile
from rayswift.config.job import Job
from rayswift.errors import ConfigError, RaySwiftError


@dataclass(frozen=True)
class LoadedJob:
    """A valid job and where each of its values was written.

    `origins` maps every dotted leaf of the job to `FILE line N`, `FILE`, `command line` or `default`; `notes` tell
    which keys were written in an old spelling.
    """

    job: Job
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def value(self, path: str) -> Any:
        """The plain value at a dotted leaf."""
        here: Any = self.job.model_dump(mode="json")
        for part in path.split("."):
            here = here[int(part)] if isinstance(here, list) else here[part]
        return here


def load_job(file: str, overrides: Sequence[str] = (), *, method: str | None = None) -> LoadedJob:
    """The job in `file` with `overrides` (`train.lr=2e-5`) applied. Raises ConfigError listing every problem.

    `method` is what a script such as jobs/sft.py insists on: it fills in a job that names no method and refuses
    a job that names another one.
    """
    raw, written = _read(file)
    old = _take_over(raw, written)
    typed = spellings.settings(map(_split, overrides))
    for one in typed:
        _assign(raw, one.key, one.value)
        origin = "command line" + (f", as {one.spelled}" if spellings.is_old(one.spelled) else "")
        written = {k: v for k, v in written.items() if not k.startswith(f"{one.key}.")} | {one.key: origin}
    if method is not None:
        _insist(raw, method)
    job = validate(raw, written, source=file)
    return LoadedJob(job, _origins(job, written), spellings.notes((*old, *typed)))


def validate(raw: Mapping[str, Any], written: Mapping[str, str] | None = None, *, source: str = "the job") -> Job:
    """The job that plain data describes, its method's options checked too. Raises ConfigError."""
    written, found = written or {}, []
    job: Job | None = None
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        found += problems.explain(error, written)
    method = raw.get("method")
    if isinstance(method, Mapping) and isinstance(method.get("name", "sft"), str):
        found += _method_problems(method, written)
    if job is None or found:
        raise problems.together(found, source)
    return job


def dump_job(job: Job) -> str:
    """The job as YAML with every default spelled out; `load_job` reads the same job from it."""
    return yamlfile.dump(job.model_dump(mode="json"))


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file, with the options of every method this installation has."""
    schema = Job.model_json_schema()
    options = {name: plugins.load("methods", name).Config.model_json_schema() for name in plugins.names("methods")}
    method = schema["$defs"]["MethodSpec"]
    method["properties"]["name"]["enum"] = sorted(options)
    method["properties"] |= {k: v for config in options.values() for k, v in config.get("properties", {}).items()}
    method["additionalProperties"] = False
    for config in options.values():
        schema["$defs"] |= config.get("$defs", {})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _take_over(raw: dict[str, Any], written: dict[str, str]) -> list[spellings.Setting]:
    """The old spellings at the top of a job file, which they are moved away from to the keys that they stand for."""
    top = {key: raw.pop(key) for key in list(raw) if spellings.is_old(key)}
    found = spellings.settings(top.items())
    for one in found:
        section, _, field = one.key.partition(".")
        there = raw.get(section)
        if isinstance(there, dict) and there.get(field, one.value) != one.value:
            raise spellings.two_values(one, spellings.Setting(one.key, there[field], one.key, there[field]))
        _assign(raw, one.key, one.value)
        written[one.key] = f"{written[one.spelled]}, as {one.spelled}"
    return found


def _read(file: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The plain data of a job file and the origin of each key that is written there."""
    path = Path(file)
    if not path.exists():
        raise ConfigError("does not exist", path="job", value=file, fix=_closest(path))
    if path.is_dir():
        raise ConfigError("is a folder", path="job", value=file, fix="name the YAML or Python file in it")
    if path.suffix == ".py":
        raw = _run(path)
        return raw, dict.fromkeys(_leaves(raw), file)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 text at byte {error.start}", path="job", value=file) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path="job", value=file) from error
    raw, lines = yamlfile.parse(text, file)
    if raw is None:
        raise ConfigError("is empty", path="job", value=file, fix="see the ten-line job in README.md")
    if not isinstance(raw, dict):
        raise ConfigError(f"holds a {type(raw).__name__}, not keys and values", path="job", value=file,
                          fix="start it with name:, model: and data:")  # fmt: skip
    return {str(k): v for k, v in raw.items()}, {key: f"{file} line {line}" for key, line in lines.items()}


def _closest(path: Path) -> str:
    """A file with a similar name in the same folder, or the job files there are."""
    folder = path.parent if path.parent.is_dir() else Path()
    jobs = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml", ".py"))
    close = difflib.get_close_matches(path.name, jobs, n=1)
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"the job files in {folder.resolve()} are {', '.join(jobs[:8])}" if jobs else "check the path"


def _run(path: Path) -> dict[str, Any]:
    """What a Python job file defines as `job`: a Job, a dict, or a function that returns one of them."""
    sys.path.insert(0, str(path.parent))
    try:
        job = runpy.run_path(str(path)).get("job")
        job = job() if callable(job) else job
    except RaySwiftError:
        raise
    except ValidationError as error:
        raise problems.together(problems.explain(error, {}), str(path)) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"fails with {type(error).__name__}: {error}{_line_of(error, path)}", path="job",
                          value=str(path)) from error  # fmt: skip
    finally:
        sys.path.remove(str(path.parent))
    if isinstance(job, Job):
        return job.model_dump(mode="json", exclude_unset=True)
    if isinstance(job, dict):
        return {str(key): _plain(value) for key, value in job.items()}
    raise ConfigError("defines no job", path="job", value=str(path), fix="write job = Job(...), a dict, or def job():")


def _plain(value: Any) -> Any:
    """Plain data for what a Python job may build from model classes."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, dict):
        return {str(key): _plain(below) for key, below in value.items()}
    return [_plain(below) for below in value] if isinstance(value, list | tuple) else value


def _line_of(error: BaseException, path: Path) -> str:
    """` in line 12` for the last line of the file that the error passed through."""
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}"
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def _split(text: str) -> tuple[str, Any]:
    """`train.lr=2e-5` as key and value. A value for a text field is what was typed, whatever it means to YAML."""
    key, equals, typed = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError("is not KEY=VALUE", path="override", value=text, fix="write it like train.lr=2e-5")
    key, value = key.strip().lstrip("-"), yamlfile.value(typed)
    field = keys.field_at(tuple(key.split(".")))
    if field is not None and field.annotation in (str, str | None) and typed.strip() != "null":
        value = typed
    return key, value


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in plain data; sections and the next entry of a list are made on the way."""
    here: Any = raw
    parts = key.split(".")
    for depth, part in enumerate(parts):
        slot: Any = part
        if isinstance(here, list):
            slot = _index(here, part, ".".join(parts[:depth]))
        elif not isinstance(here, dict):
            raise ConfigError("is not a section", path=".".join(parts[:depth]), value=here,
                              fix=f"{key} cannot be set inside it")  # fmt: skip
        if depth == len(parts) - 1:
            here[slot] = value
            return
        below = here[slot] if isinstance(here, list) else here.get(slot)
        if below is None:
            below = [] if keys.is_index(parts[depth + 1]) else {}
        here[slot] = here = below.copy() if isinstance(below, dict | list) else below


def _index(entries: Any, part: str, path: str) -> int:
    """The index that `part` spells, the list grown by one entry when it is the next one."""
    if not keys.is_index(part):
        raise ConfigError(
            f"is a list of {len(entries)}, so it has no {part}", path=path, fix=f"write {path}.0.{part}=..."
        )
    if int(part) > len(entries):
        raise ConfigError(f"has {len(entries)} entries", path=path, fix=f"the next one is {path}.{len(entries)}")
    if int(part) == len(entries):
        entries.append(None)
    return int(part)


def _insist(raw: dict[str, Any], name: str) -> None:
    method = raw.setdefault("method", {"name": name})
    if isinstance(method, dict) and method.setdefault("name", name) != name:
        raise ConfigError(f"is not the method of this script, {name}", path="method.name", value=method["name"],
                          fix="run it with rayswift train, or with the script of that method")  # fmt: skip


def _method_problems(method: Mapping[str, Any], written: Mapping[str, str]) -> list[ConfigError]:
    """What is wrong with the options of the method, by that method's own Config."""
    try:
        config: type[BaseModel] = plugins.load("methods", method.get("name", "sft"), path="method.name").Config
        config.model_validate({k: v for k, v in method.items() if k != "name"})
    except ConfigError as error:
        return [error]
    except ValidationError as error:
        return problems.explain(error, written, model=config, root="method.")
    return []


def _leaves(value: Any, prefix: str = "") -> list[str]:
    """The dotted keys of everything in plain data that is neither a mapping nor a list of mappings."""
    if isinstance(value, dict) and value:
        return [leaf for key, below in value.items() for leaf in _leaves(below, f"{prefix}{key}.")]
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [leaf for i, below in enumerate(value) for leaf in _leaves(below, f"{prefix}{i}.")]
    return [prefix.rstrip(".")]


def _origins(job: Job, written: Mapping[str, str]) -> dict[str, str]:
    """The origin of every leaf: its own, or that of the closest key above it that was written as a whole."""
    origins = {}
    for leaf in _leaves(job.model_dump(mode="json")):
        path, unset = leaf, _unset(job, leaf)
        while path and path not in written:
            path = path.rpartition(".")[0]
        origins[leaf] = "default" if unset or not path else written[path]
    return origins


def _unset(job: Job, leaf: str) -> bool:
    """Whether a leaf holds its default because nobody wrote it."""
    here: Any = job
    for part in leaf.split("."):
        if isinstance(here, BaseModel):
            if part not in here.model_fields_set:
                return True
            here = getattr(here, part)
        elif isinstance(here, tuple):
            here = here[int(part)]
        else:
            return False
    return False
