/** A client of an img2img server, or of several that have the same models. */

import { createHash } from "node:crypto";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";

import grpc from "@grpc/grpc-js";

import { channelTo } from "./channel.js";
import { Contract } from "./contract.js";
import { Img2ImgError, toError } from "./errors.js";
import { retrying } from "./retry.js";

/**
 * @typedef {import("./types.js").TransformRequest} TransformRequest
 * @typedef {import("./types.js").TransformResponse} TransformResponse
 * @typedef {import("./types.js").TransformStreamResponse} TransformStreamResponse
 * @typedef {import("./types.js").Model} Model
 * @typedef {import("./types.js").Asset} Asset
 */

/**
 * Of one call. `timeout` is in seconds, for all attempts together; `signal` cancels it; `requestId` is its name in the server's
 * log.
 *
 * @typedef {{ timeout?: number, signal?: AbortSignal, requestId?: string }} CallOptions
 */

const CHUNK = 256 * 2 ** 10;

/** Methods throw Img2ImgError for what fails, and TypeError, before anything is sent, for what is not of the contract. */
export class Client {
  /**
   * Connects at the first call.
   *
   * @param {string | string[]} server `host:port`, `https://host:port` for TLS, or several of them
   * @param {import("./channel.js").Access & { protos?: string }} [options] `protos` is a folder that has img2img/v1/*.proto
   */
  constructor(server, options = {}) {
    const { target, credentials, options: channel } = channelTo(server, options);
    this.#contract = new Contract(options.protos);
    this.#token = options.token;
    const { ImageToImageService, ModelService, AssetService } = this.#contract.services;
    this.#images = /** @type {any} */ (new ImageToImageService(target, credentials, channel));
    // One channel for all: so they share its connections, and take turns among the servers together.
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
   * Transforms a picture and waits for the result. `request_id` is the name of the call in the server's log.
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
   * Transforms a picture and tells how it goes. Leaving the loop cancels the request.
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

  /** @param {CallOptions} [options] @returns {Promise<Model[]>} */
  async listModels(options = {}) {
    return (await this.#unary(this.#models, "ListModels", {}, options)).models;
  }

  /** @param {string} id @param {CallOptions} [options] @returns {Promise<Model>} */
  async getModel(id, options = {}) {
    return (await this.#unary(this.#models, "GetModel", { id }, options)).model;
  }

  /**
   * Keeps a picture on the server. It checks size and SHA-256, and sees no half of a file.
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
   * A picture that the server keeps, checked against the SHA-256 that it announces.
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
      throw new Img2ImgError("DATA_LOSS", "the picture that came is not the one that was announced");
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
   * A call whose answer is a stream. Fails where that does not begin; who leaves the messages cancels the call.
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
        // What gRPC tells of the cancellation finds nobody any more.
        call.on("error", () => {});
        call.cancel();
      }
    }
    return messages();
  }

  /**
   * A call whose request is a stream.
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
      // Whatever ends the sending early is in the answer: the server may refuse before it has read everything.
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
 * A call's options on their way: gRPC takes its deadline from them.
 *
 * @typedef {{ deadline?: Date, signal?: AbortSignal, requestId?: string }} Timed
 */

/** Cancels a call when a signal says so. Gives what ends that. @param {{ cancel(): void }} call @param {AbortSignal} [signal] */
function cancelling(call, signal) {
  const cancel = () => call.cancel();
  signal?.addEventListener("abort", cancel, { once: true });
  return () => signal?.removeEventListener("abort", cancel);
}
