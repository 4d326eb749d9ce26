/** Failed calls: what a google.rpc.Status says of them, which comes beside gRPC's own code and message. */

import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

/** The messages of googleapis' google/rpc/status.proto and error_details.proto that the server sends, field for field. */
const { nested: RPC } = {
  nested: {
    Status: fields({ code: ["int32", 1], message: ["string", 2], "repeated details": ["Any", 3] }),
    Any: fields({ type_url: ["string", 1], value: ["bytes", 2] }),
    ErrorInfo: fields({ reason: ["string", 1], domain: ["string", 2], "map metadata": ["string", 3] }),
    BadRequest: fields({ "repeated field_violations": ["FieldViolation", 1] }),
    FieldViolation: fields({ field: ["string", 1], description: ["string", 2] }),
    RetryInfo: fields({ retry_delay: ["Duration", 1] }),
    Duration: fields({ seconds: ["int64", 1], nanos: ["int32", 2] }),
  },
};
const MESSAGES = protobuf.Root.fromJSON({ nested: RPC });
const DOMAIN = "img2img";

/** A call that failed. Its message is the server's, written for whoever called. */
export class Img2ImgError extends Error {
  /**
   * @param {string} code gRPC's, such as "INVALID_ARGUMENT"
   * @param {string} message
   * @param {{ reason?: string, fields?: { field: string, description: string }[], retryAfter?: number, estimate?: number,
   *   requestId?: string, cause?: unknown }} details
   */
  constructor(code, message, details = {}) {
    super(message, { cause: details.cause });
    this.name = "Img2ImgError";
    /** gRPC's code by its name. */
    this.code = code;
    /** What happened, stable among releases, such as "QUEUE_FULL"; empty where it was not the server that failed the call. */
    this.reason = details.reason ?? "";
    /** What is wrong with the request, by the path of the field, such as "image.data". */
    this.fields = details.fields ?? [];
    /** Seconds until it may be tried again; undefined where the server does not say. */
    this.retryAfter = details.retryAfter;
    /** Seconds that the request would have taken, where its deadline could not be met. */
    this.estimate = details.estimate;
    /** The name of the call in the server's log. */
    this.requestId = details.requestId ?? "";
  }
}

/**
 * What gRPC failed with, as an Img2ImgError. Anything else is given back as it is.
 *
 * @param {unknown} error
 * @returns {unknown}
 */
export function toError(error) {
  const failed = /** @type {import("@grpc/grpc-js").ServiceError} */ (error);
  if (!(error instanceof Error) || typeof failed.code !== "number" || failed.metadata === undefined) return error;
  const code = grpc.status[failed.code];
  const [packed] = failed.metadata.get("grpc-status-details-bin");
  const [requestId] = failed.metadata.get("x-request-id");
  const found = { requestId: requestId?.toString(), ...(packed instanceof Buffer ? detailsOf(packed) : {}) };
  return new Img2ImgError(code, failed.details, { ...found, cause: error });
}

/** @param {Buffer} packed */
function detailsOf(packed) {
  /** @type {{ reason?: string, fields?: { field: string, description: string }[], retryAfter?: number, estimate?: number }} */
  const found = {};
  for (const { type_url, value } of decode("Status", packed).details) {
    const name = type_url.split("/").at(-1);
    if (name === "google.rpc.ErrorInfo") {
      const info = decode("ErrorInfo", value);
      if (info.domain !== DOMAIN) continue;
      found.reason = info.reason;
      if ("estimate_seconds" in info.metadata) found.estimate = Number(info.metadata.estimate_seconds);
    } else if (name === "google.rpc.BadRequest") {
      found.fields = decode("BadRequest", value).field_violations;
    } else if (name === "google.rpc.RetryInfo") {
      const delay = decode("RetryInfo", value).retry_delay;
      found.retryAfter = delay.seconds + delay.nanos / 1e9;
    }
  }
  return found;
}

/** @param {string} name @param {Uint8Array} data @returns {any} */
function decode(name, data) {
  const type = MESSAGES.lookupType(name);
  return type.toObject(type.decode(data), { defaults: true, arrays: true, objects: true, longs: Number });
}

/** @param {Record<string, [string, number]>} described */
function fields(described) {
  /** @type {Record<string, any>} */
  const made = {};
  for (const [label, [type, id]] of Object.entries(described)) {
    const [rule, name = rule] = label.split(" ");
    made[name] = { type, id, ...(rule === "map" ? { keyType: "string" } : rule === name ? {} : { rule }) };
  }
  return { fields: made };
}
