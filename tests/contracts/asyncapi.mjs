// Parses the AsyncAPI document that is named, with all that it refers to. Prints what is wrong, one a line; else the
// addresses of its channels, as JSON.
import { Parser, fromFile } from "@asyncapi/parser";

const { document, diagnostics } = await fromFile(new Parser(), process.argv[2]).parse();
const wrong = diagnostics.filter(({ severity }) => severity <= 1); // errors and warnings; the rest is advice
for (const { code, path, message } of wrong) console.error(`${path.join(".")}: ${message} (${code})`);
if (!document || wrong.length) process.exit(1);
console.log(JSON.stringify(document.channels().all().map((channel) => channel.address())));
