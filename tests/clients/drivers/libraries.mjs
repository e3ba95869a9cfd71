// The JavaScript libraries, each used as its own documentation shows, behind one small interface. For Node and pages.
// `told` takes connected(), refused(text) and closed(); what is returned has send, subscribe and leave.

function stompjs7({ token, told }, transport) {
  return async ({ Client }) => {
    const client = new Client({
      ...transport,
      connectHeaders: { Authorization: `Bearer ${token}` },
      reconnectDelay: 300,
      onConnect: () => told.connected(),
      onStompError: (frame) => told.refused(frame.headers.message),
      onWebSocketClose: () => told.closed(),
    });
    client.activate();
    return {
      send: (destination, body) => client.publish({ destination, body }),
      subscribe: (destination, callback) => client.subscribe(destination, (message) => callback(message.body)),
      leave: () => client.deactivate(),
    };
  };
}

// What stompjs 2 and webstomp-client have in common. A lost connection is for the application to make anew.
function legacy(client, { token, told }, send) {
  client.connect(
    { Authorization: `Bearer ${token}` },
    () => told.connected(),
    (error) => (error.headers ? told.refused(error.headers.message) : told.closed()),
  );
  return {
    send,
    subscribe: (destination, callback) => client.subscribe(destination, (frame) => callback(frame.body)),
    leave: () => new Promise((left) => client.disconnect(left)),
  };
}

export const libraries = {
  stompjs: async (given) => stompjs7(given, { brokerURL: given.url })(await import("@stomp/stompjs")),

  async sockjs(given) {
    const { default: SockJS } = await import("sockjs-client");
    const url = given.url.replace(/^ws/, "http");
    return stompjs7(given, { webSocketFactory: () => new SockJS(url) })(await import("@stomp/stompjs"));
  },

  async "rx-stomp"({ url, token, told }) {
    const { RxStomp, RxStompState } = await import("@stomp/rx-stomp");
    const client = new RxStomp();
    client.configure({ brokerURL: url, connectHeaders: { Authorization: `Bearer ${token}` }, reconnectDelay: 300 });
    client.connected$.subscribe(() => told.connected());
    client.stompErrors$.subscribe((frame) => told.refused(frame.headers.message));
    client.connectionState$.subscribe((state) => state === RxStompState.CLOSED && told.closed());
    client.activate();
    let watched; // it subscribes again by itself
    return {
      send: (destination, body) => client.publish({ destination, body }),
      subscribe: (destination, callback) =>
        (watched ??= client.watch({ destination }).subscribe((message) => callback(message.body))),
      leave: () => client.deactivate(),
    };
  },

  async "stompjs-2"(given) {
    const { default: Stomp } = await import("stompjs");
    const client = Stomp.overWS(given.url);
    return legacy(client, given, (destination, body) => client.send(destination, {}, body));
  },

  async webstomp(given) {
    const { default: webstomp } = await import("webstomp-client");
    const client = webstomp.client(given.url, { debug: false });
    return legacy(client, given, (destination, body) => client.send(destination, body));
  },
};
