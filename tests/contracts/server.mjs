// An online-status server in one file, written from the guide alone: it shows that the cases of class `guide` are bound
// neither to our server nor to its language. All is kept in memory.
//
// Settings: PORT (8080; 0: any), SECRET (of the tokens, HS256), LEASE (60, in s), DIRECTORY (a JSON file: {"friends":
// {user: [user, …]}, "conversations": {conversation: [user, …]}}).
import { createHmac, randomUUID, timingSafeEqual } from "node:crypto";
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { WebSocketServer } from "ws";

const { PORT = "8080", SECRET, LEASE = "60", DIRECTORY } = process.env;
if (!SECRET) throw new Error("SECRET is not set");
const directory = DIRECTORY ? JSON.parse(readFileSync(DIRECTORY, "utf8")) : {};
const friends = new Map(Object.entries(directory.friends ?? {}));
const conversations = new Map(Object.entries(directory.conversations ?? {}));

// Presence. A connection is {ws, user, ends, subscriptions}; `ends` is when its session does, 0 when it has none.

const connections = new Map(); // user → the open connections of the user
const watched = new Map(); // user → the users whom the user watches
const lastActive = new Map(); // user → ms since 1970
const of = (user) => connections.get(user) ?? new Set();
const isOnline = (user) => [...of(user)].some((connection) => connection.ends > 0);

/** Begin, extend or end a session; the watchers are told if that takes its user online or offline. */
function setSession(connection, ends) {
  const { user } = connection;
  const before = isOnline(user);
  connection.ends = ends;
  const online = isOnline(user);
  if (online === before) return;
  const body = JSON.stringify({ userId: user, online, timestamp: new Date().toISOString() });
  for (const [watcher, users] of watched) if (users.has(user)) of(watcher).forEach((one) => tell(one, body));
}

function tell({ ws, subscriptions }, body) {
  for (const [subscription, destination] of subscriptions) {
    const headers = { destination, subscription, "message-id": randomUUID(), "content-type": "application/json" };
    send(ws, "MESSAGE", headers, body);
  }
}

function refresh(connection) {
  lastActive.set(connection.user, Date.now());
  setSession(connection, performance.now() + LEASE * 1000);
}

function leave(connection) {
  if (!connection.ends) return;
  lastActive.set(connection.user, Date.now());
  setSession(connection, 0);
}

// A session without heartbeats ends by itself, and its user's last activity stays what it was.
setInterval(() => {
  const late = ({ ends }) => ends && ends <= performance.now();
  for (const some of connections.values()) [...some].filter(late).forEach((connection) => setSession(connection, 0));
}, 50);

/** The user whom an `Authorization` header names; undefined if its token is not valid. */
function userOf(authorization) {
  try {
    const [, head, claims, signature] = /^Bearer ([\w-]+)\.([\w-]+)\.([\w-]+)$/.exec(authorization);
    const [{ alg }, { sub, exp }] = [head, claims].map((part) => JSON.parse(Buffer.from(part, "base64url")));
    const right = createHmac("sha256", SECRET).update(`${head}.${claims}`).digest();
    const isRight = alg === "HS256" && timingSafeEqual(right, Buffer.from(signature, "base64url"));
    return isRight && exp > Date.now() / 1000 ? sub : undefined;
  } catch {
    return undefined; // there is none, or none that can be read
  }
}

// REST.

function entry(user) {
  if (isOnline(user)) return { userId: user, status: "ONLINE", isOnline: true, lastSeen: null, lastActiveAgo: null };
  const seen = lastActive.get(user);
  const lastSeen = seen ? new Date(seen).toISOString() : null;
  return { userId: user, status: "OFFLINE", isOnline: false, lastSeen, lastActiveAgo: seen ? ago(seen) : null };
}

function ago(seen) {
  const seconds = (Date.now() - seen) / 1000;
  const units = [[86400, "ngày"], [3600, "giờ"], [60, "phút"], [1, "giây"]];
  const [size, name] = units.find(([size]) => seconds >= size) ?? units.at(-1);
  return `${Math.floor(seconds / size)} ${name} trước`;
}

const entries = (users) => Object.fromEntries(users.map((user) => [user, entry(user)]));
const areIds = (ids) => Array.isArray(ids) && ids.every((id) => typeof id === "string");
const asIds = (ids) => (areIds(ids) ? ids : fail("an array of user ids is expected"));

/** The status and the body of an answer. */
async function answer(request) {
  const caller = userOf(request.headers.authorization);
  if (!caller) return [401, { error: "a valid token is needed" }];
  const [path, id] = request.url.split(/(?<=\/(?:conversation|check)\/)/);
  switch (`${request.method} ${path}`) {
    case "GET /api/presence/friends":
      return [200, entries(friends.get(caller) ?? [])];
    case "GET /api/presence/conversation/": {
      const members = conversations.get(decodeURIComponent(id)) ?? [];
      return members.includes(caller) ? [200, entries(members)] : [403, { error: "you are not a member" }];
    }
    case "GET /api/presence/check/":
      return [200, { isOnline: isOnline(decodeURIComponent(id)) }];
    case "POST /api/presence/batch":
      return [200, entries(asIds(JSON.parse(Buffer.concat(await request.toArray()))))];
    default:
      return [404, { error: "there is no such endpoint" }];
  }
}

