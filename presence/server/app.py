"""The HTTP side: Quart app, errors, CORS, SockJS base, health (WIRE §2, §3)."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping

from quart import Blueprint, Quart, Response, request
from quart.wrappers.base import BaseRequestWebsocket
from werkzeug.exceptions import HTTPException
from werkzeug.routing import MapAdapter

from presence.ports import Health, Unavailable
from presence.server.health import readiness
from presence.server.origins import Origins
from presence.server.problems import Problem

log = logging.getLogger(__name__)


def create_app(api: Blueprint, origins: Origins, dependencies: Mapping[str, Health], max_body_bytes: int) -> Quart:
    """Return the app that serves all but WebSockets. ``app.config["STOPPING"]`` makes it not ready."""
    app = _App("presence.server", static_folder="static")
    app.url_map.merge_slashes = False  # "404 unknown path": no redirects
    app.config.update(MAX_CONTENT_LENGTH=max_body_bytes, BODY_TIMEOUT=10, STOPPING=False)
    app.register_blueprint(api)
    app.register_blueprint(_sockjs())

    @app.get("/")
    async def index() -> Response:
        return await app.send_static_file("index.html")

    @app.get("/health/live")
    async def live() -> dict[str, object]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> tuple[dict[str, object], int]:
        return readiness(dependencies, stopping=app.config["STOPPING"])

    @app.errorhandler(Problem)
    async def problem(error: Problem) -> Response:
        return _answer(error)

    @app.errorhandler(Unavailable)
    async def unavailable(error: Unavailable) -> Response:
        log.debug("unknown for now: %s", error)  # where our stores are is no client's business
        return _answer(Problem(503, "unknown for now: try again", {"Retry-After": "1"}))

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        headers = {name: value for name, value in error.get_headers() if name == "Allow"}
        return _answer(Problem(error.code or 500, error.description or "", headers))

    @app.errorhandler(Exception)
    async def failure(error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _answer(Problem(500, "server error"))

    @app.after_request
    async def headers(response: Response) -> Response:
        response.headers.setdefault("Cache-Control", "no-store")
        response.headers.add("Vary", "Origin")
        origin = request.headers.get("Origin")
        if origin is None or not origins.allow(origin, request.host):
            return response
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "Presence-Degraded, Retry-After"
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            response.headers["Access-Control-Allow-Methods"] = "GET, POST, OPTIONS"
            response.headers["Access-Control-Allow-Headers"] = "Authorization, Content-Type, Accept-Language"
            response.headers.setdefault("Access-Control-Max-Age", "600")
        if request.path == "/ws/info":  # the SockJS client asks with credentials
            response.headers["Access-Control-Allow-Credentials"] = "true"
        return response

    return app


class _App(Quart):
    def create_url_adapter(self, request: BaseRequestWebsocket | None) -> MapAdapter | None:
        """Return what finds routes. None depends on the host; one that is no name would make Werkzeug raise."""
        if request is None:
            return super().create_url_adapter(request)
        return self.url_map.bind("", default_method=request.method, path_info=request.path)


def _answer(problem: Problem) -> Response:
    body = json.dumps(problem.body(), ensure_ascii=False)
    return Response(body, problem.status, problem.headers, content_type="application/problem+json")


def _sockjs() -> Blueprint:
    """What SockJS clients ask for before they open a WebSocket (SockJS 0.3.3)."""
    routes = Blueprint("sockjs", __name__, url_prefix="/ws")

    @routes.get("")
    @routes.get("/")
    async def greeting() -> Response:
        return Response("Welcome to SockJS!\n", content_type="text/plain; charset=UTF-8")

    @routes.get("/info", provide_automatic_options=False)
    async def info() -> Response:
        about = {"websocket": True, "cookie_needed": False, "origins": ["*:*"], "entropy": secrets.randbits(32)}
        return Response(json.dumps(about), content_type="application/json; charset=UTF-8")

    @routes.route("/info", methods=["OPTIONS"])
    async def info_options() -> Response:
        lasting = {"Cache-Control": "public, max-age=31536000", "Access-Control-Max-Age": "31536000"}
        return Response("", 204, lasting | {"Allow": "GET, OPTIONS"})

    @routes.get("/websocket")
    @routes.get("/<server>/<session>/websocket")
    async def upgrade_only(server: str = "", session: str = "") -> Response:
        raise Problem(400, "this path takes WebSocket upgrades only")

    return routes
