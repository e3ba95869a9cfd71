"""Pages in Chromium: where they come from, what they show through a restart, and what becomes of a hidden one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.clients.conftest import note_modules
from tests.support.stomp_client import StompClient
from tests.support.waiting import wait_until

LEASE = 5
STARVED = 40.0
"""Time limit for the lease of a page to end whose timers fire once a minute, s. Chromium begins with that a few seconds
after it was hidden (`drivers/chromium.mjs`), and the timers may fire once more meanwhile: that is one lease more."""
TOLD = 15.0
"""Time limit for what is told at once, s: a browser under load starts slowly."""
PICTURES = os.environ.get("PRESENCE_TEST_PICTURES")
"""A folder to keep the screenshots in."""

PEOPLE = "drivers/people.html"


@pytest.fixture(autouse=True)
def _versions():
    yield
    note_modules("@stomp/stompjs")


async def open_page(pages, server, user, people=(), **options):
    """Open a tab for ``user`` whose page shows ``people``; it comes to the front."""
    await pages.do(user, "open", page=options.pop("page", PEOPLE))
    await pages.do(user, "go", url=server.ws, token=server.token(user), people=list(people), beat=1_000, **options)
    await pages.saw(user, "connected", TOLD)


async def read(pages, client, expression):
    """What the page says of itself."""
    await pages.do(client, "read", expression=expression, label=expression)
    return (await pages.saw(client, "read", TOLD, label=expression))["value"]


async def shown(pages, client) -> dict[str, str]:
    """The words the page shows, by name."""
    text = await read(pages, client, "document.getElementById('people').innerText")
    return dict(line.split(": ") for line in text.splitlines() if line)


async def picture(pages, client, folder: Path, name):
    """Take a screenshot; it must be a picture of something."""
    file = Path(PICTURES or folder) / f"{name}.png"
    await pages.do(client, "picture", file=str(file))
    await pages.saw(client, "picture", TOLD)
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 2_000


async def test_a_page_of_another_origin_is_allowed_if_it_is_listed(pages, start_server, users):
    """WIRE §3: "one of a configured list, or, when the server listens on loopback only, any loopback origin"."""
    local, listed, other = users("local"), users("listed"), users("other")
    await pages.do(listed, "open", host="app.example")
    origin = await read(pages, listed, "location.origin")
    assert origin.startswith("http://app.example:")
    server = await start_server(allowed_origins=origin)
    strict = await start_server()
    await pages.do(listed, "connect", url=server.ws, token=server.token(listed))
    await pages.saw(listed, "connected", TOLD)
    await pages.do(local, "connect", url=strict.ws, token=strict.token(local))
    await pages.saw(local, "connected", TOLD)
    # "all else, and `null`, 403 before the upgrade"
    await pages.do(other, "open", host="app.example")
    await pages.do(other, "connect", url=strict.ws, token=strict.token(other))
    for _ in range(2):
        await pages.saw(other, "closed", TOLD)
    assert not [one for one in pages.sights if one.get("client") == other and one["saw"] == "connected"]
    assert not await strict.is_online(other)


async def test_two_pages_show_what_is_so_through_a_restart(pages, start_server, users, tmp_path):
    """WIRE §4, planned server stop: "none if the client is back in time"; nobody is shown as what they are not."""
    alice, bob, carol = users("alice"), users("bob"), users("carol")
    server = await start_server(lease_seconds=60)
    await open_page(pages, server, alice, [bob, carol])
    await pages.saw(alice, "shown", TOLD, userId=bob, word="offline")
    await pages.saw(alice, "shown", TOLD, userId=carol, word="offline")
    await open_page(pages, server, bob, [alice])
    await pages.saw(alice, "shown", TOLD, userId=bob, word="online")
    await pages.saw(bob, "shown", TOLD, userId=alice, word="online")
    await picture(pages, alice, tmp_path, "1-connected")
    assert await shown(pages, alice) == {"bob": "online", "carol": "offline"}

    assert await server.stop() == 0
    for user in (bob, carol):
        await pages.saw(alice, "shown", TOLD, userId=user, word="unknown")
    await pages.saw(bob, "shown", TOLD, userId=alice, word="unknown")
    assert await shown(pages, alice) == {"bob": "unknown", "carol": "unknown"}
    await picture(pages, alice, tmp_path, "2-stopped")

    await server.start().ready()
    await pages.saw(alice, "shown", TOLD, userId=bob, word="online")
    await pages.saw(alice, "shown", TOLD, userId=carol, word="offline")
    await pages.saw(bob, "shown", TOLD, userId=alice, word="online")
    assert await shown(pages, alice) == {"bob": "online", "carol": "offline"}
    await picture(pages, alice, tmp_path, "3-back")
    told = [one["word"] for one in pages.sights if one["saw"] == "shown" and one["userId"] == bob]
    assert told == ["offline", "online", "unknown", "online"]
    assert server.redis().xlen("presence:changes") == 2  # the two came, and nobody noticed the restart
    assert not [one for one in pages.sights if one["saw"] == "exception"]


@pytest.mark.timeout(120)
async def test_a_hidden_page_stays_online(pages, start_server, connect, users, tmp_path):
    """WIRE §4: `PRESENCE_LEASE_RENEWED_BY=connection`: "for browsers' hidden tabs"; or with PresenceManager's Worker.

    Hidden is hidden, and as in three minutes with a lease of 60 s the leases could end twice and more. That the browser
    does starve timers meanwhile shows the page that beats with `setInterval`, as the guide's example does.
    """
    by_beats = await start_server(lease_seconds=LEASE)
    by_connection = await start_server(lease_seconds=LEASE, lease_renewed_by="connection")
    alice, managed, starved, kept, forbidden = (users(name) for name in ("alice", "managed", "starved", "kept", "csp"))
    people = {by_beats: [managed, starved, forbidden], by_connection: [kept]}
    await open_page(pages, by_beats, managed, [starved])
    await open_page(pages, by_beats, starved, manager=False)
    await open_page(pages, by_beats, forbidden, page=f"{PEOPLE}?csp")
    await open_page(pages, by_connection, kept, manager=False)
    await open_page(pages, by_beats, alice, [managed, starved])  # in front of them all
    for page in (managed, starved, kept):
        assert await read(pages, page, "document.visibilityState") == "hidden"
    assert await read(pages, alice, "document.visibilityState") == "visible"

    watchers: dict[object, StompClient] = {}
    for server, users_there in people.items():
        watchers[server] = await connect(server, users("watcher"))
        await watchers[server].subscribe()
        told = await watchers[server].watch(users_there)
        assert all(told[user]["online"] for user in users_there), told
    async with watchers[by_beats].beating(1), watchers[by_connection].beating(1):
        # With no Worker allowed a timer beats, and starves.
        for user in (starved, forbidden):
            await watchers[by_beats].expect_event(user, False, timeout=STARVED)
        for page in (alice, managed):  # the hidden one is told, too
            await pages.saw(page, "shown", TOLD, userId=starved, word="offline")
        await watchers[by_connection].expect_nothing(2 * LEASE, kept)
        assert watchers[by_beats].changes(managed) == []
        assert watchers[by_connection].changes(kept) == []
    assert (await shown(pages, alice))["managed"] == "online"
    await picture(pages, alice, tmp_path, "4-front")

    await pages.do(managed, "show")
    assert await read(pages, managed, "document.visibilityState") == "visible"

    async def shows_what_is_so() -> bool:  # once a minute the other's timer fires
        online = await by_beats.is_online(starved)
        return (await shown(pages, managed))["starved"] == ("online" if online else "offline")

    await wait_until(shows_what_is_so, TOLD)
    await picture(pages, managed, tmp_path, "5-seen-again")
