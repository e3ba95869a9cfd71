"""Sends each text message to all that are connected, one after the other."""

everybody: list = []


async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    await receive()
    await send({"type": "websocket.accept", "subprotocol": "v12.stomp"})
    everybody.append(send)
    while (message := await receive())["type"] != "websocket.disconnect":
        for send_to in everybody:
            await send_to({"type": "websocket.send", "text": message["text"]})
    everybody.remove(send)
