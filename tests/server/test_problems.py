"""presence.server.problems: problem documents, RFC 9457 (WIRE §2)."""

from __future__ import annotations

import pytest

from presence.server.problems import Problem


@pytest.mark.parametrize("status", (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503))
def test_a_problem_has_its_four_members(status):
    """WIRE §2: "RFC 9457 problem documents (`application/problem+json`: `type`, `title`, `status`, `detail`)"."""
    body = Problem(status, "what is wrong").body()
    assert list(body) == ["type", "title", "status", "detail"]
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["status"] == status
    assert body["detail"] == "what is wrong"


def test_a_problem_may_have_headers_and_says_its_detail_as_an_exception():
    problem = Problem(429, "slowly", {"Retry-After": "1"})
    assert problem.headers == {"Retry-After": "1"}
    assert str(problem) == "slowly"
    assert Problem(400, "x").headers == {}
