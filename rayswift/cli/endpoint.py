"""Commands about an endpoint: served, and who may ask it."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rayswift.cli import promotion
from rayswift.cli.options import Json, print_result
from rayswift.errors import ConfigError

app = typer.Typer()


class ServeCommands(TyperGroup):
    """`rayswift serve FOLDER...` serves; `rayswift serve promote` and its like are about what is served."""

    default = "start"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, with the default command before any that name none."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [self.default, *args])


serve_app = typer.Typer(cls=ServeCommands)
app.add_typer(serve_app, name="serve")
for _command in (promotion.promote, promotion.rollback, promotion.versions):
    serve_app.command()(_command)


@serve_app.command("start")
def serve(
    models: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER...", help="Exports, or one YAML serve spec.")],
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000 by default.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File with the keys clients may send.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm or local; vllm by default, where it is there.")] = None,
    promotable: Annotated[bool, typer.Option("--promotable", help="Allow promotions while it serves.")] = False,
    as_json: Json = False,
) -> None:
    """Serves exports behind an OpenAI-compatible endpoint until Ctrl-C.

    Keys are read from --api-key-file or RAYSWIFT_API_KEY. Without one only this machine can ask. --json prints
    url, models and pid once it answers. With --promotable, `rayswift serve promote EXPORT`, `serve rollback` and
    `serve versions` change which version answers, without losing a request.

    Example: rayswift serve exports/sft-demo --port 8000
    """
    from rayswift.serving.app import run as serve_until_stopped
    from rayswift.serving.spec import parse

    given = {"host": host, "port": port, "api_key_file": api_key_file, "engine": engine,
             "promotable": promotable or None}  # fmt: skip
    spec = parse({**_served(models), **{k: v for k, v in given.items() if v is not None}})
    ready = {"url": spec.url, "models": list(spec.models), "pid": os.getpid()}
    tell = (lambda _: print(json.dumps(ready, indent=1), flush=True)) if as_json else None
    serve_until_stopped(spec, on_ready=tell)


def _served(models: list[str]) -> dict[str, Any]:
    """What is to be served: the settings of a spec file, or folders under their own or a given name."""
    from rayswift.serving.spec import load, name_of

    if len(models) == 1 and "=" not in models[0]:
        return load(models[0]).model_dump(mode="json", exclude_unset=True)
    named: dict[str, str] = {}
    for model in models:
        name, folder = model.split("=", 1) if "=" in model else (name_of(model), model)
        if not name or not folder:
            raise ConfigError("is not NAME=FOLDER", path="models", value=model, fix="write chat=exports/sft-demo")
        if name in named:
            raise ConfigError(f"is named twice: {named[name]} and {folder}", path="models", value=name,
                              fix="give one of them another name: other=FOLDER")  # fmt: skip
        named[name] = folder
    return {"models": named}


keys_app = typer.Typer(help="API keys of an endpoint, in a file that holds none.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
KeyFile = Annotated[str, typer.Argument(metavar="FILE", help="The file; of each key it has the sha256.")]


@keys_app.command("add")
def keys_add(
    file: KeyFile,
    name: Annotated[str, typer.Option(help="What the key is called; each name once.")],
    requests_per_minute: Annotated[int | None, typer.Option(help="Most requests in any 60 s, per replica.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(help="Most requests at a time, per replica.")] = None,
    models: Annotated[str | None, typer.Option(metavar="A,B", help="The only models it may ask.")] = None,
) -> None:
    """Makes a key, prints it this once, and writes its sha256 and limits into FILE. Counts when `serve` starts again.

    Example: rayswift keys add keys.yaml --name alice --requests-per-minute 60 --models sft-demo
    """
    from rayswift.serving import keys

    listed = None if models is None else [model.strip() for model in models.split(",")]
    print(keys.add(file, name, requests_per_minute=requests_per_minute, max_concurrency=max_concurrency, models=listed))
    print(f"note: this is the only time the key of {name} is shown", file=sys.stderr)


@keys_app.command("list")
def keys_list(file: KeyFile, as_json: Json = False) -> None:
    """Shows the keys of FILE by name: when they were made, and their limits.

    Example: rayswift keys list keys.yaml
    """
    from rayswift.serving import keys

    known = keys.read(file)
    plain = [key.model_dump(mode="json", exclude={"sha256"}) for key in known]
    print_result(plain, "\n".join(map(keys.line, known)) or f"{file} holds no key", as_json)


@keys_app.command("revoke")
def keys_revoke(file: KeyFile, name: Annotated[str, typer.Argument(metavar="NAME", help="The key's name.")]) -> None:
    """Takes a key out of FILE. An endpoint that runs refuses it once it is started again.

    Example: rayswift keys revoke keys.yaml alice
    """
    from rayswift.serving import keys

    keys.revoke(file, name)
    print(f"{file}: {name} is revoked from the next start of the endpoint on", file=sys.stderr)
