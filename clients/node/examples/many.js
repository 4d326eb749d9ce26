/** Transforms an image COUNT times with seeds from 0, balanced over the servers given by --target. */

import { readFile } from "node:fs/promises";

import { run } from "./options.js";

const USAGE = "node examples/many.js IN COUNT --target IP:PORT [--target IP:PORT ...]";

await run(USAGE, 2, ["steps"], async (client, [source, count], { steps }, timeout) => {
  const data = await readFile(source);
  const request = { image: { data }, num_inference_steps: steps === undefined ? undefined : Number(steps) };
  const calls = Array.from({ length: Number(count) }, (_, seed) => client.transform({ ...request, seed }, { timeout }));
  const results = await Promise.all(calls);
  console.log(`${results.length} images, seeds ${results.map((result) => result.images[0].seed).join(" ")}`);
});
