/** The common flags of the examples: the server's address and credentials, named like in img2img's commands. */

import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";

import { Client, Img2ImgError } from "../src/index.js";

/** @type {Record<string, { type: "string" | "boolean", multiple?: boolean }>} */
const CONNECTION = {
  target: { type: "string", multiple: true },
  "token-file": { type: "string" },
  ca: { type: "string" },
  timeout: { type: "string" },
  help: { type: "boolean" },
};

/**
 * Runs an example: parses its arguments, connects, and prints an error if a call fails.
 *
 * @param {string} usage printed for --help and invalid arguments
 * @param {number} count the number of positional arguments
 * @param {string[]} flags its own flags, each with a value
 * @param {(client: Client, names: string[], values: Record<string, string | undefined>, timeout: number | undefined) =>
 *   Promise<void>} main
 */
export async function run(usage, count, flags, main) {
  const own = Object.fromEntries(flags.map((flag) => [flag, { type: /** @type {const} */ ("string") }]));
  let found;
  try {
    found = parseArgs({ options: { ...CONNECTION, ...own }, allowPositionals: true });
  } catch (error) {
    return exit(2, `${error instanceof Error ? error.message : error}\n${usage}`);
  }
  const values = /** @type {Record<string, any>} */ (found.values);
  if (values.help) return console.log(usage);
  if (found.positionals.length !== count) return exit(2, usage);
  const tokenFile = values["token-file"];
  const client = new Client(values.target ?? process.env.IMG2IMG_TARGET ?? "localhost:50051", {
    token: tokenFile === undefined ? process.env.IMG2IMG_TOKEN : readFileSync(tokenFile, "utf8").trim(),
    ca: values.ca ?? process.env.IMG2IMG_CA,
  });
  try {
    await main(client, found.positionals, values, values.timeout === undefined ? undefined : Number(values.timeout));
  } catch (error) {
    if (!(error instanceof Img2ImgError)) throw error;
    exit(1, describe(error));
  } finally {
    client.close();
  }
}

/** @param {Img2ImgError} error */
function describe(error) {
  return [
    `${error.code}${error.reason && ` (${error.reason})`}: ${error.message}`,
    ...error.fields.map(({ field, description }) => `  field ${field}: ${description}`),
    ...(error.retryAfter === undefined ? [] : [`  retry in ${error.retryAfter} s`]),
    ...(error.estimate === undefined ? [] : [`  it would take ${error.estimate} s`]),
    ...(error.requestId ? [`  request ${error.requestId}`] : []),
  ].join("\n");
}

/** @param {number} status @param {string} message */
function exit(status, message) {
  console.error(message);
  process.exitCode = status;
}
