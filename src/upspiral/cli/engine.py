"""`upspiral engine`: the environments of inference servers."""

from __future__ import annotations

from typing import Literal


def install(name: Literal["vllm"], /) -> None:
    """Make the environment of an inference server in the cache, once (about 3.4 GB).

    It is vLLM's build for CPUs. For GPUs, make an environment as vLLM's documentation says and name its interpreter in
    engine.server.python.

    Parameters
    ----------
    name
        The server.
    """
    from upspiral.engine.vllm.environment import install as install_vllm

    assert name == "vllm", "the parser knows no other"
    print(install_vllm())


def list_engines() -> None:
    """List the inference servers that can be started on this machine."""
    from upspiral.engine.vllm.environment import is_installed, vllm_python

    state = str(vllm_python()) if is_installed() else "not installed: `upspiral engine install vllm`"
    print(f"embedded  in this process\nvllm      {state}\nsglang    servers that run elsewhere (engine.server.urls)")
