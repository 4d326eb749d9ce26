/** Transforms an image file and waits for the result. */

import { readFile, writeFile } from "node:fs/promises";

import { run } from "./options.js";

const USAGE = `node examples/transform.js IN OUT [--prompt TEXT] [--strength S] [--steps N] [--seed N] [--timeout SECONDS]
  OUT ends with .png, .jpg or .webp`;
const FORMATS = /** @type {const} */ ({ png: "OUTPUT_FORMAT_PNG", jpg: "OUTPUT_FORMAT_JPEG", webp: "OUTPUT_FORMAT_WEBP" });

await run(USAGE, 2, ["prompt", "strength", "steps", "seed"], async (client, [source, output], values, timeout) => {
  const ending = /** @type {keyof typeof FORMATS} */ (output.split(".").at(-1));
  const result = await client.transform(
    {
      image: { data: await readFile(source) },
      prompt: values.prompt,
      strength: values.strength === undefined ? undefined : Number(values.strength),
      num_inference_steps: values.steps === undefined ? undefined : Number(values.steps),
      seed: values.seed,
      output: { format: FORMATS[ending] ?? "OUTPUT_FORMAT_PNG" },
    },
    { timeout },
  );
  const [image] = result.images;
  await writeFile(output, image.data ?? "");
  console.log(`${output}: ${image.width} x ${image.height}, seed ${image.seed}, ${result.model_id} on ${result.engine}`);
  console.log(`${Math.round(result.timings.total_ms)} ms on the server, request ${result.request_id}`);
});
