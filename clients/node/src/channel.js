/** How a server is reached: addresses, TLS, the token, which calls are tried again, and who gets the next one. */

import { readFileSync } from "node:fs";
import { isIPv4, isIPv6 } from "node:net";

import grpc from "@grpc/grpc-js";

/**
 * What opens a server that does not let everybody in. Every part is optional.
 *
 * @typedef {object} Access
 * @property {string} [token] sent with every call, as `authorization: Bearer TOKEN`
 * @property {string} [ca] the PEM file of who signed the server's certificate; means TLS. Default: the system's roots
 * @property {string} [certificate] the PEM file of what the client shows of itself
 * @property {string} [key] the PEM file of its private key
 * @property {boolean} [allowInsecureToken] send the token without TLS, also to another machine
 */

/** Bytes of the largest request, and of all that may be kept to be sent again. Answers are taken whatever their size. */
export const MAX_MESSAGE_BYTES = 64 * 2 ** 20;

const UNAVAILABLE_ONLY = {
  maxAttempts: 5,
  initialBackoff: "0.2s",
  maxBackoff: "10s",
  backoffMultiplier: 2,
  retryableStatusCodes: ["UNAVAILABLE"],
};

/**
 * gRPC's service config: calls take turns among the addresses, and those that change nothing, or whose second attempt does what
 * the first would have, are tried again where nobody answered. UnloadModel and DeleteAsset are tried once: a second attempt would
 * find the work done. RESOURCE_EXHAUSTED is not in it, as it is often final; retry.js asks the error.
 */
export const SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [
        { service: "img2img.v1.ImageToImageService" },
        { service: "img2img.v1.ModelService", method: "ListModels" },
        { service: "img2img.v1.ModelService", method: "GetModel" },
        { service: "img2img.v1.AssetService", method: "UploadAsset" },
        { service: "img2img.v1.AssetService", method: "GetAsset" },
      ],
      retryPolicy: UNAVAILABLE_ONLY,
    },
  ],
};

/**
 * What a gRPC client is made with.
 *
 * @param {string | string[]} server `host:port`, `https://host:port` for TLS, or a list of them, of IP addresses; a name stands
 *   for all of its addresses
 * @param {Access} access
 * @returns {{ target: string, credentials: import("@grpc/grpc-js").ChannelCredentials,
 *   options: import("@grpc/grpc-js").ClientOptions }}
 */
export function channelTo(server, access) {
  const servers = typeof server === "string" ? [server] : server;
  if (servers.length === 0) throw new TypeError("there is no server to call");
  const secure = servers.some((one) => one.startsWith("https://")) || !!(access.ca || access.certificate);
  if (secure && servers.some((one) => one.startsWith("http://"))) throw new TypeError("either all servers have TLS or none");
  if (!access.certificate !== !access.key) throw new TypeError("certificate and key belong together: give both or none");
  const hosts = servers.map((one) => one.replace(/^https?:\/\//, "").replace(/\/$/, ""));
  const local = hosts.every(isLocal);
  if (access.token && !secure && !local && !access.allowInsecureToken) {
    throw new TypeError(`a token for ${hosts[0]} would go over the network in plain text: use https://, or allowInsecureToken`);
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
      // gRPC keeps what it may have to send again. Its default, 1 MiB, is less than many a picture has: that would be tried once.
      "grpc.per_rpc_retry_buffer_size": MAX_MESSAGE_BYTES,
      "grpc.retry_buffer_size": 4 * MAX_MESSAGE_BYTES,
      // A machine that has gone without a word is noticed. Servers allow a ping every 10 seconds.
      "grpc.keepalive_time_ms": 20000,
      "grpc.keepalive_timeout_ms": 10000,
      "grpc.initial_reconnect_backoff_ms": 100,
      "grpc.max_reconnect_backoff_ms": 2000,
      // No proxy reaches this machine; gRPC would ask $http_proxy all the same.
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
  throw new TypeError("several servers are named by their IP addresses, all v4 or all v6; a name stands for all it has");
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
