// Is to compile with --strict: what the types promise holds for the real client and for one of the legacy API.
import { Client } from "@stomp/stompjs";
import { PresenceManager, type PresenceEvent, type SendingClient } from "presence-manager";

const modern = new PresenceManager(new Client({ brokerURL: "ws://127.0.0.1/ws" }), {
  onChange: (userId: string, online: boolean | null, event?: PresenceEvent) => {
    const since: string | null | undefined = event?.timestamp;
    console.log(userId, online ?? "unknown", since);
  },
  onRefused: (userIds, reason) => console.log(userIds.join(), reason.length),
  token: async () => "token",
  heartbeatInterval: 30_000,
});
modern.start();
modern.subscribeToUsers(new Set(["bob"]));
const status: boolean | null = modern.isOnline("bob");
console.log(status);

interface Legacy extends SendingClient {
  connect(headers: object, connected: () => void, failed: (error: unknown) => void): void;
}
declare const legacy: Legacy;
class Mine extends PresenceManager {
  override updateUserPresence(userId: string, online: boolean | null): void {
    console.log(userId, online);
  }
}
const mine = new Mine(legacy);
legacy.connect({}, () => mine.start(), (error) => mine.disconnected(error));

// @ts-expect-error: no such option
new PresenceManager(legacy, { onchange: () => {} });
// @ts-expect-error: a user id is a string
modern.subscribeToUsers([1]);
// @ts-expect-error: it may be unknown
const certain: boolean = modern.isOnline("bob");
console.log(certain);
