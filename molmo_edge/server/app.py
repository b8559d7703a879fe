"""The application: which path leads where."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from molmo_edge.errors import MolmoEdgeError
from molmo_edge.server import chat_api, moondream_api, responses_api
from molmo_edge.server.chat_schema import ChatCompletion, ChatRequest
from molmo_edge.server.errors import (
    DOCUMENTED,
    ApiError,
    ErrorBody,
    answer_api_error,
    answer_failure,
    answer_http_error,
    answer_invalid_body,
)
from molmo_edge.server.gate import Gate
from molmo_edge.server.moondream_api import (
    CaptionRequest,
    CaptionResponse,
    CountResponse,
    ObjectRequest,
    PointResponse,
    QueryRequest,
    QueryResponse,
)
from molmo_edge.server.page import PageFiles
from molmo_edge.server.queue import Cancelled
from molmo_edge.server.responses_schema import ResponseBody, ResponsesRequest
from molmo_edge.server.service import Service
from molmo_edge.system.version import __version__

# path, function, class of the request, class of the response
_POSTS: tuple[tuple[str, Callable[..., Any], type[BaseModel], type[BaseModel]], ...] = (
    ("/v1/chat/completions", chat_api.chat_completions, ChatRequest, ChatCompletion),
    ("/v1/responses", responses_api.responses, ResponsesRequest, ResponseBody),
    ("/v1/point", moondream_api.point, ObjectRequest, PointResponse),
    ("/v1/count", moondream_api.count, ObjectRequest, CountResponse),
    ("/v1/caption", moondream_api.caption, CaptionRequest, CaptionResponse),
    ("/v1/query", moondream_api.query, QueryRequest, QueryResponse),
)
# Of a request with "stream". OpenAPI describes one event, whose data is JSON.
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}


class Model(BaseModel):
    """A model."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models of the server: one."""

    object: str
    data: list[Model]


class Health(BaseModel):
    """The state of the server."""

    status: str
    model: str
    version: str
    waiting: int


def create_app(service: Service) -> FastAPI:
    """The application (ASGI) of a service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="molmo-edge",
        version=__version__,
        description="Questions about images, answered by Molmo on this machine.",
        docs_url=None,  # these pages load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    for path, function, body, answer in _POSTS:
        app.add_api_route(
            path,
            _with_body(function, service, body),
            methods=["POST"],
            response_model=None,
            responses={200: {"model": answer, "content": _EVENTS}, **DOCUMENTED},
            name=function.__name__,
        )
    _add_gets(app, service)
    for kind, handler in (
        (ApiError, answer_api_error),
        (MolmoEdgeError, answer_api_error),
        (RequestValidationError, answer_invalid_body),
        (HTTPException, answer_http_error),
        (Cancelled, _answer_nobody),
        (Exception, answer_failure),
    ):
        app.add_exception_handler(kind, handler)
    app.router.default = PageFiles()  # not mounted at /, where it would take requests with a wrong method, too
    endpoints = frozenset([path for path, *_ in _POSTS] + ["/", "/health", "/metrics", "/v1/models"])
    app.add_middleware(Gate, service=service, endpoints=endpoints)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_gets(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        return {"id": service.model, "object": "model", "created": service.started, "owned_by": "molmo-edge"}

    async def models() -> dict[str, Any]:
        """The model that this server runs."""
        return {"object": "list", "data": [model()]}

    async def one_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        if name != service.model:
            raise ApiError(404, f"there is no model of this name here, only {service.model}", code="model_not_found")
        return model()

    async def health() -> Response:
        """Whether the server takes requests."""
        status = "stopping" if service.draining else "ok"
        state = {"status": status, "model": service.model, "version": __version__, "waiting": service.queue.waiting}
        return JSONResponse(state, 503 if service.draining else 200)

    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    refused: dict[int | str, dict[str, Any]] = {401: DOCUMENTED[401]}
    app.add_api_route("/v1/models", models, response_model=ModelList, responses=refused)
    app.add_api_route(
        "/v1/models/{name:path}", one_model, response_model=Model, responses={"4XX": {"model": ErrorBody}}
    )
    app.add_api_route(
        "/health", health, response_model=None, responses={200: {"model": Health}, 503: {"model": Health}}
    )
    app.add_api_route("/metrics", metrics, response_model=None, response_class=Response, responses=refused)


def _with_body(
    function: Callable[..., Any], service: Service, kind: type[BaseModel]
) -> Callable[[BaseModel, Request], Any]:
    """A path operation whose parameter `body` FastAPI reads as `kind`."""

    async def operation(body: BaseModel, request: Request) -> Response:
        result: Response = await function(service, body, request)
        return result

    operation.__annotations__ = {"body": kind, "request": Request}
    operation.__doc__ = function.__doc__
    return operation


async def _answer_nobody(_request: Request, _error: Exception) -> Response:
    """The client has disconnected."""
    return Response(status_code=499)
