"""Starts vLLM's API server, and ends it and all that it started when its owner is gone."""

from __future__ import annotations

import os
import runpy
import shutil
import threading
import time

from group import end_group  # pyright: ignore[reportMissingImports]  (it is copied beside this file)

COPY = "UPSPIRAL_VLLM_COPY"
"""The folder that this file was copied to."""


def _end_with(owner: int) -> None:
    while os.getppid() == owner:
        time.sleep(1.0)
    if COPY in os.environ:  # the owner would have removed it
        shutil.rmtree(os.environ[COPY], ignore_errors=True)
    end_group(os.getpgrp())  # the owner started us as one


# vLLM starts its engine by running this file again under another name.
if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
