// PresenceManager's rules, on clients of its two kinds that are played here. test_presence_manager.py runs this.
import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";
import { PresenceManager } from "presence-manager";

const QUEUE = "/user/queue/online-status";
const BEAT = 30_000;

/** Plays `Client` of @stomp/stompjs: its callbacks are properties, and it has a new socket with every connection. */
class Modern {
  connected = false;
  connectHeaders = {};
  onConnect = () => {};
  onStompError = () => {};
  onWebSocketClose = () => {};
  sent = [];
  receipts = new Map();

  connect() {
    [this.connected, this.webSocket] = [true, {}];
    this.onConnect({});
  }
  lose() {
    [this.connected, this.webSocket] = [false, undefined];
    this.onWebSocketClose({});
  }
  publish({ destination, headers, body }) {
    if (!this.connected) throw new TypeError("There is no underlying STOMP connection");
    this.sent.push({ destination, headers: { ...headers }, body });
  }
  subscribe(destination, callback) {
    this.sent.push({ destination: `SUBSCRIBE ${destination}` });
    this.callback = callback;
    return { unsubscribe: () => this.sent.push({ destination: "UNSUBSCRIBE" }) };
  }
  watchForReceipt(receipt, callback) {
    this.receipts.set(receipt, callback);
  }
  refuse(receipt, message) {
    this.onStompError({ headers: { "receipt-id": receipt, message } });
  }
}

/** Plays a client of stompjs 2: one connection, `send`, and a socket whose close is an event. */
class Legacy {
  connected = false;
  sent = [];
  ws = new EventTarget();

  connect() {
    this.connected = true;
  }
  lose() {
    this.connected = false;
    this.ws.dispatchEvent(new Event("close"));
  }
  send(destination, headers, body) {
    headers.destination = destination; // as it really does
    this.sent.push({ destination, headers, body });
  }
  subscribe = Modern.prototype.subscribe;
}

/** Plays the time, which goes by when a test says so. (That of node:test is missing in Node 18.) */
class Clock {
  now = 0;
  timers = new Set();

  constructor() {
    const add = (timer) => (this.timers.add(timer), timer);
    mock.method(globalThis, "setTimeout", (act, ms) => add({ act, at: this.now + ms }));
    mock.method(globalThis, "setInterval", (act, every) => add({ act, at: this.now + every, every }));
    for (const name of ["clearTimeout", "clearInterval"]) {
      mock.method(globalThis, name, (timer) => this.timers.delete(timer));
    }
    mock.method(Date, "now", () => this.now);
  }
  tick(ms) {
    const end = this.now + ms;
    for (;;) {
      const [next] = [...this.timers].filter(({ at }) => at <= end).sort((one, other) => one.at - other.at);
      if (!next) break;
      this.now = next.at;
      if (next.every) next.at += next.every;
      else this.timers.delete(next);
      next.act();
    }
    this.now = end;
  }
}

let clock, told, refused, errors;
beforeEach(() => {
  clock = new Clock();
  mock.method(Math, "random", () => 0.5);
  [told, refused, errors] = [[], [], []];
});
afterEach(() => mock.restoreAll());

function manage(client, options = {}) {
  return new PresenceManager(client, {
    onChange: (...change) => told.push(change.slice(0, 2)),
    onRefused: (...list) => refused.push(list),
    onError: (error) => errors.push(error.message),
    ...options,
  });
}

const say = (client, userId, online, version, more = {}) =>
  client.callback({ body: JSON.stringify({ userId, online, version, timestamp: null, ...more }) });
const sent = (client, destination) => client.sent.filter((frame) => frame.destination === destination);
const watched = (client) => sent(client, "/app/presence.subscribe").map(({ body }) => JSON.parse(body).userIds);
const beats = (client) => sent(client, "/app/heartbeat");
const statuses = (client) => sent(client, "/app/online-status").map(({ body }) => JSON.parse(body).online);
const jwt = (exp) => `e30.${Buffer.from(JSON.stringify({ exp: exp / 1000, name: "ÿ>?" })).toString("base64url")}.x`;
const settled = async () => {
  for (let turn = 0; turn < 5; turn++) await null;
};

