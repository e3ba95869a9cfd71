"""Accepts WebSockets, and drops what comes in."""


async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept", "subprotocol": "v12.stomp"})
    while (await receive())["type"] != "websocket.disconnect":
        pass
