"""Forwards TCP connections: `python -m tests.support.forward FROM_PORT HOST PORT` listens on 127.0.0.1.

Headrace sends an API key over http only to a loopback address. A test whose simulated provider is on another machine
runs this program on each machine.
"""

import asyncio
import contextlib
import sys


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _forward(host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        there = await asyncio.open_connection(host, port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))


async def _serve(listen: int, host: str, port: int) -> None:
    server = await asyncio.start_server(
        lambda reader, writer: _forward(host, port, reader, writer), "127.0.0.1", listen
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
