"""An embedded engine adopts what a trainer elsewhere published, and nothing else."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.fixtures.completion import Completion
from tests.fixtures.publications import shared_root
from tests.fixtures.tiny_model import make_model
from tests.fixtures.tiny_modules import FAMILIES, VOCABULARY, tiny_module
from upspiral.config.models import AlgorithmConfig, EngineConfig, TrainerConfig
from upspiral.engine.embedded.engine import EmbeddedEngine
from upspiral.errors import EngineError, StaleBaseError
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.local import LocalTrainer
from upspiral.types import SamplingParams
from upspiral.weights.load import LoadedModel
from upspiral.weights.names import hugging_face_views
from upspiral.weights.publication import Publication, PublisherSettings
from upspiral.weights.publisher import Publisher

PROMPT = [5, 9, 100, 31, 7, 7, 2]


@pytest.fixture
def root() -> Iterator[Path]:
    with shared_root() as root:
        yield root


class Trainer:
    """A trainer elsewhere: weights of its own, which move a little with every publication."""

    def __init__(self, folder: Path, root: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> None:
        self.module: Any = tiny_module(family, dtype)
        self.root = root
        setup = TrainerSetup(folder, "float32", "cpu", TrainerConfig(), AlgorithmConfig(), temperature=1.0)
        self._backend = LocalTrainer.of(self.module, setup, lanes=1, exact=False)
        self._random = torch.Generator().manual_seed(7)

    def move(self, share: float = 0.1) -> None:
        with torch.no_grad():
            for parameter in self.module.parameters():
                chosen = torch.rand(parameter.shape, generator=self._random) < share
                parameter.add_(chosen * torch.randn(parameter.shape, generator=self._random) * 0.3)

    def publish(self, version: int, form: Literal["full", "delta"] = "full") -> Publication:
        return self._backend.publish(PublisherSettings(self.root, form), version)

    def distance(self, completion: Completion) -> float:
        """Largest difference of the log-probabilities of a completion of PROMPT to the trainer's weights of now."""
        with torch.no_grad():
            logits = self.module(torch.tensor([PROMPT + completion.ids])).logits[0, len(PROMPT) - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        return float((torch.tensor(completion.logprobs) - expected).abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def running(family: str = "llama", **changes: Any) -> AsyncIterator[EmbeddedEngine]:
    sizes = {"max_running": 8, "cache_slots": 12, "context_length": 512, "prefill_tokens": 64}
    model = LoadedModel.from_module(tiny_module(family, **changes))
    engine = EmbeddedEngine(model, EngineConfig.model_validate(sizes), seed=0)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def complete(engine: EmbeddedEngine, max_tokens: int = 20, into: Completion | None = None) -> Completion:
    into = into or Completion()
    async for chunk in engine.generate(PROMPT, SamplingParams(max_tokens=max_tokens)):
        into.ids += chunk.token_ids
        into.logprobs += chunk.logprobs
        into.versions += chunk.versions
    return into


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


@pytest.mark.parametrize("form", ["full", "delta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_trainer(family: str, form: Any, folder: Path, root: Path) -> None:
    trainer = Trainer(folder, root, family)

    async def main() -> None:
        async with running(family) as engine:
            assert trainer.distance(await complete(engine)) < 1e-4
            for version in (1, 2, 3, 4):
                trainer.move()
                assert trainer.distance(await complete(engine)) > 0.05
                publication = trainer.publish(version, form)
                assert (publication.base is None) == (form == "full" or version == 1)
                await engine.update_weights(publication)
                completion = await complete(engine)
                assert trainer.distance(completion) < 1e-4
                assert set(completion.versions) == {version}

    run(main())


def test_generations_under_way_go_on(folder: Path, root: Path) -> None:
    """Publishing does not hold them up; adopting loses no token and repeats none."""
    trainer = Trainer(folder, root)

    async def main() -> None:
        async with running() as engine:
            under_way = [Completion() for _ in range(4)]
            tasks = [asyncio.create_task(complete(engine, 400, into)) for into in under_way]
            for version in (1, 2, 3):
                async with asyncio.timeout(30):
                    while min(len(each.ids) for each in under_way) < 80 * version:
                        await asyncio.sleep(0.002)
                trainer.move()
                await engine.update_weights(await asyncio.to_thread(trainer.publish, version, "delta"))
                sampled = [len(each.ids) for each in under_way]
                assert engine.version == version
            await asyncio.gather(*tasks)
            for each, last in zip(under_way, sampled, strict=True):
                assert len(each.ids) == len(each.versions) == 400
                assert each.versions == sorted(each.versions)
                assert set(each.versions) == {0, 1, 2, 3}
                # What was on its way to us when the engine changed is old.
                assert set(each.versions[last + 2 :]) == {3}

    run(main())


def test_the_engine_samples_while_weights_are_written_and_read(folder: Path, root: Path) -> None:
    trainer, into = Trainer(folder, root), Completion()

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        """A tensor comes when ten tokens more were sampled."""
        for name, tensor in hugging_face_views(trainer.module).items():
            sampled, deadline = len(into.ids), time.monotonic() + 20
            while len(into.ids) < min(sampled + 10, 450) and time.monotonic() < deadline:
                time.sleep(0.001)
            yield name, tensor

    async def main() -> None:
        async with running() as engine:
            task = asyncio.create_task(complete(engine, 480, into))
            publish = Publisher(folder).publish
            publication = await asyncio.to_thread(publish, slowly(), 1, PublisherSettings(root))
            during = len(into.ids)
            assert during >= 250
            await engine.update_weights(publication)
            await task
            assert into.versions[: during - 2] == [0] * (during - 2)
            assert into.versions[-1] == 1

    run(main())


def test_without_the_base_it_says_so_and_goes_on_as_it_was(folder: Path, root: Path) -> None:
    trainer = Trainer(folder, root)
    trainer.publish(1, "delta")
    trainer.move()
    difference = trainer.publish(2, "delta")
    shutil.rmtree(root / "v000001")

    async def main() -> None:
        async with running() as engine:
            before = await complete(engine, 30)
            with pytest.raises(StaleBaseError, match=r"to version 1, which is not here.*; publish version 2 whole"):
                await engine.update_weights(difference)
            after = await complete(engine, 30)
            assert set(before.versions + after.versions) == {0}
            untouched = Trainer(folder, root)
            assert untouched.distance(after) < 1e-4
            await engine.update_weights(trainer.publish(2, "full"))
            assert trainer.distance(await complete(engine)) < 1e-4
            trainer.move()
            await engine.update_weights(trainer.publish(3, "delta"))
            assert trainer.distance(await complete(engine)) < 1e-4

    run(main())


@pytest.mark.parametrize("form", ["full", "delta"])
def test_damaged_weights_are_not_adopted(form: Any, folder: Path, root: Path) -> None:
    trainer = Trainer(folder, root)

    async def main() -> None:
        async with running() as engine:
            trainer.move()
            await engine.update_weights(trainer.publish(1, form))
            before = Trainer(folder, root)
            before.module.load_state_dict(trainer.module.state_dict())
            trainer.move()
            damaged = trainer.publish(2, form)
            path = damaged.folder / ("model.safetensors" if form == "full" else "changes.bin")
            content = bytearray(path.read_bytes())
            content[-100] ^= 4
            path.write_bytes(content)
            with pytest.raises(EngineError, match="is not what was written; publish version 2 whole") as raised:
                await engine.update_weights(damaged)
            assert isinstance(raised.value, StaleBaseError) == (form == "delta")
            completion = await complete(engine)
            assert set(completion.versions) == {1}
            assert before.distance(completion) < 1e-4
            await engine.update_weights(trainer.publish(2, "full"))
            assert trainer.distance(await complete(engine)) < 1e-4

    run(main())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_size": 32, "intermediate_size": 64}, r"embed_tokens.*here it is torch.float32 \[.*32\]"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* is not there"),
        ({"num_hidden_layers": 2}, r"layers\.2\..* is torch.float32 .*here it is unknown"),
        ({"tie_word_embeddings": False, "vocab_size": VOCABULARY + 1}, r"lm_head.weight|embed_tokens"),
    ],
)
def test_weights_of_another_model_are_not_adopted(changes: Any, found: str, folder: Path, root: Path) -> None:
    publication = Trainer(folder, root).publish(1)

    async def main() -> None:
        async with running(**changes) as engine:
            with pytest.raises(EngineError, match=found):
                await engine.update_weights(publication)
            assert set((await complete(engine)).versions) == {0}

    run(main())


def test_weights_in_another_precision_are_not_adopted(folder: Path, root: Path) -> None:
    publication = Trainer(folder, root, dtype=torch.bfloat16).publish(1)

    async def main() -> None:
        async with running() as engine:
            with pytest.raises(EngineError, match=r"torch.bfloat16.*here it is torch.float32.*model.dtype"):
                await engine.update_weights(publication)

    run(main())


def test_the_same_version_again_does_nothing(folder: Path, root: Path) -> None:
    trainer = Trainer(folder, root)
    trainer.move()
    publication = trainer.publish(1)

    async def main() -> None:
        async with running() as engine:
            await engine.update_weights(publication)
            shutil.rmtree(publication.folder)
            await engine.update_weights(publication)
            assert trainer.distance(await complete(engine)) < 1e-4

    run(main())
