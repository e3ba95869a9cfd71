// What a client is ordered to do, and tells (conftest.py describes both), over any of the libraries.
import { libraries } from "./libraries.mjs";

const QUEUE = "/user/queue/online-status";

export function driver(library, tell) {
  const clients = new Map();
  const orders = {
    async connect({ client: name, url, token }) {
      const saw = (what, more = {}) => tell({ client: name, saw: what, ...more });
      const client = { watched: clients.get(name)?.watched ?? [] };
      clients.set(name, client);
      const told = {
        // Also when it has come back: what is watched is watched anew, as an application does it.
        async connected() {
          await client.made;
          client.library.subscribe(QUEUE, (body) => saw("message", JSON.parse(body)));
          if (client.watched.length) orders.watch({ client: name, users: client.watched });
          saw("connected");
        },
        refused: (text) => saw("refused", { text }),
        closed: () => saw("closed"),
      };
      client.made = libraries[library]({ url, token, told }).then((made) => (client.library = made));
      await client.made;
    },
    watch({ client: name, users }) {
      const client = clients.get(name);
      client.watched = users;
      client.library.send("/app/presence.subscribe", JSON.stringify({ userIds: users }));
    },
    beat: ({ client: name }) => clients.get(name).library.send("/app/heartbeat", ""),
    async leave({ client: name }) {
      await clients.get(name).library.leave();
      tell({ client: name, saw: "left" });
    },
  };
  return (order) => orders[order.do](order);
}
