/** A client of one img2img server, or of several with the same models. */

import { createHash } from "node:crypto";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";

import grpc from "@grpc/grpc-js";

import { Batch } from "./batch.js";
import { channelTo } from "./channel.js";
import { Contract } from "./contract.js";
import { Img2ImgError, toError } from "./errors.js";
import { retrying } from "./retry.js";

/**
 * @typedef {import("./types.js").TransformRequest} TransformRequest
 * @typedef {import("./types.js").TransformResponse} TransformResponse
 * @typedef {import("./types.js").TransformStreamResponse} TransformStreamResponse
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./types.js").LoraFile} LoraFile
 * @typedef {import("./types.js").Asset} Asset
 */

/**
 * Options of one call. `timeout` is in seconds, for all attempts together; `signal` cancels the call; `requestId` is its id in the
 * server's log.
 *
 * @typedef {{ timeout?: number, signal?: AbortSignal, requestId?: string }} CallOptions
 */

const CHUNK = 256 * 2 ** 10;

/** Methods throw Img2ImgError if a call fails, and TypeError, before anything is sent, if a request does not match the contract. */
export class Client {
  /**
   * Connects at the first call.
   *
   * @param {string | string[]} server `host:port`, `https://host:port` for TLS, or several of them
   * @param {import("./channel.js").Access & { protos?: string }} [options] `protos` is a folder with img2img/v1/*.proto
   */
  constructor(server, options = {}) {
    const { target, credentials, options: channel } = channelTo(server, options);
    this.#contract = new Contract(options.protos);
    this.#token = options.token;
    const { ImageToImageService, ModelService, AssetService } = this.#contract.services;
    this.#images = /** @type {any} */ (new ImageToImageService(target, credentials, channel));
    // All services share one channel, its connections and its load balancing.
    const shared = { ...channel, channelOverride: this.#images.getChannel() };
    this.#models = /** @type {any} */ (new ModelService(target, credentials, shared));
    this.#assets = /** @type {any} */ (new AssetService(target, credentials, shared));
  }

  /** @type {Contract} */ #contract;
  /** @type {string | undefined} */ #token;
  /** @type {any} */ #images;
  /** @type {any} */ #models;
  /** @type {any} */ #assets;

  /**
   * Transforms an image and waits for the result. `request_id` is the id of the call in the server's log.
   *
   * @param {TransformRequest} request
   * @param {CallOptions} [options]
   * @returns {Promise<TransformResponse & { request_id: string }>}
   */
  async transform(request, options = {}) {
    this.#contract.check(request, "img2img.v1.TransformRequest");
    return this.#unary(this.#images, "Transform", request, options);
  }

  /**
   * Transforms an image and yields progress events. Leaving the loop cancels the request.
   *
   * @param {TransformRequest} request
   * @param {CallOptions} [options]
   * @returns {AsyncGenerator<TransformStreamResponse, void, void>}
   */
  async *transformStream(request, options = {}) {
    this.#contract.check(request, "img2img.v1.TransformRequest");
    const timed = this.#timed(options);
    yield* await retrying(() => this.#begin(this.#images, "TransformStream", { request }, timed), timed);
  }

  /**
   * Transforms many images in one call, and yields the outcome of each in order of completion. The server takes requests as it has
   * capacity for them.
   *
   * `requests` is read as results are taken, at most 32 requests ahead. A request that fails does not end the batch: its error is its
   * outcome. If the server stops or the connection breaks, requests without a result are sent again, up to five attempts. What
   * `requests` throws is thrown after the outcomes of the requests before it. Leaving the loop cancels the rest.
   *
   * @param {AsyncIterable<TransformRequest> | Iterable<TransformRequest>} requests
   * @param {CallOptions} [options] `timeout` is for the whole batch
   * @returns {AsyncGenerator<import("./batch.js").BatchResult, void, void>}
   */
  async *transformBatch(requests, options = {}) {
    const timed = this.#timed(options);
    const method = /** @type {any} */ (this.#contract.services.ImageToImageService.service).TransformBatch;
    const batch = new Batch(requests, (request) => {
      this.#contract.check(request, "img2img.v1.TransformRequest");
      return method.requestSerialize({ request });
    });
    /** @param {Buffer} packed */
    const same = (packed) => packed;
    /** @type {any} */
    let call;
    const begin = () =>
      (call = this.#images.makeBidiStreamRequest(method.path, same, method.responseDeserialize, this.#metadata(timed), timed));
    const forget = cancelling({ cancel: () => call?.cancel() }, timed.signal);
    try {
      yield* batch.results(begin, timed);
    } finally {
      forget();
    }
  }

  /** @param {CallOptions} [options] @returns {Promise<Model[]>} */
  async listModels(options = {}) {
    return (await this.#unary(this.#models, "ListModels", {}, options)).models;
  }

  /** @param {CallOptions} [options] @returns {Promise<LoraFile[]>} */
  async listLoras(options = {}) {
    return (await this.#unary(this.#models, "ListLoras", {}, options)).loras;
  }

  /** @param {string} id @param {CallOptions} [options] @returns {Promise<Model>} */
  async getModel(id, options = {}) {
    return (await this.#unary(this.#models, "GetModel", { id }, options)).model;
  }

  /**
   * Stores an image on the server, which verifies size and SHA-256.
   *
   * @param {Uint8Array} file the bytes of a PNG, JPEG, WebP, GIF, BMP or TIFF file
   * @param {CallOptions} [options]
   * @returns {Promise<Asset>}
   */
  async upload(file, options = {}) {
    const info = { size: file.length, sha256: createHash("sha256").update(file).digest("hex") };
    function* messages() {
      yield { info };
      for (let start = 0; start < file.length; start += CHUNK) yield { chunk: file.subarray(start, start + CHUNK) };
    }
    const timed = this.#timed(options);
    const { asset } = await retrying(() => this.#send("UploadAsset", messages(), timed), timed);
    return asset;
  }

  /**
   * Downloads a stored image and verifies its SHA-256.
   *
   * @param {string} id
   * @param {CallOptions} [options]
   * @returns {Promise<Buffer>}
   */
  async download(id, options = {}) {
    const timed = this.#timed(options);
    const chunks = [];
    let announced = "";
    for await (const message of await retrying(() => this.#begin(this.#assets, "GetAsset", { id }, timed), timed)) {
      if (message.content === "asset") announced = message.asset.sha256;
      else if (message.content === "chunk") chunks.push(message.chunk);
    }
    const file = Buffer.concat(chunks);
    if (createHash("sha256").update(file).digest("hex") !== announced) {
      throw new Img2ImgError("DATA_LOSS", "the downloaded file does not match its SHA-256");
    }
    return file;
  }

  /** @param {string} id @param {CallOptions} [options] */
  async deleteAsset(id, options = {}) {
    await this.#unary(this.#assets, "DeleteAsset", { id }, options);
  }

  /** Ends every call and closes the connections. */
  close() {
    this.#images.close();
  }

  /** @param {any} service @param {string} method @param {object} message @param {CallOptions} options @returns {Promise<any>} */
  #unary(service, method, message, options) {
    const timed = this.#timed(options);
    return retrying(
      () =>
        new Promise((resolve, reject) => {
          let requestId = "";
          /** @param {unknown} error @param {any} answer */
          const done = (error, answer) => {
            forget();
            if (error) reject(toError(error));
            else resolve({ ...answer, request_id: requestId });
          };
          const call = service[method](message, this.#metadata(timed), timed, done);
          call.on("metadata", (/** @type {any} */ metadata) => (requestId = String(metadata.get("x-request-id")[0] ?? "")));
          const forget = cancelling(call, timed.signal);
        }),
      timed,
    );
  }

  /**
   * A call with a stream of responses. Fails if the stream does not start; leaving the iteration cancels the call.
   *
   * @param {any} service
   * @param {string} method
   * @param {object} message
   * @param {Timed} timed
   * @returns {Promise<AsyncGenerator<any, void, void>>}
   */
  async #begin(service, method, message, timed) {
    const call = service[method](message, this.#metadata(timed), timed);
    const forget = cancelling(call, timed.signal);
    const iterator = call[Symbol.asyncIterator]();
    /** @returns {Promise<IteratorResult<any>>} */
    const next = () =>
      iterator.next().catch((/** @type {unknown} */ error) => {
        forget();
        throw toError(error);
      });
    const first = await next();
    async function* messages() {
      try {
        for (let each = first; !each.done; each = await next()) yield each.value;
      } finally {
        forget();
        // Ignores the cancellation error of gRPC.
        call.on("error", () => {});
        call.cancel();
      }
    }
    return messages();
  }

  /**
   * A call with a stream of requests.
   *
   * @param {string} method
   * @param {Iterable<object>} messages
   * @param {Timed} timed
   * @returns {Promise<any>}
   */
  async #send(method, messages, timed) {
    const answered = new AbortController();
    /** @type {any} */
    let call;
    const answer = new Promise((resolve, reject) => {
      call = this.#assets[method](this.#metadata(timed), timed, (/** @type {unknown} */ error, /** @type {any} */ message) => {
        answered.abort();
        if (error) reject(toError(error));
        else resolve(message);
      });
    });
    const forget = cancelling(call, timed.signal);
    try {
      // The response has the cause if sending ends early: the server may refuse before it has read everything.
      const sent = pipeline(Readable.from(messages), call, { signal: answered.signal }).catch(() => {});
      const [message] = await Promise.all([answer, sent]);
      return message;
    } finally {
      forget();
    }
  }

  /** @param {CallOptions} options @returns {Timed} */
  #timed({ timeout, signal, requestId }) {
    if (signal?.aborted) throw new Img2ImgError("CANCELLED", "cancelled before it was sent", { cause: signal.reason });
    return { deadline: timeout === undefined ? undefined : new Date(Date.now() + timeout * 1000), signal, requestId };
  }

  /** @param {Timed} timed */
  #metadata({ requestId }) {
    const metadata = new grpc.Metadata();
    if (this.#token) metadata.set("authorization", `Bearer ${this.#token}`);
    if (requestId) metadata.set("x-request-id", requestId);
    return metadata;
  }
}

/**
 * A call's options with an absolute deadline, which gRPC uses.
 *
 * @typedef {{ deadline?: Date, signal?: AbortSignal, requestId?: string }} Timed
 */

/** Cancels a call on a signal. Returns a function that removes the listener. @param {{ cancel(): void }} call @param {AbortSignal} [signal] */
function cancelling(call, signal) {
  const cancel = () => call.cancel();
  signal?.addEventListener("abort", cancel, { once: true });
  return () => signal?.removeEventListener("abort", cancel);
}
