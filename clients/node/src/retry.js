/** Retries calls that the server refused with a retry delay. gRPC itself retries calls that did not reach a server. */

import { setTimeout as wait } from "node:timers/promises";

import { Img2ImgError } from "./errors.js";

const MOST_ATTEMPTS = 5;
const LONGEST_WAIT = 60;
const SPREAD = 0.2;

/** The longest random wait in seconds after each attempt of a call that gRPC does not retry. */
export const BACKOFF = [0.2, 0.4, 0.8, 1.6];

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
export async function retrying(call, options) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call();
    } catch (error) {
      await waitAgain(error, attempt, options);
    }
  }
}

/**
 * Waits until the next attempt of a call. Throws `error` if it is permanent, was the last attempt's, or the wait would exceed the
 * deadline.
 *
 * @param {unknown} error
 * @param {number} attempt the number of attempts made
 * @param {{ deadline?: Date, signal?: AbortSignal }} options
 * @param {number[]} [backoff] the longest random wait after each attempt, for a call that is also retried if it ended UNAVAILABLE
 */
export async function waitAgain(error, attempt, { deadline, signal }, backoff) {
  if (!(error instanceof Img2ImgError)) throw error;
  const refused = error.code === "RESOURCE_EXHAUSTED" && error.retryAfter !== undefined;
  if (!refused && !(backoff && error.code === "UNAVAILABLE")) throw error;
  const asked = error.retryAfter ?? 0;
  const seconds = asked + (backoff?.[attempt - 1] ?? SPREAD) * Math.random();
  const late = deadline !== undefined && Date.now() + seconds * 1000 >= deadline.getTime();
  if (attempt === MOST_ATTEMPTS || asked > LONGEST_WAIT || late) throw error;
  await wait(seconds * 1000, undefined, { signal }).catch((cause) => {
    throw new Img2ImgError("CANCELLED", "cancelled while waiting for a retry", { requestId: error.requestId, cause });
  });
}
