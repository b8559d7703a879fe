"""A web service with Molmo in it: one model, shared by all requests, that never blocks the event loop.

    pip install ".[serve]"
    python examples/fastapi_app.py [--port 8000] [--model BUNDLE]
    curl --data-binary @examples/coffee.jpg "http://127.0.0.1:8000/point?label=cup"

Use this if questions are part of your own application. A server that only answers questions is `molmo-edge serve`.
"""

import argparse
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse

from molmo_edge import AnswerTimeout, Molmo, MolmoEdgeError

MAX_BYTES = 20_000_000


async def read_photo(request: Request) -> bytes:
    """The body of the request, up to MAX_BYTES: a body without a limit would fill the memory."""
    photo = bytearray()
    async for chunk in request.stream():
        photo += chunk
        if len(photo) > MAX_BYTES:
            raise HTTPException(413, f"the photo has more than {MAX_BYTES} bytes")
    return bytes(photo)


def refusal(error: MolmoEdgeError) -> HTTPException:
    """Status 504 for a timeout, 400 for anything else: a body that is not an image, an empty question."""
    return HTTPException(504 if isinstance(error, AnswerTimeout) else 400, str(error))


def create_app(molmo: Molmo) -> FastAPI:
    app = FastAPI(title="Points in photos")

    @app.post("/point")
    async def point(request: Request, label: str) -> dict[str, Any]:
        """Points at every `label` in the photo: x and y in pixels."""
        photo = await read_photo(request)
        try:
            answer = await molmo.point_async(photo, label, timeout=60)
        except MolmoEdgeError as error:
            raise refusal(error) from error
        points = [{"label": p.label, "x": x, "y": y} for p, (x, y) in zip(answer.points, answer.pixels(), strict=True)]
        return {"text": answer.text, "points": points}

    @app.post("/ask")
    async def ask(request: Request, question: str) -> StreamingResponse:
        """The answer as text, piece by piece."""
        stream = molmo.stream_async(await read_photo(request), question, timeout=60)
        try:
            first = await anext(stream, "")  # before the response begins, so that an error can have its status
        except MolmoEdgeError as error:
            raise refusal(error) from error

        async def pieces() -> AsyncIterator[str]:
            piece = first
            try:
                while piece:
                    if isinstance(piece, str):  # else a Point, whose tag is also in the text
                        yield piece
                    piece = await anext(stream, "")
            finally:
                await stream.aclose()  # if the client disconnects, the model stops after the current token

        return StreamingResponse(pieces(), media_type="text/plain; charset=utf-8")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="bundle, checkpoint or hub id (default: nano)")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with Molmo(args.model) as molmo:
        uvicorn.run(create_app(molmo), host="127.0.0.1", port=args.port)
