/** Retries calls that the server refused with a retry delay. gRPC itself retries calls that did not reach a server. */

import { setTimeout as wait } from "node:timers/promises";

import { Img2ImgError } from "./errors.js";

const MOST_ATTEMPTS = 5;
const LONGEST_WAIT = 60;
const SPREAD = 0.2;

/**
 * Calls until success, a permanent error, or until the next attempt would exceed the deadline.
 *
 * Waits for the server's RetryInfo plus a random time of up to 0.2 s, so that refused clients do not retry together. OUT_OF_MEMORY is
 * also RESOURCE_EXHAUSTED, but has no RetryInfo and is permanent.
 *
 * @template T
 * @param {() => Promise<T>} call
 * @param {{ deadline?: Date, signal?: AbortSignal }} options
 * @returns {Promise<T>}
 */
export async function retrying(call, { deadline, signal }) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call();
    } catch (error) {
      if (!(error instanceof Img2ImgError) || error.code !== "RESOURCE_EXHAUSTED" || error.retryAfter === undefined) throw error;
      const seconds = error.retryAfter + SPREAD * Math.random();
      const late = deadline !== undefined && Date.now() + seconds * 1000 >= deadline.getTime();
      if (attempt === MOST_ATTEMPTS || error.retryAfter > LONGEST_WAIT || late) throw error;
      await wait(seconds * 1000, undefined, { signal }).catch((cause) => {
        throw new Img2ImgError("CANCELLED", "cancelled while waiting for a retry", { requestId: error.requestId, cause });
      });
    }
  }
}
