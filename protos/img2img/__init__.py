"""The contract of img2img: messages and services generated from the .proto files beside this package."""
