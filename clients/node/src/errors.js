/** Errors of failed calls, from gRPC's code and message and the details in google.rpc.Status. */

import grpc from "@grpc/grpc-js";
import protobuf from "protobufjs";

/** The messages of googleapis' google/rpc/status.proto and error_details.proto that the server sends. */
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

/** A failed call, with the server's message. */
export class Img2ImgError extends Error {
  /**
   * @param {string} code gRPC's code, such as "INVALID_ARGUMENT"
   * @param {string} message
   * @param {{ reason?: string, fields?: { field: string, description: string }[], retryAfter?: number, estimate?: number,
   *   requestId?: string, cause?: unknown }} details
   */
  constructor(code, message, details = {}) {
    super(message, { cause: details.cause });
    this.name = "Img2ImgError";
    /** The name of gRPC's code. */
    this.code = code;
    /** The stable reason, such as "QUEUE_FULL"; empty if the error is not from the server. */
    this.reason = details.reason ?? "";
    /** The invalid fields of the request, by path, such as "image.data". */
    this.fields = details.fields ?? [];
    /** Seconds until a retry; undefined if the server sent none. */
    this.retryAfter = details.retryAfter;
    /** Estimated duration in seconds, if the deadline could not be met. */
    this.estimate = details.estimate;
    /** The id of the call in the server's log. */
    this.requestId = details.requestId ?? "";
  }
}

/**
 * Converts an error of gRPC to an Img2ImgError. Returns any other error unchanged.
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

/** The error in a serialized google.rpc.Status. @param {Buffer} packed */
export function fromStatus(packed) {
  const { code, message } = decode("Status", packed);
  return new Img2ImgError(grpc.status[code] ?? "UNKNOWN", message, detailsOf(packed));
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