for (const [kind, Client] of [["a modern", Modern], ["a legacy", Legacy]]) {
  test(`start of ${kind} client goes online, listens and watches; stop goes offline and ends the beats`, () => {
    const client = new Client();
    const manager = manage(client);
    manager.subscribeToUsers(["bob"]);
    manager.start();
    assert.deepEqual(client.sent, [], "there is no connection yet");
    client.connect();
    manager.start(); // as the guide does, when connected
    assert.deepEqual(statuses(client), [true]);
    assert.equal(sent(client, `SUBSCRIBE ${QUEUE}`).length, 1);
    assert.deepEqual(watched(client), [["bob"]]);
    clock.tick(3 * BEAT);
    assert.equal(beats(client).length, 3);
    say(client, "bob", true, 1);
    manager.stop();
    assert.deepEqual(statuses(client), [true, false]);
    assert.equal(sent(client, "UNSUBSCRIBE").length, 1);
    assert.deepEqual(told.at(-1), ["bob", null], "nobody tells of bob any more");
    clock.tick(3 * BEAT);
    assert.equal(beats(client).length, 3);
  });

  test(`when the connection of ${kind} client is gone all is unknown, at once, and no beat is sent`, () => {
    const client = new Client();
    const manager = manage(client);
    client.connect();
    manager.start();
    manager.subscribeToUsers(["bob", "carol", "dave"]);
    say(client, "bob", true, 1);
    say(client, "carol", false, 1);
    client.lose();
    assert.deepEqual(told.slice(2), [["bob", null], ["carol", null]], "dave was unknown before");
    assert.equal(manager.isOnline("bob"), null);
    clock.tick(3 * BEAT);
    assert.equal(beats(client).length, 0);
  });

  test(`what ${kind} client sends holds the guide's frames`, () => {
    const client = new Client();
    const manager = manage(client);
    client.connect();
    manager.start();
    manager.subscribeToUsers(["bob"]);
    manager.unsubscribeFromUsers(["bob", "nobody"]);
    clock.tick(BEAT);
    const sends = client.sent.filter(({ destination }) => destination.startsWith("/app/"));
    assert.deepEqual(sends.map(({ destination, body }) => [destination, body]), [
      ["/app/online-status", '{"online":true}'],
      ["/app/presence.subscribe", '{"userIds":["bob"]}'],
      ["/app/presence.unsubscribe", '{"userIds":["bob"]}'],
      ["/app/heartbeat", ""],
    ]);
  });
}

test("the callbacks that the client had are called as before", () => {
  const client = new Modern();
  const seen = [];
  client.onConnect = () => seen.push("connect");
  client.onStompError = () => seen.push("error");
  client.onWebSocketClose = () => seen.push("close");
  manage(client).start();
  client.connect();
  client.refuse("other", "x");
  client.lose();
  assert.deepEqual(seen, ["connect", "error", "close"]);
});

test("start called again with every connection joins it once", () => {
  const client = new Modern();
  const manager = manage(client);
  client.onConnect = () => manager.start();
  client.connect();
  client.lose();
  client.connect();
  assert.deepEqual(statuses(client), [true, true]);
});

test("a change that is older than what is known is dropped, and none is told twice", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 5, { snapshot: true });
  say(client, "bob", false, 4);
  say(client, "bob", true, 5, { snapshot: true });
  assert.deepEqual(told, [["bob", true]]);
  say(client, "bob", false, 6);
  say(client, "bob", true, 5);
  assert.deepEqual(told, [["bob", true], ["bob", false]]);
  assert.equal(manager.isOnline("bob"), false);
});

test("version 0 stands outside the order: it always counts, and lets nothing older pass", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 5);
  say(client, "bob", false, 0, { snapshot: true }); // hidden from now on
  say(client, "bob", true, 4);
  assert.equal(manager.isOnline("bob"), false);
  say(client, "bob", true, 5, { snapshot: true }); // visible again
  assert.deepEqual(told, [["bob", true], ["bob", false], ["bob", true]]);
});

