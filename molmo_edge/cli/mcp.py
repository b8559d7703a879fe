"""`molmo-edge mcp`"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.api_key import KEY_VARIABLE, ApiKey, ApiKeyFile, read_api_key
from molmo_edge.cli.open_model import find_model, open_molmo
from molmo_edge.cli.output import note

_ROOT = "Folder whose images the tools may read, with its subfolders. Repeatable. Default: the current folder."
_SCREEN = "Whether the tools may take screenshots. Default: yes over stdio, no over HTTP."


@options.expand_options
def mcp(
    *,
    model: options.ModelOptions,
    root: Annotated[list[Path] | None, typer.Option(metavar="DIR", help=_ROOT, show_default=False)] = None,
    screen: Annotated[bool | None, typer.Option("--screen/--no-screen", help=_SCREEN, show_default=False)] = None,
    http: Annotated[bool, typer.Option("--http", help="Serve over streamable HTTP instead of stdio.")] = False,
    host: Annotated[str, typer.Option(help="With --http: address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --http: port to listen on. 0: any.")] = 8090,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take, with its wait.")] = 300.0,
    quiet: options.Quiet = False,
) -> None:
    """Offer tools to agents over the Model Context Protocol: point, count, ask and caption."""
    from molmo_edge.server.mcp.run import PATH, serve_http, serve_stdio
    from molmo_edge.server.mcp.sources import Sources
    from molmo_edge.server.mcp.tools import Asker
    from molmo_edge.server.run import address_of, listen
    from molmo_edge.server.settings import Settings

    roots = root or [Path.cwd()]
    for folder in roots:
        if not folder.is_dir():
            raise typer.BadParameter(f"--root {folder} is not a folder")
    sources = Sources(tuple(roots), screen=not http if screen is None else screen)
    # Over stdio, a question about a download would go to the client, which cannot answer it.
    model = model if http else dataclasses.replace(model, yes=True)
    asker = Asker(lambda: open_molmo(model, quiet=quiet or http), sources, timeout=timeout)
    if not http:
        serve_stdio(asker)
        return
    find_model(model.model, revision=model.revision, quiet=quiet, ask=not model.yes)
    settings = Settings(host=host, port=port, api_key=read_api_key(api_key, api_key_file), drain=5.0)
    with contextlib.closing(listen(settings)) as sock:
        url = address_of(sock)
        if not settings.on_loopback and settings.api_key is None:
            note(f"warning: every machine that reaches {url} can use the tools; set a key in {KEY_VARIABLE}")
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops on this signal, and then raises it again.
            signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        ready = f"the tools are at {url}{PATH}; press Ctrl-C to stop"
        serve_http(asker, settings, sock, ready=lambda: note(ready, quiet=quiet))
