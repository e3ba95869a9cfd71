// Drives unmodified @stomp/stompjs clients: one order a line on standard input, one sight a line on standard output, as
// JSON. An order is {"client": name, "do": verb, …}, a sight {"client": name, "saw": what, …}.
import { Client } from "@stomp/stompjs";
import { createInterface } from "node:readline";
import SockJS from "sockjs-client";
import { WebSocket } from "ws";

const clients = new Map();

function saw(client, what, more = {}) {
  process.stdout.write(JSON.stringify({ client, saw: what, ...more }) + "\n");
}

const orders = {
  // Log in, and again whenever the connection was lost. What is watched is watched anew, as an application does it.
  activate({ client: name, url, token, sockjs, watch = [], options = {} }) {
    const client = new Client({
      webSocketFactory: () =>
        sockjs ? new SockJS(url) : new WebSocket(url, client.stompVersions.protocolVersions()),
      connectHeaders: { Authorization: `Bearer ${token}` },
      reconnectDelay: 200,
      ...options,
      onConnect: (frame) => {
        saw(name, "connected", frame.headers);
        client.subscribe("/user/queue/online-status", (message) => saw(name, "message", JSON.parse(message.body)));
        client.watchForReceipt("watching", () => saw(name, "watching"));
        client.publish({
          destination: "/app/presence.subscribe",
          body: JSON.stringify({ userIds: watch }),
          headers: { receipt: "watching" },
        });
      },
      onStompError: (frame) => saw(name, "error", frame.headers),
      onWebSocketClose: (event) => saw(name, "closed", { code: event.code }),
      onHeartbeatReceived: () => saw(name, "beat"),
    });
    clients.set(name, client);
    client.activate();
  },
  send({ client: name, destination, body = "", receipt }) {
    const client = clients.get(name);
    if (receipt) client.watchForReceipt(receipt, () => saw(name, "receipt", { receipt }));
    client.publish({ destination, body, headers: receipt ? { receipt } : {} });
  },
  async deactivate({ client: name }) {
    await clients.get(name).deactivate();
    saw(name, "deactivated");
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  await orders[order.do](order);
}
process.exit(0);
