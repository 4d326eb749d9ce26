/** Lists the server's models. */

import { run } from "./options.js";

await run("node examples/models.js [--target HOST:PORT]", 0, [], async (client, _names, _values, timeout) => {
  for (const model of await client.listModels({ timeout })) {
    const state = String(model.state).replace("MODEL_STATE_", "").toLowerCase();
    console.log([model.id, state, model.engine || "-", model.family, model.is_default ? "default" : ""].join("  ").trim());
  }
});
