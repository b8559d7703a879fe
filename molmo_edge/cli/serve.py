"""`molmo-edge serve`"""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import Annotated

import typer

from molmo_edge.cli import options
from molmo_edge.cli.api_key import KEY_VARIABLE, ApiKey, ApiKeyFile, read_api_key
from molmo_edge.cli.open_model import open_molmo
from molmo_edge.cli.output import note

_IMAGE_HOST = (
    "Host from which remote images may be fetched (example.org, or example.org:8443). Repeatable. Default: none."
)
_SERVER_NAME = "Further name in the header Host, for a proxy in front of a server on loopback. Repeatable."
_CORS = "Origin of web pages that may call the server (https://app.example.org). Repeatable. Default: none."


@options.expand_options
def serve(
    *,
    model: options.CachedModelOptions,
    host: Annotated[
        str, typer.Option(help="Address to listen on. 0.0.0.0: all, for other machines, too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free one.")] = 8080,
    api_key: ApiKey = None,
    api_key_file: ApiKeyFile = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="HOST", help=_IMAGE_HOST, show_default=False)] = None,
    server_name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=_SERVER_NAME, show_default=False)
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(metavar="ORIGIN", help=_CORS, show_default=False)] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests at a time; more are answered with 429.")] = 64,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, and remote image, in MB.")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Largest image in megapixels.")] = 50.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take, with its wait.")] = 300.0,
    scene_cache_mb: Annotated[
        float, typer.Option(min=0.0, help="Memory for images and conversations that later questions go on from, in MB.")
    ] = 1000.0,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds that answers have to finish when stopping.")] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log path, status and time of each request to stderr.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, with the APIs of OpenAI and moondream."""
    from molmo_edge.server.run import address_of, listen, serve
    from molmo_edge.server.settings import Settings

    settings = Settings(
        host=host,
        port=port,
        api_key=read_api_key(api_key, api_key_file),
        image_hosts=tuple(allow_host or ()),
        server_names=tuple(server_name or ()),
        cors_origins=tuple(cors_origin or ()),
        max_queue=max_queue,
        max_body=int(max_body_mb * 1e6),
        max_pixels=int(max_megapixels * 1e6),
        timeout=timeout,
        scene_bytes=int(scene_cache_mb * 1e6),
        drain=drain,
        access_log=access_log,
    )
    sock = listen(settings)  # before the model opens, which may take long
    with contextlib.closing(sock), open_molmo(model, quiet=quiet) as molmo:
        url = address_of(sock)
        if not settings.on_loopback and settings.api_key is None:
            note(f"warning: every machine that reaches {url} can use the model; set a key in {KEY_VARIABLE}")
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops on this signal, and then raises it again.
            signal.signal(signal.SIGTERM, lambda _number, _frame: None)
        serve(
            molmo,
            settings,
            sock,
            ready=lambda: note(
                f"{molmo.name or 'molmo'} answers at {url}/ in a browser and at {url}/v1; press Ctrl-C to stop",
                quiet=quiet,
            ),
        )
