/** Many requests through one call: Client.transformBatch. */

import { MAX_MESSAGE_BYTES } from "./channel.js";
import { Img2ImgError, fromStatus, toError } from "./errors.js";
import { BACKOFF, waitAgain } from "./retry.js";

/**
 * @typedef {import("./types.js").TransformRequest} TransformRequest
 * @typedef {import("./types.js").TransformResponse} TransformResponse
 */

/**
 * The outcome of a request of a batch: a result or an error. `index` is the position of the request in the batch, from 0. An `error` is
 * an Img2ImgError, or what was thrown for a request that does not match the contract, such as a TypeError.
 *
 * @typedef {{ index: number, result?: TransformResponse, error?: Error }} BatchResult
 */

/**
 * Most requests that are read and whose results the caller has not taken. They stay in memory. The server works on up to 16 requests
 * of a call at a time; the others are sent meanwhile.
 */
export const MOST_OPEN = 32;

/** The requests of a batch, sent and answered. If a call breaks, the next one sends the requests without a result again. */
export class Batch {
  /**
   * @param {AsyncIterable<TransformRequest> | Iterable<TransformRequest>} requests read as results are taken
   * @param {(request: TransformRequest) => Buffer} pack serializes a TransformBatchRequest; throws if it does not match the contract
   */
  constructor(requests, pack) {
    this.#input = each(requests);
    this.#pack = pack;
  }

  /** @type {AsyncGenerator<TransformRequest, void, void>} */ #input;
  /** @type {(request: TransformRequest) => Buffer} */ #pack;
  /** @type {Map<number, Buffer>} The requests without a result, by index and in its order. */ #open = new Map();
  /** @type {BatchResult[]} */ #ready = [];
  /** @type {{ error: unknown } | undefined} What reading the requests threw. */ #thrown;
  #count = 0;
  #reading = false;
  #ended = false;
  /** Sends to the call in progress what it lacks. */
  #send = () => {};
  /** Continues the caller's iteration. */
  #wake = () => {};

  /**
   * Yields the outcomes in order of completion.
   *
   * @param {() => any} begin starts a call
   * @param {{ deadline?: Date, signal?: AbortSignal }} options
   * @returns {AsyncGenerator<BatchResult, void, void>}
   */
  async *results(begin, options) {
    try {
      for (let attempt = 1; !this.#done; attempt++) {
        try {
          yield* this.#run(begin());
        } catch (error) {
          if (this.#done) break;
          await waitAgain(error, attempt, options, BACKOFF);
        }
      }
      if (this.#thrown) throw this.#thrown.error;
    } finally {
      this.#ended = true;
      // Not awaited: the input may be waiting for something else.
      this.#input.return().catch(() => {});
    }
  }

  /** Whether every request has its outcome, and the caller all of them. */
  get #done() {
    return this.#ended && this.#open.size + this.#ready.length === 0;
  }

  /** One call. Throws what it ended with, or what one of its requests ended with because the server stops. @param {any} call */
  async *#run(call) {
    /** @type {number[]} The index in the batch of each request of this call. */
    const order = [];
    let [next, closed, over] = [0, false, false];
    /** @type {unknown} */
    let failure;
    this.#send = () => {
      if (over || closed) return;
      for (const [index, message] of this.#open) {
        if (index < next) continue;
        next = index + 1;
        order.push(index);
        call.write(message);
      }
      closed = this.#ended;
      if (closed) call.end();
    };
    const receive = async () => {
      for await (const response of call) this.#take(order[Number(response.index)], response);
      if (!closed || this.#open.size > 0) {
        throw new Img2ImgError("INTERNAL", "the server ended the batch without a result for each request");
      }
    };
    receive()
      .catch((error) => (failure = toError(error)))
      .finally(() => {
        over = true;
        this.#wake();
      });
    try {
      this.#advance();
      while (true) {
        for (let outcome = this.#ready.shift(); outcome; outcome = this.#ready.shift()) {
          this.#advance();
          yield outcome;
        }
        if (failure) throw failure;
        if (over) return;
        await /** @type {Promise<void>} */ (new Promise((resolve) => (this.#wake = resolve)));
      }
    } finally {
      over = true;
      // Ignores the cancellation error of gRPC.
      call.on("error", () => {});
      call.cancel();
    }
  }

  /** @param {number} index @param {any} response a TransformBatchResponse */
  #take(index, response) {
    const error = response.outcome === "status" ? fromStatus(response.status) : undefined;
    if (error?.code === "UNAVAILABLE") throw error;
    if (!this.#open.delete(index)) return;
    this.#ready.push(error ? { index, error } : { index, result: response.response });
    this.#wake();
  }

  /** Sends what is read, and reads another request if there is room. */
  #advance() {
    this.#send();
    if (this.#reading || this.#ended || this.#open.size + this.#ready.length >= MOST_OPEN) return;
    this.#reading = true;
    this.#input
      .next()
      .then(({ done, value }) => {
        if (done) this.#ended = true;
        else if (!this.#ended) this.#add(value);
      })
      .catch((error) => {
        this.#ended = true;
        this.#thrown = { error };
      })
      .finally(() => {
        this.#reading = false;
        this.#advance();
        this.#wake();
      });
  }

  /** Adds a request. If it cannot be sent, that is its own outcome. @param {TransformRequest} request */
  #add(request) {
    const index = this.#count++;
    try {
      const message = this.#pack(request);
      if (message.length > MAX_MESSAGE_BYTES) {
        const text = `the request has ${message.length} bytes, and a message at most ${MAX_MESSAGE_BYTES}`;
        throw new Img2ImgError("RESOURCE_EXHAUSTED", text);
      }
      this.#open.set(index, message);
    } catch (error) {
      this.#ready.push({ index, error: error instanceof Error ? error : new Error(String(error)) });
    }
  }
}

/** @template T @param {AsyncIterable<T> | Iterable<T>} values @returns {AsyncGenerator<T, void, void>} */
async function* each(values) {
  yield* values;
}
