"""Errors as responses, in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from molmo_edge.errors import EngineError, MolmoEdgeError, first_line
from molmo_edge.system.log import logger


class ApiError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """`status`: of HTTP. `param`: the part of the request at fault. `retry_after`: seconds."""
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        name = kind.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": name, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response of HTTP."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class ErrorDetails(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorDetails


# The statuses that every POST endpoint may have, for the OpenAPI document.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is invalid."},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong."},
    403: {"model": ErrorBody, "description": "The header Host names another server."},
    408: {"model": ErrorBody, "description": "The request did not arrive in time."},
    413: {"model": ErrorBody, "description": "The request is too large."},
    415: {"model": ErrorBody, "description": "The request is not JSON."},
    429: {"model": ErrorBody, "description": "The queue is full: try again after Retry-After seconds."},
    500: {"model": ErrorBody, "description": "The model failed."},
    503: {"model": ErrorBody, "description": "The server is stopping."},
    504: {"model": ErrorBody, "description": "The answer took longer than the server allows."},
    "4XX": {"model": ErrorBody, "description": "Any other error of the client."},  # instead of FastAPI's 422
}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the client."""
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: Exception) -> ApiError:
    """The response to an error of the library. Others are logged, and answered without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MolmoEdgeError) and not isinstance(error, EngineError):
        return bad_request(first_line(error))
    logger.error("a request failed: %s", first_line(error), exc_info=error)
    return ApiError(500, "the model failed on this request: the server's log has the details", code="internal_error")


async def answer_api_error(_request: Request, error: Exception) -> JSONResponse:
    """For ApiError."""
    return as_api_error(error).response()


async def answer_invalid_body(_request: Request, error: Exception) -> JSONResponse:
    """For a body that does not match its schema. Values of the request are not repeated."""
    assert isinstance(error, RequestValidationError)
    # Where several kinds of value are allowed, each kind has its error: that of the deepest place tells most.
    found = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    if found["type"] == "json_invalid":
        return bad_request(f"the request is not valid JSON: {found['ctx']['error']}").response()
    name = ".".join(_path(error.body, found["loc"][1:], missing=found["type"] == "missing")) or None
    message = str(found["msg"]).encode("ascii", "replace").decode()[:300]
    return bad_request(f"{name}: {message}" if name else message, name).response()


def _path(body: Any, loc: Sequence[str | int], *, missing: bool) -> Iterator[str]:
    """The parts of `loc` that are in the request. Pydantic adds the names of the kinds that it tried."""
    for i, part in enumerate(loc):
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]  # type: ignore[index]
        elif not (missing and i == len(loc) - 1):
            continue
        yield str(part)


async def answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """For an unknown path, a wrong method, and a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path[:200]!r} on this server",
        405: f"{request.method} is not allowed here",
    }.get(error.status_code, str(error.detail))
    response = ApiError(error.status_code, message).response()
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def answer_failure(_request: Request, error: Exception) -> JSONResponse:
    """For everything else."""
    return as_api_error(error).response()
