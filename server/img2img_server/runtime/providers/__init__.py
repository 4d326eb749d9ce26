"""CUDA and OpenVINO: their sessions, and runners that record calls or keep sessions of fixed shapes."""
