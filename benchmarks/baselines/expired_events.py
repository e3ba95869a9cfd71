"""The guide's design alone: who is offline is learnt from Redis' events of expired keys, and from nothing else.

Arguments: URL of the store. Prints the key and the moment (Unix s) of each event.
"""

import sys
import time

import redis

store = redis.Redis.from_url(sys.argv[1], decode_responses=True)
store.config_set("notify-keyspace-events", "Ex")
events = store.pubsub(ignore_subscribe_messages=True)
events.psubscribe("__keyevent@*__:expired")
while True:
    if (event := events.get_message(timeout=1.0)) is not None:
        print(event["data"], time.time(), flush=True)
