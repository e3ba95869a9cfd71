"""presence.server.app: what is not to be provoked over the wire. The rest: tests/wire."""

from __future__ import annotations

import asyncio
import logging

import pytest
from quart import Blueprint, Quart

from presence.ports import DirectoryUnavailable, Health, HistoryUnavailable, StoreUnavailable
from presence.server.app import create_app
from presence.server.origins import Origins
from presence.server.transport import log_dropped

ORIGIN = "https://app.example"
PROBLEM = "application/problem+json"


@pytest.fixture
def api() -> Blueprint:
    return Blueprint("api", __name__)


def app_with(api: Blueprint) -> Quart:
    health = Health()
    health.note("up")
    return create_app(api, Origins((ORIGIN,), loopback_only=False), {"store": health}, 1_000)


async def test_an_error_of_ours_is_a_problem_that_tells_nothing_of_us(api, caplog):
    """WIRE §2: "Errors are RFC 9457 problem documents"; "CORS: [...] on errors too"; DESIGN §7."""

    @api.get("/broken")  # type: ignore[untyped-decorator]
    async def broken() -> str:
        raise LookupError("the secret of the house")

    answer = await app_with(api).test_client().get("/broken", headers={"Origin": ORIGIN})
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == PROBLEM
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert answer.headers["Cache-Control"] == "no-store"
    assert "secret" not in await answer.get_data(as_text=True)
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [True]


@pytest.mark.parametrize("error", (StoreUnavailable, DirectoryUnavailable, HistoryUnavailable))
async def test_whatever_cannot_be_asked_makes_the_answer_unknown(api, error):
    """WIRE §2: "503 with `Retry-After`"; DESIGN §7: "A failed dependency is reported as unknown (503)"."""

    @api.get("/unknown")  # type: ignore[untyped-decorator]
    async def unknown() -> str:
        raise error("redis://user:password@10.0.0.1:6379 refused")

    answer = await app_with(api).test_client().get("/unknown", headers={"Origin": ORIGIN})
    assert answer.status_code == 503
    assert answer.headers["Content-Type"] == PROBLEM
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "10.0.0.1" not in await answer.get_data(as_text=True)


async def test_a_body_must_come_in_time(api):
    """DESIGN §7: every limit; the time that a body may take is one."""

    @api.post("/body")  # type: ignore[untyped-decorator]
    async def body() -> str:
        from quart import request

        await request.get_data()
        return "never"

    app = app_with(api)
    assert app.config["BODY_TIMEOUT"] == 10
    app.config["BODY_TIMEOUT"] = 0.05
    async with app.test_client().request("/body", method="POST", headers={"Content-Length": "50"}) as connection:
        await connection.send(b"half of it")
        while connection.status_code is None:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        assert connection.status_code == 408  # type: ignore[attr-defined]


async def test_the_page_at_the_root_is_html(api):
    """DESIGN §5: "`presence serve` with no settings must just work"."""
    answer = await app_with(api).test_client().get("/")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    "path", ("/static/..%2fapp.py", "/static/../app.py", "/static/%2e%2e/app.py", "/static/", "/static/x")
)
async def test_nothing_but_the_static_files_is_served(api, path):
    answer = await app_with(api).test_client().get(path)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == PROBLEM


async def test_a_server_that_stops_is_not_ready(api):
    app = app_with(api)
    assert (await app.test_client().get("/health/ready")).status_code == 200
    app.config["STOPPING"] = True
    assert (await app.test_client().get("/health/ready")).status_code == 503
    assert (await app.test_client().get("/health/live")).status_code == 200


async def test_a_client_that_makes_the_http_library_raise_is_one_line_in_the_log(caplog):
    """House rule: a user's mistake never shows a traceback."""
    caplog.set_level(logging.INFO)
    error = ExceptionGroup("unhandled errors", [ExceptionGroup("more", [ValueError("x" * 1_000 + "\n")])])
    loop = asyncio.get_running_loop()
    log_dropped(loop, {"message": "Unhandled exception in client_connected_cb", "exception": error})
    (record,) = caplog.records
    assert "ValueError" in record.getMessage()
    assert len(record.getMessage()) < 300
    assert "\n" not in record.getMessage()
    assert record.exc_info is None


async def test_other_errors_of_the_loop_keep_their_traceback(caplog):
    log_dropped(
        asyncio.get_running_loop(), {"message": "Task exception was never retrieved", "exception": ValueError("x")}
    )
    assert [record.exc_info is not None for record in caplog.records] == [True]