test("the highest version counts over a reconnect, too", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 5);
  client.lose();
  client.connect();
  say(client, "bob", false, 4, { snapshot: true });
  assert.equal(manager.isOnline("bob"), null);
  say(client, "bob", true, 5, { snapshot: true });
  assert.equal(manager.isOnline("bob"), true);
});

test("nothing is told of users who are not watched, or no more", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  manager.unsubscribeFromUsers(["bob"]);
  say(client, "bob", true, 1);
  say(client, "eve", true, 1);
  assert.deepEqual(told, []);
});

test("messages of a connection that is gone are not listened to", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  const old = client.callback;
  client.lose();
  old({ body: JSON.stringify({ userId: "bob", online: true, version: 1 }) });
  assert.deepEqual(told, []);
});

test("after a reconnect the watches are restored, at a random moment within the delay", () => {
  const client = new Modern();
  const manager = manage(client, { rejoinDelay: 8_000 });
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob", "carol"]);
  manager.unsubscribeFromUsers(["carol"]);
  client.lose();
  client.sent.length = 0;
  client.connect();
  manager.subscribeToUsers(["dave"]); // whom the page just began to show: at once
  assert.deepEqual(watched(client), [["dave"]]);
  clock.tick(3_999);
  assert.deepEqual(watched(client), [["dave"]]);
  clock.tick(1);
  assert.deepEqual(watched(client), [["dave"], ["bob"]], "Math.random() is 0.5 here");
});

test("a connection that is lost again before the watches were restored restores them once", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  client.lose();
  client.connect();
  clock.tick(1_000);
  client.lose();
  client.sent.length = 0;
  client.connect();
  clock.tick(2_499);
  assert.deepEqual(watched(client), [], "the moment of the connection before");
  clock.tick(10_000);
  assert.deepEqual(watched(client), [["bob"]]);
});

test("a legacy client is followed by the next one", () => {
  const [first, second] = [new Legacy(), new Legacy()];
  const manager = manage(first);
  first.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(first, "bob", true, 1);
  manager.disconnected("Whoops! Lost connection to ws://127.0.0.1/ws");
  second.connect();
  manager.start(second);
  clock.tick(5_000);
  assert.deepEqual(watched(second), [["bob"]]);
  first.lose(); // late
  say(second, "bob", true, 1);
  assert.deepEqual(told, [["bob", true], ["bob", null], ["bob", true]]);
});

test("a client that can no longer send has lost its connection", () => {
  const client = new Legacy();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 1);
  client.send = () => {
    throw new Error("socket is closed");
  };
  clock.tick(BEAT);
  assert.deepEqual(told.at(-1), ["bob", null]);
});

test("a client that has quietly lost its connection is found out by the next beat", () => {
  const client = new Legacy();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 1);
  client.connected = false;
  clock.tick(BEAT);
  assert.deepEqual([told.at(-1), beats(client)], [["bob", null], []]);
});

test("a connection that replaces one whose end nobody told counts from there", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 1);
  client.connect();
  assert.deepEqual(told.at(-1), ["bob", null]);
  clock.tick(BEAT);
  assert.equal(beats(client).length, 1);
});

test("a client that another one has replaced is not listened to any more, from the start of that one", () => {
  const [first, second] = [new Modern(), new Modern()];
  const manager = manage(first);
  first.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(first, "bob", true, 1);
  manager.start(second);
  assert.deepEqual(told.at(-1), ["bob", null]);
  second.connect();
  clock.tick(5_000);
  say(second, "bob", true, 1);
  first.lose();
  assert.equal(manager.isOnline("bob"), true);
});

test("after stop a new connection is left alone, until start", () => {
  const client = new Modern();
  const manager = manage(client);
  manager.subscribeToUsers(["bob"]);
  client.connect();
  manager.start();
  manager.stop();
  client.lose();
  client.sent.length = 0;
  client.connect();
  clock.tick(BEAT);
  assert.deepEqual(client.sent, []);
  manager.start();
  assert.deepEqual(watched(client), [["bob"]], "at once: nothing has come back here");
});

