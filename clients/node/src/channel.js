/** The channel to a server: addresses, TLS, token, load balancing and retries. */

import { readFileSync } from "node:fs";
import { isIPv4, isIPv6 } from "node:net";

import grpc from "@grpc/grpc-js";

/**
 * Credentials for a server. Every part is optional.
 *
 * @typedef {object} Access
 * @property {string} [token] sent with every call, as `authorization: Bearer TOKEN`
 * @property {string} [ca] the PEM file of the server's CA; enables TLS. Default: the system's roots
 * @property {string} [certificate] the PEM file of the client's certificate
 * @property {string} [key] the PEM file of the client's private key
 * @property {boolean} [allowInsecureToken] send the token without TLS to another machine
 */

/** Maximum bytes of a request, and of the buffer for retries. Responses have no limit. */
export const MAX_MESSAGE_BYTES = 64 * 2 ** 20;

const UNAVAILABLE_ONLY = {
  maxAttempts: 5,
  initialBackoff: "0.2s",
  maxBackoff: "10s",
  backoffMultiplier: 2,
  retryableStatusCodes: ["UNAVAILABLE"],
};

/**
 * gRPC's service config: round-robin load balancing, and retries of idempotent calls that ended UNAVAILABLE. UnloadModel and
 * DeleteAsset are not retried: a second attempt would find the work of the first done. RESOURCE_EXHAUSTED is not included, since it
 * may be permanent; retry.js handles it. Nor is TransformBatch, which batch.js continues.
 */
export const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    { name: [{ service: "img2img.v1.ImageToImageService", method: "TransformBatch" }] },
    {
      name: [
        { service: "img2img.v1.ImageToImageService" },
        { service: "img2img.v1.ModelService", method: "ListModels" },
        { service: "img2img.v1.ModelService", method: "GetModel" },
        { service: "img2img.v1.ModelService", method: "ListLoras" },
        { service: "img2img.v1.AssetService", method: "UploadAsset" },
        { service: "img2img.v1.AssetService", method: "GetAsset" },
      ],
      retryPolicy: UNAVAILABLE_ONLY,
    },
  ],
};

/**
 * The arguments for a gRPC client.
 *
 * @param {string | string[]} server `host:port`, `https://host:port` for TLS, or a list of IP addresses; a name means all of its
 *   addresses
 * @param {Access} access
 * @returns {{ target: string, credentials: import("@grpc/grpc-js").ChannelCredentials,
 *   options: import("@grpc/grpc-js").ClientOptions }}
 */
export function channelTo(server, access) {
  const servers = typeof server === "string" ? [server] : server;
  if (servers.length === 0) throw new TypeError("server is an empty list: pass the address of a server");
  const secure = servers.some((one) => one.startsWith("https://")) || !!(access.ca || access.certificate);
  if (secure && servers.some((one) => one.startsWith("http://"))) throw new TypeError("use https:// for all servers or for none");
  if (!access.certificate !== !access.key) throw new TypeError("certificate and key must be given together");
  const hosts = servers.map((one) => one.replace(/^https?:\/\//, "").replace(/\/$/, ""));
  const local = hosts.every(isLocal);
  if (access.token && !secure && !local && !access.allowInsecureToken) {
    throw new TypeError(`the token for ${hosts[0]} would be sent over the network in plaintext: use https://, or set allowInsecureToken`);
  }
  return {
    target: targetOf(hosts),
    credentials: secure
      ? grpc.credentials.createSsl(read(access.ca), read(access.key), read(access.certificate))
      : grpc.credentials.createInsecure(),
    options: {
      "grpc.service_config": JSON.stringify(SERVICE_CONFIG),
      "grpc.max_send_message_length": MAX_MESSAGE_BYTES,
      "grpc.max_receive_message_length": -1,
      // gRPC buffers requests for retries. Larger images than its default of 1 MiB would not be retried.
      "grpc.per_rpc_retry_buffer_size": MAX_MESSAGE_BYTES,
      "grpc.retry_buffer_size": 4 * MAX_MESSAGE_BYTES,
      // Detects a machine that is gone without closing its connections. Servers allow a ping every 10 seconds.
      "grpc.keepalive_time_ms": 20000,
      "grpc.keepalive_timeout_ms": 10000,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 2000,
      // No proxy for local addresses; gRPC would use $http_proxy.
      "grpc.enable_http_proxy": local ? 0 : 1,
    },
  };
}

/** @param {string[]} hosts */
function targetOf(hosts) {
  if (hosts.length === 1) return hosts[0];
  const names = hosts.map(nameOf);
  if (names.every(isIPv4)) return `ipv4:${hosts.join(",")}`;
  if (names.every(isIPv6)) return `ipv6:${hosts.join(",")}`;
  throw new TypeError("a list of servers must have IP addresses, all IPv4 or all IPv6; to use names, pass one name with several addresses");
}

/** @param {string} host */
function nameOf(host) {
  return host.replace(/:\d+$/, "").replace(/^\[|\]$/g, "");
}

/** @param {string} host */
function isLocal(host) {
  const name = nameOf(host);
  return host.startsWith("unix:") || name === "localhost" || name === "::1" || (isIPv4(name) && name.startsWith("127."));
}

/** @param {string | undefined} path */
function read(path) {
  return path === undefined ? null : readFileSync(path);
}
