"""presence.core.redis_url: one server, a cluster, Sentinel (DESIGN §5)."""

from __future__ import annotations

import pytest

from presence.core.redis_url import RedisUrl, parse


@pytest.mark.parametrize("url", ["redis://u:p@h:1/0", "rediss://h?ssl_ca_certs=ca.pem", "unix:///run/redis.sock?db=1"])
def test_the_url_of_one_server_is_left_as_it_is(url):
    assert parse(url) == RedisUrl("server", url)


def test_a_cluster_has_many_addresses_and_one_way_to_ask_them():
    parsed = parse("rediss+cluster://u:p%40@h1:7001,h2,[::1]:7003/0?ssl_ca_certs=ca.pem")
    assert parsed.kind == "cluster"
    assert parsed.addresses == (("h1", 7001), ("h2", 6379), ("::1", 7003))
    assert parsed.url == "rediss://u:p%40@host?ssl_ca_certs=ca.pem"


def test_the_sentinels_have_a_user_of_their_own():
    parsed = parse("rediss+sentinel://u:p@h1,h2:1/main?sentinel_username=s&sentinel_password=t%2F&ssl_ca_certs=ca&db=1")
    assert parsed.kind == "sentinel"
    assert parsed.service == "main"
    assert parsed.addresses == (("h1", 26379), ("h2", 1))
    assert parsed.url == "rediss://u:p@host?ssl_ca_certs=ca&db=1"
    assert parsed.sentinel_url == "rediss://host?ssl_ca_certs=ca&username=s&password=t%2F"


@pytest.mark.parametrize(
    "url",
    [
        "http://hunter2@h",
        "redis+cluster://",
        "redis+cluster://u:hunter2@h:1,,h:2",
        "redis+cluster://u:hunter2@h:port",
        "redis+cluster://u:hunter2@h/1",
        "redis+cluster://h?sentinel_password=hunter2",
        "redis+sentinel://u:hunter2@h",
        "redis+sentinel://u:hunter2@h/a/b",
        "redis+sentinel://u:hunter2@h/a#b",
    ],
)
def test_what_is_wrong_is_said_without_the_url(url):
    with pytest.raises(ValueError, match=r"^(must|cannot|of a cluster)") as caught:
        parse(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_is_not_in_the_repr():
    assert "hunter2" not in repr(parse("redis+sentinel://u:hunter2@h/s?sentinel_password=hunter2"))
