"""The process that builds one engine: `python -m img2img_server.runtime.tensorrt.build`, its job on standard input.

The job: `graph`, the ONNX file; `folder`, where the engine is to be; `options` of the TensorRT provider. Not yet run on a GPU.
"""

import os
import sys
from pathlib import Path

from img2img_server.errors import BundleError
from img2img_server.runtime.onnx.sessions import Open, SessionOptions, open_session
from img2img_server.runtime.tensorrt.build_process import read_job, tell_parent
from img2img_server.runtime.tensorrt.options import CONTEXT


def build(graph: Path, folder: Path, options: dict[str, str], open_graph: Open = open_session) -> None:
    """Builds the engine of `graph` into `folder`, which becomes this process's directory.

    Raises BundleError where TensorRT cannot, or takes a part of the graph only: then no context is written.
    """
    graph = graph.resolve()
    # The provider writes where it is, and refuses to be told another place.
    os.chdir(folder)
    open_graph(graph, SessionOptions("tensorrt", provider_options=tuple(options.items())))
    if not Path(CONTEXT).is_file():
        raise BundleError("TensorRT does not take the whole graph")


def main() -> int:
    """Builds what the job asks for. Returns 0, or 1 where that failed: then the parent was told why."""
    job = read_job()
    tell_parent(step="building", progress=0.0)
    try:
        build(Path(job["graph"]), Path(job["folder"]), job["options"])
    except BundleError as error:
        tell_parent(problem=str(error))
        return 1
    tell_parent(step="built", progress=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
