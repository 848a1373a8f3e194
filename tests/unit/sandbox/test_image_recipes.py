"""Recipes and what is built of them: keys, steps that are done once, and failures that name the step."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures.folder_backend import FolderBackend
from upspiral.errors import ConfigError, ImageError
from upspiral.sandbox.base import Allow
from upspiral.sandbox.images import BuildMachine, Image, ImageBuilder, ImageStore, Recipe, load_recipe
from upspiral.sandbox.images import builder as builder_module
from upspiral.sandbox.images.recipe import MIRRORS, steps_before_files

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


@pytest.fixture
def backend(store: ImageStore, tmp_path: Path) -> FolderBackend:
    (tmp_path / "sandboxes").mkdir()
    return FolderBackend(store, tmp_path / "sandboxes")


@pytest.fixture
def base(tmp_path: Path) -> str:
    (tmp_path / "base" / "etc").mkdir(parents=True)
    (tmp_path / "base" / "etc" / "name").write_text("base")
    (tmp_path / "base" / "tree" / "in").mkdir(parents=True)
    (tmp_path / "base" / "tree" / "in" / "file").write_text("x")
    return f"folder:{tmp_path / 'base'}"


def parse(text: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return load_recipe(path)


def test_every_key_is_read(tmp_path: Path) -> None:
    recipe = parse(
        'name = "x"\nbase = "debian:bookworm"\napt = ["git"]\npip = ["pytest==8.4.2"]\nnpm = ["left-pad"]\n'
        'workdir = "/srv"\ncommands = ["true"]\nhosts = ["example.org"]\ntimeout_s = 5\nmemory_mb = 64\ndisk_mb = 1\n'
        '[env]\nA = "b"\n[files]\n"/etc/x" = "x"\n',
        tmp_path,
    )
    assert set(recipe.model_fields_set) == set(Recipe.model_fields)
    assert (recipe.env, recipe.files, recipe.workdir) == ({"A": "b"}, {"/etc/x": "x"}, "/srv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "x"', "the key base is missing"),
        ('name = "x"\nbase = "y"\naptt = []', "there is no key aptt; did you mean apt?"),
        ('name = "x"\nbase = "y"\nzzz = 1', "there is no key zzz; there are name, base, apt"),
        ('name = "X Y"\nbase = "y"', 'name = "X Y": String should match'),
        ('name = "x"\nbase = "y"\napt = "git"', 'apt = "git": '),
        ('name = "x"\nbase = "y"\napt = ["-y"]', "'-y' is no package"),
        ('name = "x"\nbase = "y"\npip = ["a b"]', "'a b' is no package"),
        ('name = "x"\nbase = "y"\n[files]\n"etc/x" = "x"', "files.etc/x = \"etc/x\": 'etc/x' is no absolute path"),
        ('name = "x"\nbase = "y"\n[files]\n"/../x" = "x"', "is no absolute path"),
        ('name = "x"\nbase = "y"\nworkdir = "/"', "is no absolute path"),
        ('name = "x"\nbase = "y"\n[env]\n"A=B" = "x"', "'A=B' is no name of a variable"),
        ('name = "x"\nbase = "y"\ntimeout_s = 0', "timeout_s = 0: "),
        ('name = "x"\nbase = "y"\ntimeout_s = inf', "timeout_s = Infinity: "),
        ('name = "x"\nbase = "y"\nhosts = ["*"]', "allowed host '*': "),
        ("name = ", "cannot be read"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_given(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "recipe.toml") in str(caught.value)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe at .*; recipes/images/ has some"):
        load_recipe(tmp_path / "gone.toml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes" / "images").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_that_we_ship_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    for local in recipe.files.values():
        assert (path.parent / local).exists()


def test_packages_are_arguments_and_no_shell_code() -> None:
    recipe = Recipe(name="x", base="y", apt=("a;reboot",), pip=("b>=1,<2", "c[x]"), npm=("@d/e@^1",))
    apt, pip, npm = (step.script for step in steps_before_files(recipe))
    assert "--no-install-recommends 'a;reboot';" in apt
    assert pip.endswith("'b>=1,<2' 'c[x]'")
    assert npm.endswith("'@d/e@^1'")


def build(
    store: ImageStore, backend: FolderBackend, recipe: Recipe, at: Path = Path("/"), **options
) -> tuple[Image, list[str]]:
    said: list[str] = []
    builder = ImageBuilder(store, backend.as_backend(), progress=said.append, **options)
    return asyncio.run(builder.build(recipe, at)), said


def shown(store: ImageStore, image: Image, tmp_path: Path) -> Mapping[str, str]:
    """The files of an image, with contents."""
    with store.hold() as hold:
        files = store.lowers([store.flatten(image.layers, hold).digest])[0]
        return {str(path.relative_to(files)): path.read_text() for path in sorted(files.rglob("*")) if path.is_file()}


def test_steps_stand_on_one_another(store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "a").write_text("from here")
    recipe = Recipe(
        name="x", base=base, env={"WHO": "me"}, workdir="/srv", files={"/srv/local": "local", "/one": "local/a"},
        commands=(
            "cat etc/name one > made; rm etc/name",
            "echo $WHO >> made; rm -r tree; mkdir tree; echo new > tree/new",
            "mkdir -p tmp run; echo x > tmp/x; echo x > run/x; echo x > etc/resolv.conf",
        ),
    )  # fmt: skip
    image, _ = build(store, backend, recipe, tmp_path)
    assert shown(store, image, tmp_path) == {
        "made": "basefrom hereme\n", "one": "from here", "srv/local/a": "from here", "tree/new": "new\n",
    }  # fmt: skip
    assert (image.name, image.content.workdir, image.content.env, len(image.layers)) == ("x", "/srv", {"WHO": "me"}, 5)
    assert store.image("x") == image
    assert os.listdir(store.folder / "work") == os.listdir(store.folder / "holds") == []


def test_a_working_directory_is_there(store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path) -> None:
    for workdir, layers in (("/srv/new", 2), ("/tree", 1), ("/work", 2)):
        image, _ = build(store, backend, Recipe(name="x", base=base, workdir=workdir))
        assert (image.content.workdir, len(image.layers)) == (workdir, layers)
        assert (store.lowers(image.layers)[0] / workdir.lstrip("/")).is_dir()
    image, _ = build(store, backend, Recipe(name="x", base=base))
    assert (image.content.workdir, len(image.layers)) == ("/work", 1)


def test_links_of_the_image_are_followed(store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path) -> None:
    (tmp_path / "base/link").symlink_to("tree")
    (tmp_path / "tool").write_text("t")
    recipe = Recipe(name="x", base=base, files={"/link/tool": "tool"}, workdir="/link/in")
    image, _ = build(store, backend, recipe, tmp_path)
    assert shown(store, image, tmp_path)["tree/tool"] == "t" and len(image.layers) == 2
    image, _ = build(store, backend, Recipe(name="x", base=base, workdir="/link/new"))
    assert (store.lowers(image.layers)[0] / "tree/new").is_dir() and image.content.workdir == "/link/new"


def test_what_is_left_out_may_be_linked_to(
    store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path
) -> None:
    """As installers link files from a cache."""
    command = "mkdir -p dev/cache etc; echo x > dev/cache/a; ln dev/cache/a etc/kept; echo y > etc/hosts"
    image, _ = build(store, backend, Recipe(name="x", base=base, commands=(command,)))
    assert shown(store, image, tmp_path) == {"etc/kept": "x\n", "etc/name": "base", "tree/in/file": "x"}


def test_a_step_is_done_once(store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path) -> None:
    recipe = Recipe(name="x", base=base, commands=("date +%N > time", "echo b > b", "echo c > c"))
    first, _ = build(store, backend, recipe)
    assert len(backend.specs) == 3
    again, said = build(store, backend, recipe)
    assert again.digest == first.digest and len(backend.specs) == 3
    assert said[1:] == ["commands.0: done before", "commands.1: done before", "commands.2: done before"]
    changed = recipe.model_copy(update={"commands": ("date +%N > time", "echo B > b", "echo c > c")})
    third, _ = build(store, backend, changed)
    assert len(backend.specs) == 5  # what stands on a changed step is done again
    assert third.layers[:2] == first.layers[:2]
    build(store, backend, recipe.model_copy(update={"env": {"A": "b"}}))
    assert len(backend.specs) == 8
    assert build(store, backend, recipe, cached=False)[0].digest != first.digest
    assert len(backend.specs) == 11


def test_a_change_of_the_base_or_of_a_file_is_seen(
    store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("one")
    recipe = Recipe(name="x", base=base, files={"/file": "file"}, commands=("cat file etc/name > made",))
    for place, content, made in [
        ("file", "two", "onebase"),
        ("base/etc/name", "new", "twobase"),
        ("file", "3", "twonew"),
    ]:
        image, _ = build(store, backend, recipe, tmp_path)
        assert shown(store, image, tmp_path)["made"] == made
        (tmp_path / place).write_text(content)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (Recipe(name="x", base="folder:/", commands=("true", "echo out; echo bad >&2; exit 3")),
         "image x: the step commands.1 ended with 3; it said: out\nbad"),
        (Recipe(name="x", base="folder:/", commands=("sleep 60",), timeout_s=0.2),
         r"the step commands.0 was stopped after 0\.2 s \(timeout_s\)"),
        (Recipe(name="x", base="folder:/", files={"/x": "gone"}), "files./x: there is no .*/gone"),
        (Recipe(name="x", base="gone"), "there is no image 'gone'"),
    ],
)  # fmt: skip
def test_a_failure_names_the_step_and_leaves_no_image(
    store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path, recipe: Recipe, said: str
) -> None:
    if recipe.base == "folder:/":
        recipe = recipe.model_copy(update={"base": base})
    with pytest.raises(ImageError, match=said):
        build(store, backend, recipe, tmp_path)
    assert list(store.images()) == []
    assert os.listdir(store.folder / "work") == os.listdir(store.folder / "holds") == []
    store.collect()
    assert os.listdir(store.folder / "layers") == []


def test_files_that_are_not_there_are_said_before_anything_is_run(
    store: ImageStore, backend: FolderBackend, base: str
) -> None:
    with pytest.raises(ImageError, match=r"files\./x: there is no"):
        build(store, backend, Recipe(name="x", base=base, apt=("git",), files={"/x": "gone"}))
    assert backend.specs == []


def test_a_failed_build_goes_on_where_it_failed(
    store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path
) -> None:
    recipe = Recipe(name="x", base=base, commands=("echo a > a", "test -e flag", "echo c > c"))
    with pytest.raises(ImageError):
        build(store, backend, recipe)
    build(store, backend, recipe.model_copy(update={"commands": ("echo a > a", "true", "echo c > c")}))
    assert len(backend.specs) == 4


def test_steps_reach_the_registries_and_what_the_recipe_says(
    store: ImageStore, backend: FolderBackend, base: str
) -> None:
    machine = BuildMachine(networks=("10.0.0.0/8",), env={"SSL": "x"}, mounts={"/etc/hosts": "/opt/ca"})
    recipe = Recipe(name="x", base=base, hosts=("example.org:443",), commands=('test "$SSL" = x',), disk_mb=7)
    image, _ = build(store, backend, recipe, machine=machine)
    (spec,) = backend.specs
    assert spec.network == Allow((*MIRRORS, "example.org:443"), ("10.0.0.0/8",))
    assert (spec.mounts, spec.limits.disk_mb, spec.limits.file_mb) == ({"/etc/hosts": "/opt/ca"}, 7, 7)
    assert "SSL" not in image.content.env
    assert build(store, backend, recipe)[0].digest == image.digest  # the machine is no part of the image
    assert len(backend.specs) == 1


def test_a_deep_image_is_flattened(
    store: ImageStore, backend: FolderBackend, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder_module, "MAX_LAYERS", 3)
    recipe = Recipe(name="x", base=base, commands=tuple(f"echo {number} > f{number}" for number in range(4)))
    image, _ = build(store, backend, recipe)
    assert len(image.layers) == 1
    assert shown(store, image, tmp_path)["f3"] == "3\n"
    again, said = build(store, backend, recipe)
    assert replace(again, made_s=0) == replace(image, made_s=0)
    assert len(backend.specs) == 4 and "commands.3: done before" in said
