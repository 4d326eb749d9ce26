/** Copies the published .proto files and the licence into the package for `npm pack`; `--clean` removes them. */

import { cpSync, readdirSync, rmSync } from "node:fs";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const root = `${here}../../`;
const from = `${root}protos/img2img/v1`;

rmSync(`${here}protos`, { recursive: true, force: true });
rmSync(`${here}LICENSE`, { force: true });
if (!process.argv.includes("--clean")) {
  for (const name of readdirSync(from).filter((one) => one.endsWith(".proto"))) {
    cpSync(`${from}/${name}`, `${here}protos/img2img/v1/${name}`);
  }
  cpSync(`${root}LICENSE`, `${here}LICENSE`);
}
