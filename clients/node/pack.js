/** Puts the published .proto files into the package while `npm pack` makes it; `--clean` takes them out again. */

import { cpSync, readdirSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const from = `${here}../../protos/img2img/v1`;

rmSync(`${here}protos`, { recursive: true, force: true });
if (!process.argv.includes("--clean")) {
  for (const name of readdirSync(from).filter((one) => one.endsWith(".proto"))) {
    cpSync(`${from}/${name}`, `${here}protos/img2img/v1/${name}`);
  }
}
