"""Control of the process of hostile clients."""

import asyncio
import base64
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator

from soak_parts.access import Access
from soak_parts.ledger import Ledger
from soak_parts.process import ROOT

UNANSWERED = ("INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED")
"""Statuses that no attack may get: they indicate a bug or a hang."""
_END_SECONDS = 30.0
_READY_SECONDS = 300.0


class Strangers:
    """The running process of hostile clients."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.statuses: dict[str, dict[str, int]] = {}

    async def pause(self) -> None:
        """Returns when no client sends. Unread calls stay open."""
        self._send("pause")
        await self._heard("paused")

    def resume(self) -> None:
        """Continues the attacks."""
        self._send("resume")

    async def end(self, ledger: Ledger) -> None:
        """Ends the process and records forbidden answers."""
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.close()
        self.statuses = json.loads(await asyncio.wait_for(self._line(), _END_SECONDS))
        for kind, statuses in self.statuses.items():
            for status in UNANSWERED:
                if count := statuses.get(status):
                    ledger.violate(f"hostile clients, {kind}: {count} answers are {status}")

    def kill(self) -> None:
        """Kills the process if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _send(self, word: str) -> None:
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.write(f"{word}\n".encode())

    async def _line(self) -> str:
        assert self._process.stdout is not None, "a pipe"
        return (await self._process.stdout.readline()).decode().strip()

    async def _heard(self, word: str) -> None:
        line = await asyncio.wait_for(self._line(), _READY_SECONDS)
        if line != word:
            raise RuntimeError(f"the hostile clients' process answered '{line}' instead of '{word}'")


@contextlib.asynccontextmanager
async def strangers(target: str, access: Access, asset: str, kserve: bool, seed: int) -> AsyncIterator[Strangers]:
    """Hostile clients of all kinds, connected within the block. Raises RuntimeError if they cannot start."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "soak_parts.attacks"),
        cwd=ROOT / "benchmarks",
        env={**os.environ, "GRPC_VERBOSITY": "NONE"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    made = Strangers(process)
    try:
        made._send(
            json.dumps(
                {
                    "target": target,
                    "authority": base64.b64encode(access.authority).decode(),
                    "secrets": dict(access.secrets),
                    "asset": asset,
                    "kserve": kserve,
                    "seed": seed,
                }
            )
        )
        await made._heard("ready")
        yield made
    finally:
        made.kill()
        await process.wait()
