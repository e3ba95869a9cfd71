// Who is online, for web pages and Node (guide, "Frontend Integration"; WIRE §4, §5). No dependencies.

const QUEUE = "/user/queue/online-status";
const MAX_IDS = 1000; // "at most 1,000 ids in one frame" (WIRE §5)
const MAX_CHARS = 48_000; // of the ids of one frame, which may have 64 KiB (WIRE §6); ids are ASCII
const ID = /^[A-Za-z0-9][A-Za-z0-9._~@-]{0,127}$/; // (WIRE §1)
const PASSING = / a second$/; // "too many ids a second", "more than 100 frames a second": it is not about the list

let receipts = 0; // several managers may share a client

/**
 * Tells who of the watched users is online, and keeps the own user online.
 *
 * Works with `@stomp/stompjs` (`client.publish`), whose reconnects it notices by itself, and with the legacy API
 * (`client.send(destination, headers, body)`): there call `start` whenever a client has connected, and give
 * `disconnected` what the error callback of `connect` is given.
 *
 * A status is true (online), false (offline) or null: unknown, since nobody tells us.
 */
export class PresenceManager {
  #options;
  #people = new Map(); // user id → { online, version: the highest seen, asked: on this connection }
  #lists = new Map(); // receipt id → the ids of a list that is under way
  #hooked = new WeakSet(); // clients whose callbacks also call us
  #running = false;
  #socket; // of the connection we have joined; undefined: none
  #subscription;
  #stopBeating;
  #rejoining; // timer
  #hadConnection = false; // since `start`
  #expires = 0; // of the token in use, ms

  /** @see presence-manager.d.ts for the options. */
  constructor(stompClient, options = {}) {
    const defaults = { heartbeatInterval: 30_000, rejoinDelay: 5_000, renewBefore: 60_000 };
    this.stompClient = stompClient;
    this.#options = { ...defaults, ...options };
  }

  /** Go online, beat, and be told of the watched users, from now on or as soon as the client is connected. */
  start(stompClient = this.stompClient) {
    if (stompClient !== this.stompClient) this.disconnected();
    this.stompClient = stompClient;
    this.#running = true;
    this.#hook(stompClient);
    if (stompClient.connected !== false) this.#join();
  }

  /** Go offline and be told nothing more. The connection stays, and so does the list for the next `start`. */
  stop() {
    if (this.#socket && this.stompClient.connected !== false) {
      this.#send("/app/online-status", JSON.stringify({ online: false }));
      this.#attempt(() => this.#subscription?.unsubscribe());
      this.#unwatch([...this.#people.keys()]);
    }
    this.disconnected();
    this.#running = this.#hadConnection = false;
  }

