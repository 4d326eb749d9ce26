/** Trying again what the server has no room for now, when it says that there will be. What never reached it, gRPC tries again. */

import { setTimeout as wait } from "node:timers/promises";

import { Img2ImgError } from "./errors.js";

const MOST_ATTEMPTS = 5;
const LONGEST_WAIT = 60;
const SPREAD = 0.2;

/**
 * Calls until it does not fail, or fails in a way that will be the same again, or the next attempt would begin too late.
 *
 * The server's RetryInfo is the least that is waited; up to a fifth of a second, drawn anew, keeps those who were refused
 * together from coming back together. OUT_OF_MEMORY, too, is RESOURCE_EXHAUSTED, but has no RetryInfo: it is final.
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
        throw new Img2ImgError("CANCELLED", "cancelled while it waited to try again", { requestId: error.requestId, cause });
      });
    }
  }
}
