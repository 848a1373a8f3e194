"""A spec whose environment no process can have is refused where it is made."""

from __future__ import annotations

import re
from typing import Any

import pytest

from upspiral.sandbox.base import SandboxSpec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A=B", "secret"), ("", "secret"), ("A\0", "secret"), ("A\ud800", "secret"), ("A", "secret\0"),
        ("A", "secret\ud800"), ("A", b"secret"), ("A", None), ("A", 3), (3, "secret"), (None, "secret"),
    ],
)  # fmt: skip
def test_what_can_be_no_environment_is_named_without_its_value(name: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"env: {name!r} cannot be in an environment")) as refused:
        SandboxSpec(env={"FINE": "a=b", name: value})
    assert "secret" not in str(refused.value)


def test_bytes_that_are_no_text_can_be_in_an_environment() -> None:
    assert SandboxSpec(env={"A": "\udcff", "B": ""}).env == {"A": "\udcff", "B": ""}