  /** Watch these users (an id, or several), also after a reconnect. For each the first callback is its present status. */
  subscribeToUsers(userIds) {
    const given = [...idsOf(userIds)].filter((id) => !this.#people.has(id));
    const [added, wrong] = [given.filter(isId), given.filter((id) => !isId(id))];
    for (const id of added) this.#people.set(id, { online: null, version: 0, asked: false });
    if (this.#socket) this.#watch(added);
    // The server would close the connection, and refuse those who are in one list with it.
    if (wrong.length) this.#tell(() => this.#options.onRefused?.(wrong, "userIds: not an id"));
  }

  /** Watch these users no more. There is no callback for that. */
  unsubscribeFromUsers(userIds) {
    const removed = [...idsOf(userIds)].filter((id) => this.#people.has(id));
    this.#unwatch(removed);
    for (const id of removed) this.#people.delete(id);
  }

  /** The status of a user: true, false, or null when it is unknown. */
  isOnline(userId) {
    return this.#people.get(userId)?.online ?? null;
  }

  /** The connection is gone, or about to go; `error`: the ERROR frame, if there was one. All statuses are unknown. */
  disconnected(error) {
    if (error?.headers) this.#refused(error);
    if (!this.#socket) return;
    this.#socket = this.#subscription = undefined;
    this.#stopBeating();
    clearTimeout(this.#rejoining);
    this.#lists.clear();
    const known = [...this.#people].filter(([, person]) => person.online !== null);
    for (const person of this.#people.values()) Object.assign(person, { online: null, asked: false });
    for (const [id] of known) this.#tell(() => this.updateUserPresence(id, null));
  }

  /** Called with each change of a status; `event` is what the server said, if it did. To override, or see `onChange`. */
  updateUserPresence(userId, online, event) {
    this.#options.onChange?.(userId, online, event);
  }

  #hook(client) {
    if (this.#hooked.has(client)) return;
    this.#hooked.add(client);
    const also = (name, ours) => {
      const theirs = client[name];
      client[name] = (...given) => {
        if (client === this.stompClient) ours(...given);
        return theirs?.apply(client, given);
      };
    };
    if (client.publish) {
      also("onConnect", () => this.#join());
      also("onStompError", (frame) => this.#refused(frame));
      also("onWebSocketClose", () => this.disconnected());
    } else {
      also("onreceipt", (frame) => this.#lists.delete(frame.headers["receipt-id"]));
    }
  }

  #join() {
    const client = this.stompClient;
    const socket = client.webSocket ?? client.ws ?? client;
    if (!this.#running || socket === this.#socket) return;
    this.disconnected(); // an earlier connection whose end nobody told us
    this.#socket = socket;
    this.#stopBeating = every(this.#options.heartbeatInterval, () => this.#beat());
    if (!client.publish) socket.addEventListener?.("close", () => socket === this.#socket && this.disconnected());
    this.#attempt(() => {
      this.#subscription = client.subscribe(QUEUE, (message) => {
        if (socket === this.#socket) this.#take(JSON.parse(message.body));
      });
    });
    this.#send("/app/online-status", JSON.stringify({ online: true }));
    // A server that restarts has all its clients back at once: their lists are to come one after another.
    const delay = this.#hadConnection ? Math.random() * this.#options.rejoinDelay : 0;
    const rejoin = () => this.#watch([...this.#people].filter(([, { asked }]) => !asked).map(([id]) => id));
    if (delay) this.#rejoining = setTimeout(rejoin, delay);
    else rejoin();
    this.#hadConnection = true;
    this.#expires = expiry(client.connectHeaders?.Authorization);
    this.#renewIfDue();
  }

  #watch(ids) {
    for (const part of parts(ids)) {
      if (!this.#socket) return;
      const receipt = `presence-${++receipts}`;
      this.#lists.set(receipt, part);
      for (const id of part) this.#people.get(id).asked = true;
      this.#attempt(() => this.stompClient.watchForReceipt?.(receipt, () => this.#lists.delete(receipt)));
      this.#send("/app/presence.subscribe", JSON.stringify({ userIds: part }), { receipt });
    }
  }

  #unwatch(ids) {
    for (const part of parts(ids.filter((id) => this.#people.get(id).asked))) {
      this.#send("/app/presence.unsubscribe", JSON.stringify({ userIds: part }));
    }
  }

  /** What a list names that the server refuses is not asked for again: it would be refused with every connection. */
  #refused(frame) {
    const ids = this.#lists.get(frame.headers["receipt-id"]);
    const reason = frame.headers.message ?? "";
    if (!ids || PASSING.test(reason)) return;
    for (const id of ids) this.#people.delete(id);
    this.#tell(() => this.#options.onRefused?.(ids, reason));
  }

  #take(event) {
    const { userId, online, version } = event;
    const person = this.#people.get(userId);
    // "Per subscription and user the versions never go down"; "version 0 stands outside the order of versions" (WIRE §5)
    if (!person || (version !== 0 && version < person.version)) return;
    if (version !== 0) person.version = version;
    if (person.online === online) return;
    person.online = online;
    this.#tell(() => this.updateUserPresence(userId, online, event));
  }

  #beat() {
    if (this.stompClient.connected === false) return this.disconnected();
    this.#send("/app/heartbeat", "");
    this.#renewIfDue();
  }

  /** Asked with each beat, since timers of hidden pages are late. A token that does not come is asked for again. */
  async #renewIfDue() {
    const { token, renewBefore, heartbeatInterval } = this.#options;
    const socket = this.#socket;
    const early = Math.max(renewBefore, 2 * heartbeatInterval);
    if (!socket || !token || Date.now() < this.#expires - early) return;
    try {
      const fresh = `Bearer ${(await token()).replace(/^Bearer /, "")}`;
      if (socket !== this.#socket || expiry(fresh) <= this.#expires) return;
      this.#send("/app/heartbeat", "", { Authorization: fresh });
      this.#expires = expiry(fresh);
      const client = this.stompClient; // which shall come back with it
      if (client.connectHeaders) client.connectHeaders = { ...client.connectHeaders, Authorization: fresh };
    } catch (error) {
      this.#tell(() => this.#options.onError?.(error));
    }
  }

  #send(destination, body, headers = {}) {
    const client = this.stompClient;
    this.#attempt(() =>
      client.publish ? client.publish({ destination, headers, body }) : client.send(destination, headers, body),
    );
  }

  /** A client that cannot send has lost its connection. */
  #attempt(act) {
    try {
      act();
    } catch {
      this.disconnected();
    }
  }

  /** Call back. An error in there is reported as uncaught, and keeps nobody else from being told. */
  #tell(callback) {
    try {
      callback();
    } catch (error) {
      queueMicrotask(() => {
        throw error;
      });
    }
  }
}

function idsOf(given) {
  return new Set(typeof given === "string" ? [given] : given);
}

function isId(given) {
  return typeof given === "string" && ID.test(given);
}

/** Split a list into parts that the server takes. */
function* parts(ids) {
  let part = [];
  let chars = 0;
  for (const id of ids) {
    const size = String(id).length + 3; // quotes and comma
    if (part.length === MAX_IDS || chars + size > MAX_CHARS) {
      yield part;
      [part, chars] = [[], 0];
    }
    part.push(id);
    chars += size;
  }
  if (part.length) yield part;
}

/** When a JWT ends, ms since the epoch. 0: none is known; Infinity: it does not say. */
function expiry(token) {
  if (!token) return 0;
  try {
    const payload = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    return JSON.parse(atob(payload)).exp * 1000 || Infinity;
  } catch {
    return Infinity;
  }
}

/**
 * Call `tick` every `ms`; return what ends that. A page has a Worker count: browsers let the timers of hidden pages fire
 * once a minute, which is once a lease. Where Workers are missing or forbidden (CSP), and in Node, it is a plain timer.
 */
function every(ms, tick) {
  let end;
  const plain = () => {
    const timer = setInterval(tick, ms);
    timer.unref?.(); // in Node: a beat keeps no process alive
    end = () => clearInterval(timer);
  };
  if (typeof document === "undefined") plain();
  else {
    try {
      const url = URL.createObjectURL(new Blob([`setInterval(() => postMessage(0), ${Number(ms)})`]));
      const worker = new Worker(url);
      end = () => {
        worker.onerror = null;
        worker.terminate();
        URL.revokeObjectURL(url);
      };
      worker.onmessage = tick;
      worker.onerror = () => {
        end();
        plain();
      };
    } catch {
      plain();
    }
  }
  return () => end();
}
