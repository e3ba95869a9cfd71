"""A Quart route that takes in the request's body and returns the bytes in the file named by ``ANSWER``."""

import os
from pathlib import Path

from quart import Quart, Response, request

app = Quart(__name__)
ANSWER = Path(os.environ.get("ANSWER", os.devnull)).read_bytes()


@app.post("/api/presence/batch")
async def batch():
    await request.get_data()
    return Response(ANSWER, content_type="application/json")
