// Drives pages in headless Chromium: chromium.mjs BROWSER FOLDER, an empty one, for the browser's profile. A client is a
// page, which runs driver.html or what "open" names, and has another origin than the server. Only Chromium's own protocol
// is used: a library that sets the focus, as Playwright does, keeps every page visible.
import { spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { WebSocket } from "ws";

const HERE = fileURLToPath(new URL("..", import.meta.url)); // pages and node_modules below it
const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript" };
const GRACE = 2; // s, or some more, until the timers of a hidden page fire once a minute; users have 10, or 300
const FLAGS = [
  "--headless", "--remote-debugging-port=0", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--mute-audio",
  "--host-resolver-rules=MAP app.example 127.0.0.1", "--window-size=700,360",
  `--enable-features=IntensiveWakeUpThrottling:grace_period_seconds/${GRACE}`,
];

const tell = (sight) => process.stdout.write(JSON.stringify(sight) + "\n");

const files = createServer((request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname));
  try {
    const body = readFileSync(join(HERE, path));
    // What a careful site says of itself: no Worker from a Blob.
    const policy = request.url.includes("csp") ? { "Content-Security-Policy": "worker-src 'none'" } : {};
    response.writeHead(200, { "Content-Type": TYPES[extname(path)] ?? "text/plain", ...policy }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((ready) => files.listen(0, "127.0.0.1", ready));
const { port } = files.address();

const [, , program, profile] = process.argv;
const browser = spawn(program, [...FLAGS, `--user-data-dir=${profile}`, "about:blank"], {
  stdio: ["ignore", "ignore", "pipe"],
});
const address = await new Promise((found) => {
  let said = "";
  browser.stderr.on("data", (text) => {
    said += text;
    const listening = /^DevTools listening on (\S+)/m.exec(said);
    if (listening) found(listening[1]);
  });
});

const devtools = new WebSocket(address, { maxPayload: 2 ** 28 });
await new Promise((opened) => (devtools.onopen = opened));
const answers = new Map();
const pages = new Map(); // client → session of its page
let calls = 0;
function call(method, params = {}, sessionId = undefined) {
  devtools.send(JSON.stringify({ id: ++calls, method, params, sessionId }));
  return new Promise((resolve, reject) => answers.set(calls, { resolve, reject, method }));
}
devtools.onmessage = ({ data }) => {
  const { id, result, error, method, params } = JSON.parse(data);
  if (method === "Runtime.bindingCalled") tell(JSON.parse(params.payload));
  if (method === "Runtime.exceptionThrown") tell({ saw: "exception", details: params.exceptionDetails });
  const { resolve, reject, method: called } = answers.get(id) ?? {};
  answers.delete(id);
  if (error) reject?.(new Error(`${called}: ${error.message}`));
  else resolve?.(result);
};

async function evaluate(client, expression) {
  const options = { expression, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails } = await call("Runtime.evaluate", options, pages.get(client));
  if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
  return result.value;
}

const orders = {
  // Each page is a tab of the one window; the last that was opened is in front, and hides the others.
  async open({ client, page = "drivers/driver.html", host = "127.0.0.1" }) {
    const { targetId } = await call("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await call("Target.attachToTarget", { targetId, flatten: true });
    pages.set(client, sessionId);
    await call("Runtime.enable", {}, sessionId);
    await call("Runtime.addBinding", { name: "tell" }, sessionId);
    await call("Page.enable", {}, sessionId);
    await call("Page.navigate", { url: `http://${host}:${port}/${page}` }, sessionId);
    while (!(await evaluate(client, "globalThis.ready === true").catch(() => false))) {
      await new Promise((again) => setTimeout(again, 20));
    }
  },
  async show({ client }) {
    await call("Page.bringToFront", {}, pages.get(client));
  },
  async read({ client, expression, label }) {
    tell({ client, saw: "read", label, value: await evaluate(client, expression) });
  },
  // A page behind another is not painted: it comes to the front.
  async picture({ client, file }) {
    await orders.show({ client });
    const { data } = await call("Page.captureScreenshot", {}, pages.get(client));
    writeFileSync(file, Buffer.from(data, "base64"));
    tell({ client, saw: "picture" });
  },
  // All else is for the client in the page.
  async other(order) {
    if (!pages.has(order.client)) await orders.open(order);
    await evaluate(order.client, `obey(${JSON.stringify(order)})`);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  await (orders[order.do] ?? orders.other)(order);
}
await call("Browser.close");
process.exit(0);
