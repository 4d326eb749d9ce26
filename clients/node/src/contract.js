/** Loads the contract from its published .proto files, and validates requests. */

import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const FILES = ["image_to_image", "model", "asset"].map((name) => `img2img/v1/${name}.proto`);

/** The folders of the .proto files: in the package made by `npm pack`, and in the repository. */
const FOLDERS = ["../protos", "../../../protos"].map((path) => fileURLToPath(new URL(path, import.meta.url)));

/**
 * Names as in the .proto files, int64 as decimal strings (a seed has up to 63 bits, a JavaScript number 53), enums by name, and the
 * name of the field that is set in a oneof.
 */
const OPTIONS = { keepCase: true, longs: String, enums: String, arrays: true, defaults: true, oneofs: true };

/**
 * @typedef {{ field: { name: string, typeName: string, type: string }[] }} MessageType
 * @typedef {{ value: { name: string }[] }} EnumType
 */

/** The services of img2img.v1, and the types of their messages. */
export class Contract {
  /** @param {string} [folder] the folder with img2img/v1/*.proto. Default: the package's */
  constructor(folder) {
    const found = folder ?? FOLDERS.find((one) => existsSync(`${one}/${FILES[0]}`));
    if (found === undefined) throw new Error(`img2img/v1/*.proto not found in ${FOLDERS.join(" or ")}: pass its folder as { protos }`);
    this.types = loader.loadSync(FILES, { ...OPTIONS, includeDirs: [found] });
    const loaded = /** @type {any} */ (grpc.loadPackageDefinition(this.types));
    /** @type {Record<string, import("@grpc/grpc-js").ServiceClientConstructor>} */
    this.services = loaded.img2img.v1;
  }

  /**
   * Throws TypeError for an unknown field or enum name, which gRPC would silently ignore.
   *
   * @param {Record<string, any>} message
   * @param {string} type the full name of its type
   * @param {string} [path] its path in the request
   */
  check(message, type, path = "") {
    const known = /** @type {MessageType} */ (/** @type {any} */ (this.types[type]).type).field;
    for (const [name, value] of Object.entries(message)) {
      const field = known.find((one) => one.name === name);
      if (field === undefined) throw new TypeError(`${path}${name} is not a field of ${type}`);
      if (value === undefined || value === null) continue;
      if (field.type === "TYPE_MESSAGE") {
        const inner = this.#resolved(field.typeName, type);
        if (!Array.isArray(value)) this.check(value, inner, `${path}${name}.`);
        else value.forEach((one, index) => this.check(one, inner, `${path}${name}[${index}].`));
      }
      if (field.type === "TYPE_ENUM" && typeof value === "string") this.#checkName(value, field.typeName, type, path + name);
    }
  }

  /** @param {string} value @param {string} typeName @param {string} scope @param {string} where */
  #checkName(value, typeName, scope, where) {
    const type = this.#resolved(typeName, scope);
    const names = /** @type {EnumType} */ (/** @type {any} */ (this.types[type]).type).value.map((one) => one.name);
    if (!names.includes(value)) throw new TypeError(`${where} must be one of ${names.join(", ")}, not ${value}`);
  }

  /** @param {string} name as in a field: absolute, or relative to the message of the field @param {string} scope */
  #resolved(name, scope) {
    return name.startsWith(".") ? name.slice(1) : name in this.types ? name : `${scope.slice(0, scope.lastIndexOf("."))}.${name}`;
  }
}
