"""KServe v2 (GRPCInferenceService, as Triton speaks it) over the services of img2img.v1. Imported only where `kserve` is set."""