test("lists that could not be sent, as the connection went, are sent on the next", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  const publish = client.publish;
  client.publish = (frame) => {
    client.publish = () => {
      throw new TypeError("There is no underlying STOMP connection");
    };
    publish.call(client, frame);
  };
  const many = Array.from({ length: 2_500 }, (_, n) => `user-${n}`);
  manager.subscribeToUsers(many);
  client.publish = publish;
  client.lose();
  client.sent.length = 0;
  client.connect();
  clock.tick(5_000);
  assert.deepEqual(watched(client).flat(), many);
});

test("users who are not watched anew yet need not be unwatched", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  client.lose();
  client.connect();
  manager.unsubscribeFromUsers(["bob"]);
  assert.deepEqual(sent(client, "/app/presence.unsubscribe"), []);
});

test("lists of more than 1,000 ids, or of 64 KiB, are split", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  const many = Array.from({ length: 2_500 }, (_, n) => `user-${n}`);
  manager.subscribeToUsers([...many, ...many]);
  assert.deepEqual(watched(client).map((list) => list.length), [1000, 1000, 500]);
  assert.deepEqual(watched(client).flat(), many);
  manager.unsubscribeFromUsers(many);
  const gone = sent(client, "/app/presence.unsubscribe").map(({ body }) => JSON.parse(body).userIds.length);
  assert.deepEqual(gone, [1000, 1000, 500]);
  client.sent.length = 0;
  const long = Array.from({ length: 1_000 }, (_, n) => `${n}`.padEnd(128, "x"));
  manager.subscribeToUsers(long);
  assert.deepEqual(watched(client).flat(), long);
  assert.ok(client.sent.every(({ body }) => body.length < 60_000));
});

test("one id may be given as it is", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers("bob");
  manager.unsubscribeFromUsers("bob");
  assert.deepEqual(watched(client), [["bob"]]);
  assert.equal(sent(client, "/app/presence.unsubscribe")[0].body, '{"userIds":["bob"]}');
});

test("a user who is watched is not asked for again", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  manager.subscribeToUsers(["bob", "carol"]);
  assert.deepEqual(watched(client), [["bob"], ["carol"]]);
});

test("a list that was refused is not sent again; those before and after it are", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  manager.subscribeToUsers(["erin", "carol"]);
  manager.subscribeToUsers(["dave"]);
  const [first, second] = sent(client, "/app/presence.subscribe").map(({ headers }) => headers.receipt);
  client.receipts.get(first)();
  client.refuse(second, "userIds: more than 2 users watched");
  client.lose();
  assert.deepEqual(refused, [[["erin", "carol"], "userIds: more than 2 users watched"]]);
  client.sent.length = 0;
  client.connect();
  clock.tick(5_000);
  assert.deepEqual(watched(client), [["bob", "dave"]]);
});

test("a legacy client's list that was refused is not sent again", () => {
  const client = new Legacy();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  manager.subscribeToUsers(["carol"]);
  const [first, second] = sent(client, "/app/presence.subscribe").map(({ headers }) => headers.receipt);
  client.onreceipt({ headers: { "receipt-id": first } });
  manager.disconnected({ headers: { "receipt-id": second, message: "no" } }); // what its error callback is given
  const next = new Legacy();
  next.connect();
  manager.start(next);
  clock.tick(5_000);
  assert.deepEqual([watched(next), refused], [[["bob"]], [[["carol"], "no"]]]);
});

test("what is no id is refused here, and takes nobody with it", () => {
  const client = new Modern();
  const manager = manage(client);
  manager.start();
  const wrong = ["no id!", "", "a:b", "x".repeat(129), null, 7];
  manager.subscribeToUsers(["bob", ...wrong, "0.a_~@-Z"]);
  client.connect();
  assert.deepEqual(watched(client), [["bob", "0.a_~@-Z"]]);
  assert.deepEqual(refused, [[wrong, "userIds: not an id"]]);
});

