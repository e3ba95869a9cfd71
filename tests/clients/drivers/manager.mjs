// Drives PresenceManager on real clients in Node: manager.mjs stompjs, or stompjs-2, over one and the same interface.
import { createInterface } from "node:readline";
import { Client } from "@stomp/stompjs";
import { PresenceManager } from "presence-manager";
import "stompjs"; // gives the one below its timers in Node
import legacy from "stompjs/lib/stomp.js";
import { WebSocket } from "ws";

globalThis.WebSocket ??= WebSocket;
const managers = new Map();

const libraries = {
  stompjs({ url, token }, saw, options) {
    const client = new Client({
      brokerURL: url,
      connectHeaders: { Authorization: `Bearer ${token}` },
      reconnectDelay: 300,
      onConnect: () => saw("connected"),
      onStompError: (frame) => saw("error", { text: frame.headers.message }),
      onWebSocketClose: () => saw("closed"),
    });
    const manager = new PresenceManager(client, options);
    manager.start();
    client.activate();
    return manager;
  },
  // It never reconnects: its user does, and starts the manager with the new client.
  "stompjs-2"({ url, token }, saw, options) {
    let manager;
    const connect = () => {
      const client = legacy.Stomp.over(new WebSocket(url, ["v10.stomp", "v11.stomp"]));
      manager ??= new PresenceManager(client, options);
      client.ws.onerror = () => {}; // of `ws`: the close is told as well
      client.connect(
        { Authorization: `Bearer ${token}` },
        () => {
          saw("connected");
          manager.start(client);
        },
        (error) => {
          manager.disconnected(error);
          if (error.headers) return saw("error", { text: error.headers.message });
          saw("closed");
          setTimeout(connect, 300);
        },
      );
    };
    connect();
    return manager;
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { client, do: verb, ...order } = JSON.parse(line);
  const saw = (what, more = {}) => process.stdout.write(JSON.stringify({ client, saw: what, ...more }) + "\n");
  if (verb === "connect") {
    const options = {
      heartbeatInterval: order.beat ?? 30_000,
      rejoinDelay: 300,
      onChange: (userId, online, event) => saw("change", { userId, online, snapshot: event?.snapshot ?? false }),
      onRefused: (userIds, reason) => saw("refused", { userIds, reason }),
      ...(order.fresh && { token: async () => order.fresh }),
    };
    managers.set(client, libraries[process.argv[2]](order, saw, options));
  } else {
    managers.get(client)[verb](...(order.given ?? []));
  }
}
process.exit(0);
