"""gRPC's side of the asset store."""

from typing import Any, NoReturn

from img2img.v1 import asset_pb2_grpc

from img2img_server.assets import AssetStore
from img2img_server.errors import NotSupported


class AssetService(asset_pb2_grpc.AssetServiceServicer):
    """UploadAsset, GetAsset and DeleteAsset."""

    def __init__(self, assets: AssetStore) -> None:
        self._assets = assets

    async def UploadAsset(self, request_iterator: object, context: Any) -> NoReturn:
        """Not supported yet."""
        raise NotSupported("this server keeps no assets yet")

    def GetAsset(self, request: object, context: Any) -> NoReturn:
        """Not supported yet."""
        raise NotSupported("this server keeps no assets yet")

    async def DeleteAsset(self, request: object, context: Any) -> NoReturn:
        """Not supported yet."""
        raise NotSupported("this server keeps no assets yet")
