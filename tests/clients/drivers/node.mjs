// Drives clients of one library in Node: node.mjs LIBRARY.
import { createInterface } from "node:readline";
import { WebSocket } from "ws";
import { driver } from "./orders.mjs";

globalThis.WebSocket ??= WebSocket; // Node has one of its own from 22 on
const obey = driver(process.argv[2], (sight) => process.stdout.write(JSON.stringify(sight) + "\n"));
for await (const line of createInterface({ input: process.stdin })) await obey(JSON.parse(line));
process.exit(0);