const http = createServer(async (request, response) => {
  const [status, body] = await answer(request).catch((error) => [400, { error: error.message }]);
  response.writeHead(status, { "Content-Type": "application/json" }).end(JSON.stringify(body));
});

// STOMP 1.2 and 1.1 at /ws.

const ESCAPES = { "\\": "\\\\", ":": "\\c", "\n": "\\n", "\r": "\\r" };
const PLAIN = Object.fromEntries(Object.entries(ESCAPES).map(([plain, pair]) => [pair, plain]));
const escaped = (text) => text.replace(/[\\:\n\r]/g, (plain) => ESCAPES[plain]);
const unescaped = (text) => text.replace(/\\./g, (pair) => PLAIN[pair] ?? fail(`there is no escape ${pair}`));

function fail(message) {
  throw new Error(message);
}

function send(ws, command, headers, body = "") {
  const lines = Object.entries(headers).map(([name, value]) => `${escaped(name)}:${escaped(value)}\n`);
  ws.send(`${command}\n${lines.join("")}\n${body}\0`);
}

/** A frame from its text, without the NUL; LFs before it are heart-beats. */
function parse(text) {
  const [, word, lines, body] = /^\s*(\w+)\r?\n((?:[^\n]+\n)*?)\r?\n(.*)$/s.exec(text) ?? fail("this is no frame");
  const command = word === "STOMP" ? "CONNECT" : word;
  const headers = {};
  for (const line of lines.split(/\r?\n/).slice(0, -1)) {
    const [, ...pair] = /^([^:]+):(.*)$/.exec(line) ?? fail("a header has no colon");
    const [name, value] = command === "CONNECT" ? pair : pair.map(unescaped);
    headers[name] ??= value; // of a repeated header the first counts
  }
  return { command, headers, body };
}

/** What a SEND does, by its destination. */
const SENDS = {
  __proto__: null,
  "/app/heartbeat": (connection) => connection.ends && refresh(connection), // a session that ended does not come back
  "/app/online-status": (connection, { online }) => (online ? refresh(connection) : leave(connection)),
  "/app/presence.subscribe": ({ user }, { userIds }) => {
    watched.set(user, new Set([...(watched.get(user) ?? []), ...asIds(userIds)]));
  },
  "/app/presence.unsubscribe": ({ user }, { userIds }) => asIds(userIds).forEach((id) => watched.get(user)?.delete(id)),
};

/** What a frame does, by its command. */
const COMMANDS = {
  __proto__: null,
  CONNECT(connection, headers) {
    const offered = headers["accept-version"]?.split(",") ?? [];
    const version = ["1.2", "1.1"].find((one) => offered.includes(one)) ?? fail("STOMP 1.2 or 1.1 is needed");
    connection.user = userOf(headers.Authorization) ?? fail("a valid token is needed");
    connections.set(connection.user, of(connection.user).add(connection));
    refresh(connection);
    send(connection.ws, "CONNECTED", { version, "heart-beat": "0,0" });
  },
  SEND: (connection, { destination }, body) =>
    (SENDS[destination] ?? fail("unknown destination"))(connection, JSON.parse(body || "{}")),
  SUBSCRIBE({ subscriptions }, { id, destination }) {
    if (!/^(\/user)?\/queue\/online-status$/.test(destination)) fail("unknown destination");
    subscriptions.set(id ?? fail("id is missing"), destination);
  },
  UNSUBSCRIBE: ({ subscriptions }, { id }) => subscriptions.delete(id),
  DISCONNECT: leave,
};

function handle(connection, { command, headers, body }) {
  if ((command === "CONNECT") === Boolean(connection.user)) fail("CONNECT comes first, and once");
  (COMMANDS[command] ?? fail(`${command} is not supported`))(connection, headers, body);
  if (headers.receipt) send(connection.ws, "RECEIPT", { "receipt-id": headers.receipt });
  if (command === "DISCONNECT") connection.ws.close();
}

const handleProtocols = (offered) => ["v12.stomp", "v11.stomp"].find((one) => offered.has(one)) ?? false;
const sockets = new WebSocketServer({ server: http, path: "/ws", maxPayload: 1 << 16, handleProtocols });

sockets.on("connection", (ws) => {
  const connection = { ws, user: undefined, ends: 0, subscriptions: new Map() };
  ws.on("message", (data) => {
    try {
      // A message is whole frames, and the NUL ends each: our bodies are JSON, which has none.
      for (const text of data.toString().split("\0")) if (text.trim()) handle(connection, parse(text));
    } catch (error) {
      send(ws, "ERROR", { message: error.message });
      ws.close();
    }
  });
  ws.on("error", () => {}); // "close" follows
  ws.on("close", () => {
    if (!connection.user) return;
    leave(connection);
    of(connection.user).delete(connection);
    if (of(connection.user).size) return;
    connections.delete(connection.user);
    watched.delete(connection.user);
  });
});

http.listen(Number(PORT), "127.0.0.1", () => console.log(`listening on http://127.0.0.1:${http.address().port}`));
process.on("SIGTERM", () => process.exit());
