/** Uploads an image once, transforms it twice, and downloads the stored results. */

import { readFile, writeFile } from "node:fs/promises";

import { run } from "./options.js";

const USAGE = "node examples/assets.js IN OUT.png [--steps N]";

await run(USAGE, 2, ["steps"], async (client, [source, output], { steps }, timeout) => {
  const asset = await client.upload(await readFile(source), { timeout });
  console.log(`${asset.id}: ${asset.media_type}, ${asset.size} bytes`);
  for (const season of ["winter", "autumn"]) {
    const request = {
      image: { asset_id: asset.id },
      prompt: `the same lake in ${season}`,
      num_inference_steps: steps === undefined ? undefined : Number(steps),
      output: { as_asset: true },
    };
    const [image] = (await client.transform(request, { timeout })).images;
    const file = await client.download(image.asset_id ?? "", { timeout });
    await writeFile(output.replace(/\.png$/, `-${season}.png`), file);
    console.log(`${season}: ${image.asset_id}, ${file.length} bytes`);
  }
  await client.deleteAsset(asset.id, { timeout });
});
