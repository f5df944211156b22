// One pass of an official TypeScript client over a node: list, call, denial,
// progress, cancellation. Prints one JSON document with what it saw.
//
//   client.mjs MODULES old|new URL
//   client.mjs MODULES old|new stdio COMMAND ARG…
//
// "old" is @modelcontextprotocol/sdk (sessions), "new" is
// @modelcontextprotocol/client (2026-07-28).
import { existsSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, generation, target, ...command] = process.argv.slice(2);
const require = createRequire(modules + "/x.cjs");
const load = (name) => import(pathToFileURL(require.resolve(name)));

let client, transport;
const info = { name: "test", version: "1" };
if (generation === "old") {
  const { Client } = await load("@modelcontextprotocol/sdk/client/index.js");
  client = new Client(info);
  if (target === "stdio") {
    const { StdioClientTransport } = await load("@modelcontextprotocol/sdk/client/stdio.js");
    transport = new StdioClientTransport({ command: command[0], args: command.slice(1) });
  } else {
    const { StreamableHTTPClientTransport } = await load("@modelcontextprotocol/sdk/client/streamableHttp.js");
    transport = new StreamableHTTPClientTransport(new URL(target));
  }
} else {
  const sdk = await load("@modelcontextprotocol/client");
  client = new sdk.Client(info, { versionNegotiation: { mode: { pin: "2026-07-28" } } });
  if (target === "stdio") {
    const { StdioClientTransport } = await load("@modelcontextprotocol/client/stdio");
    transport = new StdioClientTransport({ command: command[0], args: command.slice(1) });
  } else {
    transport = new sdk.StreamableHTTPClientTransport(new URL(target));
  }
}
// The two generations differ in whether callTool takes a result schema.
const call = (params, options) =>
  generation === "old" ? client.callTool(params, undefined, options) : client.callTool(params, options);

await client.connect(transport);
const seen = {};
seen.tools = (await client.listTools()).tools.map((t) => t.name);
seen.echo = await call({ name: "tool.echo", arguments: { a: [1, "é"] } });
seen.denied = await call({ name: "tool.exec.date", arguments: {} });
seen.image = (await call({ name: "test_image_content", arguments: {} })).content[0].mimeType;
seen.progress = [];
seen.done = await call(
  { name: "test_tool_with_progress", arguments: {} },
  { onprogress: (p) => seen.progress.push(p.progress) },
);
const abort = new AbortController();
const waiting = call({ name: "tool.mcp.up.wait", arguments: {} }, { signal: abort.signal });
waiting.catch(() => {}); // looked at below
const marker = process.env.NOTES + "/waiting";
while (!existsSync(marker)) await new Promise((r) => setTimeout(r, 5));
abort.abort(new Error("changed my mind"));
seen.cancelled = await waiting.then(() => "not", () => "cancelled");
const cancelled = process.env.NOTES + "/cancelled";
while (!existsSync(cancelled)) await new Promise((r) => setTimeout(r, 5));
seen.after = (await call({ name: "tool.echo", arguments: {} })).isError ?? false;
await client.close();
console.log(JSON.stringify(seen));
process.exit(0);
