"""KServe v2 (GRPCInferenceService, Triton's dialect) on top of the services of img2img.v1. Imported only if `kserve` is set."""
