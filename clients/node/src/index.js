/** The exports of the package. */

export { SERVICE_CONFIG } from "./channel.js";
export { Client } from "./client.js";
export { Img2ImgError } from "./errors.js";