for (const reason of ["userIds: too many ids a second", "more than 100 frames a second"]) {
  test(`a list is sent again that came too soon: ${reason}`, () => {
    const client = new Modern();
    const manager = manage(client);
    client.connect();
    manager.start();
    manager.subscribeToUsers(["bob"]);
    client.refuse(sent(client, "/app/presence.subscribe")[0].headers.receipt, reason);
    client.lose();
    client.connect();
    clock.tick(5_000);
    assert.deepEqual([watched(client), refused], [[["bob"], ["bob"]], []]);
  });
}

test("after stop the server watches nobody for this connection, and start goes on with the list", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob", "carol"]);
  manager.stop();
  assert.deepEqual(JSON.parse(sent(client, "/app/presence.unsubscribe")[0].body).userIds, ["bob", "carol"]);
  manager.unsubscribeFromUsers(["bob"]);
  manager.start();
  assert.deepEqual(watched(client), [["bob", "carol"], ["carol"]]);
});

test("an ERROR that is about something else refuses no list", () => {
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  client.receipts.get(sent(client, "/app/presence.subscribe")[0].headers.receipt)();
  client.refuse(undefined, "token expired");
  client.refuse(sent(client, "/app/presence.subscribe")[0].headers.receipt, "after its receipt");
  client.lose();
  client.connect();
  clock.tick(5_000);
  assert.deepEqual([watched(client).at(-1), refused], [["bob"], []]);
});

test("a token is renewed in band, in time, and the client comes back with it", async () => {
  const client = new Modern();
  const hour = 3_600_000;
  client.connectHeaders = { Authorization: `Bearer ${jwt(hour)}`, device: "mobile" };
  let asked = 0;
  const manager = manage(client, { token: async () => jwt((1 + ++asked) * hour) });
  client.connect();
  manager.start();
  clock.tick(hour - 90_000);
  await settled();
  assert.equal(asked, 0);
  clock.tick(BEAT);
  await settled();
  assert.equal(asked, 1);
  const renewals = beats(client).filter(({ headers }) => headers.Authorization);
  assert.deepEqual(renewals.map(({ headers }) => headers.Authorization), [`Bearer ${jwt(2 * hour)}`]);
  assert.deepEqual(client.connectHeaders, { Authorization: `Bearer ${jwt(2 * hour)}`, device: "mobile" });
  clock.tick(hour - BEAT);
  await settled();
  assert.equal(asked, 1, "the next one is due an hour later");
  clock.tick(BEAT);
  await settled();
  assert.equal(asked, 2);
});

test("where the token in use is not known, a fresh one is sent at once", async () => {
  const client = new Legacy();
  const manager = manage(client, { token: () => `Bearer ${jwt(600_000)}` });
  client.connect();
  manager.start();
  await settled();
  assert.deepEqual(beats(client).map(({ headers }) => headers.Authorization), [`Bearer ${jwt(600_000)}`]);
});

test("a token that cannot be had is asked for again with the next beat, and that never ends the beats", async () => {
  const client = new Modern();
  client.connectHeaders = { Authorization: `Bearer ${jwt(50_000)}` };
  let tries = 0;
  const token = async () => {
    if (++tries < 3) throw new Error(`no token ${tries}`);
    return jwt(600_000);
  };
  const manager = manage(client, { token });
  client.connect();
  manager.start();
  for (let beat = 0; beat < 3; beat++) {
    await settled();
    clock.tick(BEAT);
  }
  await settled();
  assert.deepEqual(errors, ["no token 1", "no token 2"]);
  assert.equal(tries, 3);
  assert.equal(beats(client).filter(({ headers }) => !headers.Authorization).length, 3);
});

test("a token that ends no later than the one in use is not sent", async () => {
  const client = new Modern();
  client.connectHeaders = { Authorization: `Bearer ${jwt(60_000)}` };
  const manager = manage(client, { token: () => jwt(60_000) });
  client.connect();
  manager.start();
  await settled();
  assert.equal(beats(client).length, 0);
});

