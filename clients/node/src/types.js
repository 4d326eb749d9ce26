/** The messages of the contract as types. img2img/v1/*.proto documents the fields; a test compares the two. */

/**
 * @typedef {object} TransformRequest
 * @property {ModelReference} [model]
 * @property {string} [prompt]
 * @property {string} [negative_prompt]
 * @property {ImageSource} image
 * @property {number} [strength]
 * @property {number} [num_inference_steps]
 * @property {number} [guidance_scale]
 * @property {number | string} [seed] a string above 2^53
 * @property {number} [image_count]
 * @property {OutputOptions} [output]
 * @property {number} [width]
 * @property {number} [height]
 * @property {string} [scheduler]
 * @property {number} [preview_interval]
 * @property {Fit} [fit]
 * @property {ImageSource} [mask]
 * @property {number} [mask_blur]
 * @property {boolean} [mask_invert]
 * @property {boolean} [mask_paste]
 * @property {ImageSource[]} [reference_images]
 * @property {number} [true_cfg_scale]
 * @property {Lora[]} [loras]
 * @property {Fidelity} [fidelity]
 * @property {Control[]} [controls]
 * @property {ImagePrompt[]} [image_prompts]
 */

/**
 * At most one of its fields.
 *
 * @typedef {object} Fidelity
 * @property {FidelityLevel} [level]
 * @property {number} [min_psnr_db]
 * @property {number} [min_ssim]
 */

/** @typedef {"FIDELITY_LEVEL_UNSPECIFIED" | "FIDELITY_LEVEL_EXACT" | "FIDELITY_LEVEL_HIGH" | "FIDELITY_LEVEL_FAST"} FidelityLevel */

/**
 * @typedef {object} Lora
 * @property {string} id
 * @property {number} [scale]
 */

/**
 * @typedef {object} Control
 * @property {ModelReference} [model]
 * @property {ImageSource} image
 * @property {number} [scale]
 * @property {number} [start]
 * @property {number} [end]
 * @property {number} [control_mode]
 */

/**
 * @typedef {object} ImagePrompt
 * @property {string} adapter
 * @property {ImageSource[]} images
 * @property {number} [scale]
 */

/**
 * Exactly one of its fields.
 *
 * @typedef {object} Fit
 * @property {number} [longest_side]
 * @property {NativeArea} [native_area]
 */

/**
 * The area that the model was trained on; no fields.
 *
 * @typedef {object} NativeArea
 */

/**
 * @typedef {object} ModelReference
 * @property {string} [repo_id]
 * @property {string} [path]
 * @property {string} [variant]
 * @property {string} [revision]
 * @property {string[]} [allow_patterns]
 * @property {string[]} [ignore_patterns]
 */

/**
 * Exactly one of its fields.
 *
 * @typedef {object} ImageSource
 * @property {string} [uri]
 * @property {string} [asset_id]
 * @property {Uint8Array} [data]
 */

/**
 * @typedef {object} OutputOptions
 * @property {OutputFormat} [format]
 * @property {number} [quality]
 * @property {boolean} [as_asset]
 */

/** @typedef {"OUTPUT_FORMAT_UNSPECIFIED" | "OUTPUT_FORMAT_PNG" | "OUTPUT_FORMAT_JPEG" | "OUTPUT_FORMAT_WEBP"} OutputFormat */

/**
 * @typedef {object} TransformResponse
 * @property {ImageResult[]} images
 * @property {string} model_id
 * @property {string} model_revision
 * @property {string} engine
 * @property {Timings} timings
 * @property {Warning[]} warnings
 * @property {UsedSpeedup | null} speedup null if all steps were computed in full
 */

/**
 * @typedef {object} UsedSpeedup
 * @property {string} name
 * @property {number} times_faster
 * @property {number} min_psnr_db
 * @property {number} min_ssim
 */

/**
 * @typedef {object} Warning
 * @property {string} field
 * @property {string} description
 * @property {string} code
 */

/**
 * @typedef {object} ImageResult
 * @property {"data" | "asset_id"} content the field that is set
 * @property {Buffer} [data]
 * @property {string} [asset_id]
 * @property {OutputFormat} format
 * @property {number} width
 * @property {number} height
 * @property {string} seed
 */

/**
 * @typedef {object} Timings
 * @property {number} queue_ms
 * @property {number} encode_ms
 * @property {number} denoise_ms
 * @property {number} decode_ms
 * @property {number} total_ms
 */

/**
 * `event` is the name of the field that is set; undefined for an event of a newer server.
 *
 * @typedef {object} TransformStreamResponse
 * @property {"queued" | "started" | "progress" | "completed"} [event]
 * @property {Queued} [queued]
 * @property {Started} [started]
 * @property {Progress} [progress]
 * @property {TransformResponse} [completed]
 */

/**
 * @typedef {object} Queued
 * @property {number} position
 * @property {number} [eta_seconds]
 */

/**
 * @typedef {object} Started
 * @property {string} seed
 * @property {string} engine
 */

/**
 * @typedef {object} Progress
 * @property {number} step
 * @property {number} step_count
 * @property {Buffer} [preview]
 * @property {number} [eta_seconds]
 */

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {ModelReference | null} source
 * @property {string} family
 * @property {string} pipeline_class
 * @property {string} backend
 * @property {string} backend_reason
 * @property {string} engine
 * @property {string | number} state a number for an unknown state of a newer server
 * @property {number} size_multiple
 * @property {boolean} is_default
 * @property {string[]} schedulers
 * @property {EngineStatus[]} engines
 * @property {string} memory_bytes
 * @property {string} detail
 * @property {RequestField[]} fields
 * @property {Speedup[]} speedups
 * @property {string[]} controlnets
 * @property {string[]} image_adapters
 */

/**
 * @typedef {object} Speedup
 * @property {string} name
 * @property {number} times_faster
 * @property {number} min_psnr_db
 * @property {number} mean_psnr_db
 * @property {number} min_ssim
 * @property {number} mean_ssim
 * @property {number} min_inference_steps
 * @property {number} max_guidance_scale
 */

/**
 * `default` is the name of the field that is set, undefined if the default is not a fixed value.
 *
 * @typedef {object} RequestField
 * @property {string} name
 * @property {boolean} required
 * @property {"default_number" | "default_text" | "default_switch"} [default]
 * @property {number} [default_number]
 * @property {string} [default_text]
 * @property {boolean} [default_switch]
 * @property {number} [minimum]
 * @property {number} [maximum]
 * @property {boolean} exclusive_minimum
 * @property {number} max_count
 * @property {string} needs
 */

/**
 * @typedef {object} LoraFile
 * @property {string} id
 * @property {string} size_bytes
 */

/**
 * @typedef {object} EngineStatus
 * @property {string} name
 * @property {string | number} state a number for an unknown state of a newer server
 * @property {string} detail
 * @property {number} progress
 */

/**
 * @typedef {object} Asset
 * @property {string} id
 * @property {string} media_type
 * @property {string} size
 * @property {string} sha256
 * @property {{ seconds: string, nanos: number } | null} expire_time
 */

export {};
