/** What the server says of a user (WIRE §5). */
export interface PresenceEvent {
  userId: string;
  online: boolean;
  /** When the status changed, RFC 3339; null: never seen. */
  timestamp: string | null;
  /** Orders the changes of a user; 0: never seen. */
  version: number;
  /** The present state, not a change. */
  snapshot?: true;
}

export interface Subscription {
  unsubscribe(): void;
}

/** `Client` of `@stomp/stompjs`, or anything like it. */
export interface PublishingClient {
  readonly connected: boolean;
  publish(frame: { destination: string; body?: string; headers?: Record<string, string> }): void;
  subscribe(destination: string, callback: (message: { body: string }) => void): Subscription;
}

/** A client of the legacy API: `stompjs` 2, or `Stomp.over(...)` of `@stomp/stompjs`. */
export interface SendingClient {
  readonly connected?: boolean;
  send(destination: string, headers?: Record<string, string>, body?: string): void;
  subscribe(destination: string, callback: (message: { body: string }) => void): Subscription;
}

export type StompClient = PublishingClient | SendingClient;

export interface PresenceManagerOptions {
  /**
   * Called with each change of a status: true (online), false (offline) or null (unknown, since the connection is gone).
   * `event` is what the server said; there is none with null.
   */
  onChange?: (userId: string, online: boolean | null, event?: PresenceEvent) => void;
  /** The server refused a list for this reason, or these are no ids and were not sent; they are not watched. */
  onRefused?: (userIds: string[], reason: string) => void;
  /** `token` failed; it is called again with the next beat. */
  onError?: (error: unknown) => void;
  /** Returns a fresh access token (JWT). Called in time before the one in use ends. */
  token?: () => string | Promise<string>;
  /** How long before its end a token is renewed, ms [60,000, and at least two beats]. */
  renewBefore?: number;
  /** Between two beats, ms [30,000]. Half of the server's lease at most. */
  heartbeatInterval?: number;
  /** After a reconnect the users are watched anew within this time, at random, ms [5,000]. */
  rejoinDelay?: number;
}

/** Tells who of the watched users is online, and keeps the own user online. */
export class PresenceManager {
  constructor(stompClient: StompClient, options?: PresenceManagerOptions);
  stompClient: StompClient;
  /** Go online, beat, and be told of the watched users, from now on or as soon as the client is connected. */
  start(stompClient?: StompClient): void;
  /** Go offline and be told nothing more. The connection stays, and so does the list for the next `start`. */
  stop(): void;
  /** Watch these users (an id, or several), also after a reconnect. For each the first callback is its present status. */
  subscribeToUsers(userIds: string | Iterable<string>): void;
  /** Watch these users no more. There is no callback for that. */
  unsubscribeFromUsers(userIds: string | Iterable<string>): void;
  /** The status of a user; null: unknown. */
  isOnline(userId: string): boolean | null;
  /** Legacy API: the error callback. All statuses are unknown until the next `start`. */
  disconnected(error?: unknown): void;
  /** Called with each change of a status; calls `onChange`. To override. */
  updateUserPresence(userId: string, online: boolean | null, event?: PresenceEvent): void;
}
