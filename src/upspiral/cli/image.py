"""`upspiral image`: make, list and remove the images that sandboxes begin with."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from upspiral.errors import ConfigError
from upspiral.sandbox.images import BuildMachine, Image, ImageBuilder, ImageStore, Recipe, load_recipe
from upspiral.sandbox.namespace import NamespaceBackend


def build(
    recipe: Path,
    /,
    *,
    fresh: bool = False,
    allow_network: tuple[str, ...] = (),
    certificates: Path | None = None,
) -> None:
    """Make the image of a recipe and print its digest. Steps that were done before are left out.

    Parameters
    ----------
    recipe
        A TOML file, such as recipes/images/python.toml.
    fresh
        Do every step again, so that newer versions of packages get in.
    allow_network
        A range such as 10.0.0.0/8 that package registries may lie in although it is not public.
    certificates
        A PEM file of certificates to believe beside those of the image, while it is made.
    """
    machine = BuildMachine.behind(allow_network, certificates)
    store = ImageStore()
    image = asyncio.run(_build(store, load_recipe(recipe), recipe.parent, machine, fresh))
    print(f"{image.name}  {image.digest}")


def list_images() -> None:
    """List the images by name, with the size of their layers and what they were made from."""
    store = ImageStore()
    table = Table("name", "digest", "MB", "layers", "made", "from", box=None, padding=(0, 2, 0, 0))
    for image in store.images():
        size = f"{_content_bytes(store, image) / 1e6:.0f}"
        table.add_row(image.name, image.digest[:12], size, str(len(image.layers)), _date(image), escape(image.source))
    Console().print(table)
    if not table.rows:
        _say("there are no images; `upspiral image build recipes/images/python.toml` makes one")


def show(name: str, /) -> None:
    """Show an image: its layers from the bottom up, and how many images and live sandboxes' owners stand on each.

    Parameters
    ----------
    name
        A name from `upspiral image list`, or a digest.
    """
    store = ImageStore()
    image = store.image(name)
    references = store.references()
    print(f"digest   {image.digest}\nmade     {_date(image)}, from {image.source}\nworkdir  {image.content.workdir}")
    for key, value in image.content.env.items():
        print(f"env      {key}={value}")
    for digest in image.layers:
        size = store.layer(digest).size
        about = f"{size.content_bytes / 1e6:.1f} MB, {size.files} files, {references[digest]} stand on it"
        print(f"layer    {digest}  {about}")


def remove(*names: str) -> None:
    """Forget images by name. `upspiral image gc` then frees what only they stood on.

    Parameters
    ----------
    names
        Names from `upspiral image list`.
    """
    if not names:
        raise ConfigError("which images? `upspiral image list` has their names")
    store = ImageStore()
    for name in names:
        store.remove_name(name)


def collect() -> None:
    """Remove layers that no image and no live sandbox stands on, and what killed processes have left."""
    collected = ImageStore().collect()
    print(
        f"removed {collected.layers} layers ({collected.content_bytes / 1e6:.1f} MB), {collected.images} images "
        f"without a name and {collected.unfinished} unfinished works"
    )


async def _build(store: ImageStore, recipe: Recipe, folder: Path, machine: BuildMachine, fresh: bool) -> Image:
    backend = NamespaceBackend(images=store)
    try:
        builder = ImageBuilder(store, backend, machine=machine, cached=not fresh, progress=_say)
        return await builder.build(recipe, folder)
    finally:
        await backend.stop()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _content_bytes(store: ImageStore, image: Image) -> int:
    return sum(store.layer(each).size.content_bytes for each in image.layers)


def _date(image: Image) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(image.made_s)) if image.made_s else "unknown"
