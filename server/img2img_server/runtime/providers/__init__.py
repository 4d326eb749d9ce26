"""Sessions and runners of CUDA and OpenVINO: recorded calls, and sessions of fixed shapes."""
