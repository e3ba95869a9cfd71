"""presence.logs: lines of text, or one JSON object a line (DESIGN §5, `PRESENCE_LOG_FORMAT`)."""

from __future__ import annotations

import io
import json
import logging

import pytest

from presence.logs import configure_logging


@pytest.fixture
def log_of(monkeypatch):
    """Configures logging as asked, has ``talk`` log, and returns the lines that came on standard error."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def run(level: str, style: str, talk) -> list[str]:
        out = io.StringIO()
        monkeypatch.setattr("sys.stderr", out)
        root.handlers = []  # pytest's own: `force` would close them
        configure_logging(level, style)
        talk(logging.getLogger("presence.somewhere"))
        return out.getvalue().splitlines()

    yield run
    root.handlers = before
    root.setLevel(level)
    logging.getLogger("hypercorn").setLevel(logging.NOTSET)


def test_text_is_a_line_with_time_level_name_and_message(log_of):
    (line,) = log_of("info", "text", lambda log: log.info("users=%d", 3))
    date, _, rest = line.partition(" ")
    assert date.count("-") == 2
    assert rest.split(" ", 1)[1] == "INFO    presence.somewhere: users=3"


def test_json_is_one_object_a_line_whatever_the_message_holds(log_of):
    def talk(log):
        log.warning('tên "%s"\n\x00', "Nguyễn")
        log.error("second")

    lines = log_of("info", "json", talk)
    first, second = (json.loads(line) for line in lines)
    assert first["message"] == 'tên "Nguyễn"\n\x00'
    assert {name: first[name] for name in ("level", "logger")} == {"level": "warning", "logger": "presence.somewhere"}
    assert first["time"][:2] == "20"
    assert second["message"] == "second"
    assert "Nguyễn" in lines[0], "to be read by people, too"


def test_json_has_the_traceback_in_its_line(log_of):
    def talk(log):
        try:
            raise ValueError("broken\nin two")
        except ValueError:
            log.exception("failed")

    (line,) = log_of("info", "json", talk)
    error = json.loads(line)
    assert error["message"] == "failed"
    assert error["error"].startswith("Traceback")
    assert error["error"].endswith("broken\nin two")


@pytest.mark.parametrize(
    ("level", "told"),
    (
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ),
)
def test_what_is_below_the_level_is_not_logged(log_of, level, told):
    def talk(log):
        for name in ("debug", "info", "warning", "error"):
            getattr(log, name)("at %s", name)

    assert [json.loads(line)["level"] for line in log_of(level, "json", talk)] == told


def test_hypercorn_is_heard_when_something_is_wrong_only(log_of):
    def talk(log):
        logging.getLogger("hypercorn.error").info("Running on http://…")
        logging.getLogger("hypercorn.error").warning("oh")

    (line,) = log_of("debug", "text", talk)
    assert line.endswith("oh")


def test_configured_again_it_logs_once(log_of):
    def talk(log):
        configure_logging("info", "json")
        log.info("once")

    assert len(log_of("info", "text", talk)) == 1
