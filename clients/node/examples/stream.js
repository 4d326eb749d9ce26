/** Transforms an image with progress, and writes previews beside the result. Ctrl-C and --stop-at cancel the request. */

import { readFile, writeFile } from "node:fs/promises";

import { run } from "./options.js";

const USAGE = `node examples/stream.js IN OUT.png [--prompt TEXT] [--steps N] [--preview-every N] [--stop-at STEP]`;

await run(USAGE, 2, ["prompt", "steps", "preview-every", "stop-at"], async (client, [source, output], values, timeout) => {
  const cancelled = new AbortController();
  process.once("SIGINT", () => cancelled.abort());
  const request = {
    image: { data: await readFile(source) },
    prompt: values.prompt,
    num_inference_steps: values.steps === undefined ? undefined : Number(values.steps),
    preview_interval: Number(values["preview-every"] ?? 0),
  };
  for await (const event of client.transformStream(request, { timeout, signal: cancelled.signal })) {
    if (event.queued) console.log(`queued behind ${event.queued.position}`);
    if (event.started) console.log(`started on ${event.started.engine}, seed ${event.started.seed}`);
    if (event.progress) {
      const { step, step_count: steps, preview } = event.progress;
      console.log(`step ${step} of ${steps}${preview ? ", with a preview" : ""}`);
      if (preview) await writeFile(output.replace(/\.png$/, `-step-${step}.jpg`), preview);
      if (step === Number(values["stop-at"])) cancelled.abort();
    }
    if (event.completed) {
      await writeFile(output, event.completed.images[0].data ?? "");
      console.log(`${output} after ${Math.round(event.completed.timings.total_ms)} ms`);
    }
  }
});
