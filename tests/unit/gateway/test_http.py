"""Serving inside a running loop."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from pathlib import Path

import aiohttp
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from upspiral.errors import ConfigError
from upspiral.gateway.http import check_address, serve_app


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


APP = Starlette(routes=[Route("/", hello)])


def test_a_free_port_and_a_clean_end() -> None:
    async def main() -> None:
        async with serve_app(APP) as url, aiohttp.ClientSession() as session:
            assert await (await session.get(url)).text() == "hello"
        port = int(url.rpartition(":")[2])
        async with serve_app(APP, port=port) as again:
            assert again == url

    asyncio.run(main())


def test_answers_do_not_wait_for_the_client_to_acknowledge_their_headers() -> None:
    async def main() -> None:
        took_s: list[float] = []
        async with serve_app(APP) as url, aiohttp.ClientSession() as session:
            for _ in range(11):
                began = time.perf_counter()
                await (await session.get(url)).text()
                took_s.append(time.perf_counter() - began)
        assert statistics.median(took_s) < 0.02, "Nagle's algorithm makes it 40 ms"

    asyncio.run(main())


def test_a_port_in_use_is_named() -> None:
    async def main() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use.*choose another port"):
                async with serve_app(APP, port=port):
                    pass
            with pytest.raises(ConfigError, match="is in use"):
                check_address("127.0.0.1", port)

    asyncio.run(main())


def test_addresses_that_do_not_exist() -> None:
    for host, port in [("203.0.113.1", 0), ("no.such.host.invalid", 0), ("127.0.0.1", 99999)]:
        with pytest.raises(ConfigError, match="cannot listen on"):
            check_address(host, port)


def test_a_unix_socket_even_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()

    async def main() -> None:
        async with serve_app(APP, unix_socket=path):
            connector = aiohttp.UnixConnector(str(path))
            async with aiohttp.ClientSession(connector=connector) as session:
                assert await (await session.get("http://gateway/")).text() == "hello"
        assert not path.exists()
        with pytest.raises(ConfigError, match="shorter than 108 bytes"):
            async with serve_app(APP, unix_socket=tmp_path / ("x" * 200)):
                pass

    asyncio.run(main())
