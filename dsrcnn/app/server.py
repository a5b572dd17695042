"""The server of ``dsrcnn app``: this machine only, uploads limited and deleted at the end."""

import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from urllib.parse import urlsplit

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine.interrupt import handled_by
from ..errors import ConfigError

HOST = "127.0.0.1"  # a page that takes files is for this machine only
_PORTS = range(7860, 7960)
_LOCAL = (HOST, "localhost", "::1")


class LocalOnly:
    """Refuse requests of other pages, and of names that only resolve to this machine."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", [])}
        names = [f"//{headers.get(b'host', '')}", headers.get(b"origin", f"//{HOST}")]
        if scope["type"] == "lifespan" or all(_host(name) in _LOCAL for name in names):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            refusal = PlainTextResponse("This page is for this machine only.", status_code=403)
            await refusal(scope, receive, send)


def _host(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


@contextmanager
def serving(build: Callable[[], gr.Blocks], *, port: int | None, limit: int) -> Iterator[str]:
    """Serve a page on this machine; its address is given to the block.

    Uploads and pictures are in a folder that is deleted at the end.

    Args:
        build: builds the page.
        port: None for the first free one from 7860.
        limit: of an uploaded file, in megabytes.

    Raises:
        ConfigError: if the port is not free.
    """
    port = _free_port(port)
    # Gradio asks the page whether it is up, which must not go through a proxy.
    no_proxy = ",".join(filter(None, [os.environ.get("no_proxy"), HOST, "localhost"]))
    variables = {"NO_PROXY": no_proxy, "no_proxy": no_proxy}
    with tempfile.TemporaryDirectory(prefix="dsrcnn_app_") as folder:
        variables["GRADIO_TEMP_DIR"] = folder
        with _environment(variables):
            page = build()
            page.launch(
                server_name=HOST,
                server_port=port,
                max_file_size=limit * 1024**2,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                show_error=True,
                footer_links=[],
                app_kwargs={"middleware": [Middleware(LocalOnly)]},
                theme=gr.themes.Base(font="sans-serif", font_mono="monospace"),
            )
            try:
                yield f"http://{HOST}:{port}"
            finally:
                page.close(verbose=False)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables in a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port(port: int | None) -> int:
    for candidate in [port] if port else _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, candidate))
            except (OSError, OverflowError):  # taken, forbidden; no port number
                continue
            return candidate
    tried = f"Port {port} is" if port else f"Ports {_PORTS[0]} to {_PORTS[-1]} are"
    raise ConfigError(f"{tried} not free; write another number after --port, 1024 to 65535.")


@contextmanager
def end_signals() -> Iterator[threading.Event]:
    """Set an event at Ctrl-C, SIGTERM or SIGHUP, instead of ending the process."""
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        if not ended.is_set():
            os.write(1, b"Stopping ...\n")
        ended.set()

    with handled_by(end, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
        yield ended
