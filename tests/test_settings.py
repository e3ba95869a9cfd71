"""presence.settings: every option once, checked together, and errors of one line (DESIGN §5, §7)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from presence.settings import Settings, SettingsError, explain, load

SECRET = "correct-horse-battery-staple-0123456789"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.upper().startswith("PRESENCE_")]:
        monkeypatch.delenv(name)


def error_of(**overrides):
    with pytest.raises(SettingsError) as caught:
        load(**overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("name", "default"),
    (
        ("host", "127.0.0.1"),
        ("port", 8080),
        ("workers", 1),
        ("jwt_secret", None),
        ("jwks", None),
        ("jwt_issuer", None),
        ("jwt_audience", None),
        ("lease_seconds", 60),
        ("lease_renewed_by", "heartbeat"),
        ("grace_seconds", 0),
        ("drain_seconds", 15),
        ("silence_seconds", 90),
        ("watch_policy", "anyone"),
        ("directory", None),
        ("allowed_origins", ()),
        ("redis_url", None),
        ("redis_partitions", 1),
        ("log_level", "info"),
        ("log_format", "text"),
    ),
)
def test_the_settings_of_the_table_have_their_defaults(name, default):
    """DESIGN §5: "Settings keep these names (all optional)"."""
    assert getattr(load(), name) == default


@pytest.mark.parametrize(
    ("name", "default"),
    (
        ("max_frame_bytes", 64 * 1024),
        ("max_message_bytes", 1024 * 1024),
        ("max_header_lines", 64),
        ("max_header_line_bytes", 8 * 1024),
        ("max_subscriptions", 16),
        ("max_held_sends", 100),
        ("max_user_connections", 50),
        ("max_frames_per_second", 100),
        ("max_frames_burst", 400),
        ("max_ids_per_second", 5_000),
        ("max_ids_burst", 10_000),
        ("max_ids_per_request", 1_000),
        ("max_watches", 5_000),
        ("max_body_bytes", 256 * 1024),
        ("max_subscribes_per_second", 4),
        ("connect_seconds", 10),
        ("beat_seconds", 10),
        ("ping_seconds", 20),
        ("tcp_user_timeout_seconds", 45),
    ),
)
def test_the_limits_of_the_wire_are_settings(name, default):
    """WIRE §6: "Limits (each a setting)", with those of §2, §3 and §5."""
    assert getattr(load(), name) == default


def test_the_data_folder_is_the_platforms():
    assert load().data_dir.name == "presence"
    assert load().data_dir.is_absolute()


def test_every_setting_is_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("PRESENCE_PORT", "9000")
    monkeypatch.setenv("PRESENCE_LEASE_SECONDS", "2.5")
    monkeypatch.setenv("PRESENCE_DATA_DIR", "/srv/presence")
    monkeypatch.setenv("PRESENCE_MAX_CONNECTIONS", "7")
    settings = load()
    assert (settings.port, settings.lease_seconds, settings.max_connections) == (9000, 2.5, 7)
    assert settings.data_dir == Path("/srv/presence")


def test_an_override_wins_over_the_environment_unless_it_is_none(monkeypatch):
    monkeypatch.setenv("PRESENCE_PORT", "9000")
    assert load(port=9001).port == 9001
    assert load(port=None).port == 9000


@pytest.mark.parametrize("name", ("PORT", "MAX_CONNECTIONS", "JWT_SECRET", "ALLOWED_ORIGINS", "NO_SUCH_THING"))
def test_an_empty_variable_counts_as_unset(monkeypatch, name):
    monkeypatch.setenv(f"PRESENCE_{name}", "")
    assert load() == load(port=8080)


def test_origins_are_a_plain_list_with_commas(monkeypatch):
    monkeypatch.setenv("PRESENCE_ALLOWED_ORIGINS", "https://A.example, http://b.example:8443,capacitor://localhost")
    assert load().allowed_origins == ("https://a.example", "http://b.example:8443", "capacitor://localhost")


@pytest.mark.parametrize("bad", ("https://a.example/", "a.example", "*", "null", "https://a.example/app", "https://"))
def test_what_is_no_origin_is_refused(bad):
    assert error_of(allowed_origins=f"https://ok.example,{bad}").startswith(
        "PRESENCE_ALLOWED_ORIGINS must list origins"
    )


@pytest.mark.parametrize(
    ("overrides", "names"),
    (
        ({"lease_seconds": 0.9}, ["LEASE_SECONDS"]),
        ({"lease_seconds": "inf"}, ["LEASE_SECONDS"]),
        ({"lease_seconds": 10, "grace_seconds": 10}, ["GRACE_SECONDS", "LEASE_SECONDS"]),
        ({"grace_seconds": -1}, ["GRACE_SECONDS"]),
        ({"drain_seconds": -0.1}, ["DRAIN_SECONDS"]),
        ({"silence_seconds": -1}, ["SILENCE_SECONDS"]),
        ({"jwt_secret": "x" * 31}, ["JWT_SECRET"]),
        ({"jwt_secret": SECRET, "jwks": "keys.json"}, ["JWT_SECRET", "JWKS"]),
        ({"workers": 0}, ["WORKERS"]),
        ({"redis_partitions": 0, "redis_url": "redis://h"}, ["REDIS_PARTITIONS"]),
        ({"redis_partitions": 2}, ["REDIS_PARTITIONS", "REDIS_URL"]),
        ({"redis_url": "http://h"}, ["REDIS_URL", "redis://", "rediss://", "unix://"]),
        ({"redis_url": "redis+cluster://h"}, ["REDIS_PARTITIONS", "REDIS_URL", "above 1"]),
        ({"redis_url": "redis+cluster://h,", "redis_partitions": 12}, ["REDIS_URL", "redis+cluster://"]),
        ({"redis_url": "redis+cluster://h/1", "redis_partitions": 12}, ["REDIS_URL", "number 0"]),
        ({"redis_url": "redis+cluster://h?db=1", "redis_partitions": 12}, ["REDIS_URL", "db"]),
        ({"redis_url": "redis+cluster://h?no_such=1", "redis_partitions": 12}, ["REDIS_URL", "options of redis-py"]),
        ({"redis_url": "redis+sentinel://h:1,h:2"}, ["REDIS_URL", "redis+sentinel://", "/service"]),
        ({"redis_url": "redis+sentinel://h:99999/s"}, ["REDIS_URL", "/service"]),
        ({"redis_url": "rediss+sentinel://h/s?ssl_cert_reqs=maybe"}, ["REDIS_URL", "options of redis-py"]),
        ({"redis_url": "rediss+ring://h/s"}, ["REDIS_URL", "redis+cluster://", "rediss+sentinel://"]),
        ({"watch_policy": "friends"}, ["WATCH_POLICY", "'anyone'", "'contacts'"]),
        ({"lease_renewed_by": "magic"}, ["LEASE_RENEWED_BY"]),
        ({"log_level": "loud"}, ["LOG_LEVEL"]),
        ({"log_format": "xml"}, ["LOG_FORMAT"]),
        ({"port": 65_536}, ["PORT", "65535"]),
        ({"port": -1}, ["PORT"]),
        ({"port": 0, "workers": 2}, ["PORT", "WORKERS"]),
        ({"max_frame_bytes": 0}, ["MAX_FRAME_BYTES"]),
        ({"max_frame_bytes": 2_000_000}, ["MAX_FRAME_BYTES", "MAX_MESSAGE_BYTES"]),
        ({"max_ids_per_request": 10_001}, ["MAX_IDS_PER_REQUEST", "MAX_IDS_BURST"]),
        ({"contacts_cache_seconds": 11}, ["CONTACTS_CACHE_SECONDS"]),
        ({"no_such_thing": 1}, ["NO_SUCH_THING"]),
    ),
)
def test_a_wrong_setting_is_named_in_one_line(overrides, names):
    line = error_of(**overrides)
    assert f"PRESENCE_{names[0]}" in line
    assert all(name in line for name in names)


@pytest.mark.parametrize(
    "overrides",
    (
        {"lease_seconds": 1, "grace_seconds": 0.999},
        {"drain_seconds": 0},
        {"silence_seconds": 0},
        {"jwt_secret": "x" * 32, "jwt_issuer": "i", "jwt_audience": "a"},
        {"jwt_secret": "ü" * 16},
        {"jwt_secret": "\udcff" * 32},
        {"jwks": "https://idp.example/keys", "jwt_issuer": "i", "jwt_audience": "a"},
        {"redis_url": "redis://h:6379/0", "redis_partitions": 8},
        {"redis_url": "rediss://h"},
        {"redis_url": "unix:///run/redis.sock"},
        {"redis_url": "redis+cluster://u:p@h:1,[::1]:2", "redis_partitions": 12},
        {"redis_url": "rediss+cluster://h?ssl_ca_certs=ca.pem", "redis_partitions": 2},
        {"redis_url": "redis+sentinel://u:p@h:1,h:2/service?sentinel_username=a&sentinel_password=b"},
        {"redis_url": "rediss+sentinel://h/service?ssl_ca_certs=ca.pem&db=1"},
        {"port": 0},
        {"port": 65_535, "workers": 4},
    ),
)
def test_what_goes_together_is_accepted(overrides):
    settings = load(**overrides)
    assert {name: getattr(settings, name) for name in overrides} == overrides


def test_a_value_that_is_no_number_is_shown():
    assert error_of(port="eighty").endswith("not 'eighty'")


def test_several_wrong_settings_are_named_together():
    line = error_of(port="x", workers=0)
    assert "PRESENCE_PORT" in line
    assert "PRESENCE_WORKERS" in line


def test_a_secret_is_never_shown(monkeypatch):
    secret = "hunter2" * 6
    assert "hunter2" not in error_of(jwt_secret="hunter2")
    for url in (
        "http://u:hunter2@h",
        "redis+cluster://u:hunter2@h:x",
        "redis+sentinel://u:hunter2@h?sentinel_password=b",
    ):
        assert "hunter2" not in error_of(redis_url=url, redis_partitions=12)
    assert "7777" not in error_of(jwt_secret=7777)
    monkeypatch.setenv("PRESENCE_JWT_SECRET", secret)
    monkeypatch.setenv("PRESENCE_REDIS_URL", f"redis://u:{secret}@h")
    assert "hunter2" not in explain()
    assert "hunter2" not in repr(load())
    assert "hunter2" not in error_of(grace_seconds=99)


def test_an_unknown_variable_is_refused_with_the_closest_name(monkeypatch):
    monkeypatch.setenv("PRESENCE_LEESE_SECONDS", "1")
    assert error_of() == "PRESENCE_LEESE_SECONDS is not a setting; the closest name is PRESENCE_LEASE_SECONDS"


def test_the_variables_of_the_tests_are_left_alone(monkeypatch):
    monkeypatch.setenv("PRESENCE_TEST_REQUIRE", "all")
    load()


def test_the_help_names_every_setting_with_its_default_and_meaning():
    text = explain()
    for name, field in Settings.model_fields.items():
        assert f"PRESENCE_{name.upper()} [" in text
        assert field.description
        assert field.description in text
    assert "PRESENCE_LEASE_SECONDS [60]\n" in text
    assert "PRESENCE_JWT_SECRET [none]\n" in text


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name.endswith("_seconds")])
def test_times_say_their_unit(name):
    assert ", s" in (Settings.model_fields[name].description or "")


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        load().port = 1
