"""The page at /: static files with headers that restrict what a browser does with them."""

from __future__ import annotations

from pathlib import Path

from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

PAGE = Path(__file__).parent / "page"  # index.html and its files

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # a browser asks whether a newer version has other files
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
# Windows takes types from its registry, where other programs may have changed that of .js.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class PageFiles(StaticFiles):  # type: ignore[misc]
    """The files of the page (ASGI)."""

    def __init__(self) -> None:
        super().__init__(directory=PAGE, html=True)

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file at `path`, with the headers. Raises HTTPException if there is none."""
        if scope["method"] not in ("GET", "HEAD") and path != ".":
            raise HTTPException(404)  # every unknown path leads here: its path is wrong, not its method
        response: Response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        kind = _TYPES.get(Path(path).suffix or ".html")
        if kind is not None and response.status_code == 200:
            response.headers["Content-Type"] = f"{kind}; charset=utf-8"
        return response