test("a token that comes when its connection is gone is not sent on the next", async () => {
  const client = new Modern();
  let give;
  const manager = manage(client, { token: () => new Promise((given) => (give = given)) });
  client.connect();
  manager.start();
  const late = give;
  client.lose();
  client.connectHeaders = { Authorization: `Bearer ${jwt(600_000)}` };
  client.connect();
  late(jwt(1_000_000));
  await settled();
  assert.equal(beats(client).length, 0);
});

test("a callback that throws keeps nobody else from being told", async () => {
  const client = new Modern();
  const manager = manage(client, {
    onChange: (id, online) => {
      told.push([id, online]);
      if (id === "bob") throw new Error("of the page");
    },
  });
  const uncaught = [];
  const listeners = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException");
  process.on("uncaughtException", (error) => uncaught.push(error.message));
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob", "carol"]);
  say(client, "bob", true, 1);
  say(client, "carol", true, 1);
  client.lose();
  await new Promise((turn) => setImmediate(turn));
  process.removeAllListeners("uncaughtException");
  for (const listener of listeners) process.on("uncaughtException", listener);
  assert.deepEqual(told.slice(2), [["bob", null], ["carol", null]]);
  assert.deepEqual(uncaught, ["of the page", "of the page"]);
});

test("it may be extended as the guide's example is", () => {
  const client = new Modern();
  class Mine extends PresenceManager {
    updateUserPresence(userId, online, event) {
      told.push([userId, online, event?.version]);
    }
  }
  const manager = new Mine(client);
  client.connect();
  manager.start();
  manager.subscribeToUsers(["bob"]);
  say(client, "bob", true, 7);
  client.lose();
  assert.deepEqual(told, [["bob", true, 7], ["bob", null, undefined]]);
});

// In a page.

class PageWorker {
  static made = [];
  constructor(url) {
    PageWorker.made.push(this);
    this.url = url;
  }
  terminate() {
    this.ended = true;
  }
}

function page(worker) {
  PageWorker.made.length = 0;
  Object.assign(globalThis, { document: {}, Worker: worker });
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  return { client, manager };
}
afterEach(() => {
  delete globalThis.document;
  delete globalThis.Worker;
});

test("in a page a Worker counts, whose source is the page's own", async () => {
  const { client, manager } = page(PageWorker);
  const [worker] = PageWorker.made;
  const source = await (await fetch(worker.url)).text();
  assert.equal(source, `setInterval(() => postMessage(0), ${BEAT})`);
  clock.tick(3 * BEAT);
  assert.equal(beats(client).length, 0, "no timer of the page's");
  worker.onmessage();
  assert.equal(beats(client).length, 1);
  manager.stop();
  assert.equal(worker.ended, true);
});

for (const how of ["throws", "reports an error later"]) {
  test(`where Workers are forbidden, which ${how}, a timer of the page's counts`, () => {
    class Forbidden extends PageWorker {
      constructor(url) {
        super(url);
        if (how === "throws") throw new Error("SecurityError");
      }
    }
    const { client, manager } = page(Forbidden);
    if (how !== "throws") PageWorker.made[0].onerror();
    clock.tick(2 * BEAT);
    assert.equal(beats(client).length, 2);
    manager.stop();
    clock.tick(2 * BEAT);
    assert.equal(beats(client).length, 2);
  });
}

test("outside of a page a timer counts, Workers or not", () => {
  globalThis.Worker = PageWorker;
  PageWorker.made.length = 0;
  const client = new Modern();
  const manager = manage(client);
  client.connect();
  manager.start();
  clock.tick(BEAT);
  assert.deepEqual([PageWorker.made.length, beats(client).length], [0, 1]);
});

test("where there are no Workers a timer counts", () => {
  const { client } = page(undefined);
  clock.tick(BEAT);
  assert.equal(beats(client).length, 1);
});
