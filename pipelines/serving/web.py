"""The FastAPI application behind the ingress: OpenAI's error shape, every answer counted.

It is a module of its own because `serve.ingress` pickles the application when the class is made:
what the handlers use must be importable by then.
"""

import asyncio

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.serving.api import ApiError, invalid
from pipelines.serving.metrics import meter

GENERATIONS = "/v1/images/generations"


class CountAnswers:
    """ASGI middleware: every generation request is counted once, by how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and remember the status of its answer."""
        if scope["type"] != "http" or not scope["path"].endswith(GENERATIONS):
            await self._app(scope, receive, send)
            return
        status = 500  # an exception that nothing below answers

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        meter().opened()
        try:
            await self._app(scope, receive, watch)
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            meter().answered(status)


def _refuse(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


def _refuse_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _refuse(request, invalid(error.errors()))


def _refuse_route(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _refuse(request, ApiError(error.status_code, message))


def _fail(request: Request, error: Exception) -> JSONResponse:
    # what went wrong is in the replica's log; it is not for the client
    message = f"internal error ({type(error).__name__}); the server's log says more"
    return _refuse(request, ApiError(500, message, kind="server_error", code="internal_error"))


app = FastAPI(title="Latent diffusion on Ray", description="Text to pictures, OpenAI's way.")
app.add_middleware(CountAnswers)
app.add_exception_handler(ApiError, _refuse)
app.add_exception_handler(RequestValidationError, _refuse_body)
app.add_exception_handler(HTTPException, _refuse_route)
app.add_exception_handler(Exception, _fail)
