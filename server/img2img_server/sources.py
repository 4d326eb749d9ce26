"""Where source pictures come from: a request's bytes, its asset, or an address that may be read."""

from img2img.v1 import image_to_image_pb2 as pb

from img2img_server import images
from img2img_server.assets import AssetStore
from img2img_server.config import SourceSettings
from img2img_server.errors import InvalidField, NotSupported


class Sources:
    """Reads source pictures. `limits` bound their size."""

    def __init__(self, settings: SourceSettings, assets: AssetStore, limits: images.ImageLimits) -> None:
        self._settings = settings
        self._assets = assets
        self._limits = limits

    def check(self, source: pb.ImageSource) -> None:
        """Raises InvalidField where it can be seen, without reading anything, that the source cannot be read."""
        kind = source.WhichOneof("source")
        if kind == "asset_id":
            raise NotSupported("image.asset_id: this server keeps no assets yet; send the picture as data")
        if kind is None:
            raise InvalidField("image", "a source picture is required")
        if kind == "uri" and not source.uri.startswith("data:"):
            raise InvalidField("image.uri", "only data: URIs are allowed on this server; or send the picture as data")

    async def read(self, source: pb.ImageSource) -> tuple[str, bytes]:
        """The file, and the name of the field that it came from. Raises InvalidField, AssetNotFound or StorageFailed."""
        if source.WhichOneof("source") == "uri":
            return "image.uri", images.decode_data_uri(source.uri, self._limits, "image.uri")
        return "image.data", source.data
