"""The models of replicas, as a front sees them: the best state of each on any replica, and its changes."""

from contextlib import AsyncExitStack
from dataclasses import replace

import prompting
import pytest
from adapter_headers import shapes_of
from fake_replicas import CARD, IDLE, LOST, FakeReplicas, Rig, rig
from fakes import FakePipeline
from img2img_server.api.companions import CompanionLease
from img2img_server.backends.ray.messages import Card, Look, ModelQuery, ReplicaLeft, Unloaded
from img2img_server.bundle.image_adapters import ImageAdapterHeader, needs_of
from img2img_server.bundle.manifest import Source
from img2img_server.engine.request import Failed
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import (
    ModelMemoryFull,
    ModelNotFound,
    ModelUnavailable,
    NoReplica,
    PermissionDenied,
    ShuttingDown,
)
from img2img_server.models.registry import ModelState
from img2img_server.support.call import Call, answering


def cards(it: Rig, *states: ModelState) -> None:
    """Sets the replicas' states of the model from the next poll on."""
    bare = replace(CARD, runs_on="", size_multiple=1, schedulers=(), detail="not here")
    it.replicas.looks = {
        f"r{n}": Look(f"r{n}", IDLE, (CARD if state is ModelState.READY else replace(bare, state=state),), None)
        for n, state in enumerate(states)
    }


READY, LOADING, UNLOADED, FAILED = ModelState.READY, ModelState.LOADING, ModelState.UNLOADED, ModelState.FAILED


@pytest.mark.parametrize(
    ("states", "state", "detail"),
    [
        ((READY, READY), READY, ""),
        ((FAILED, UNLOADED, READY), READY, "in the memory of 1 of 3 replicas"),
        ((UNLOADED, LOADING), LOADING, "not here"),
        ((UNLOADED, FAILED), UNLOADED, "not here"),
        ((FAILED, FAILED), FAILED, "not here"),
    ],
)
async def test_model_state_is_the_best_one_of_all_replicas(
    states: tuple[ModelState, ...], state: ModelState, detail: str
) -> None:
    async with rig() as it:
        cards(it, *states)
        await it.roster.poll()
        model = it.roster.models.get("m")
        assert (model.state, model.detail) == (state, detail)
        assert it.serving == {"m": state is READY}
        if state is READY:
            assert model.pipeline is not None
            assert (model.pipeline.engine, model.pipeline.size_multiple) == ("fake:cpu", 8)
            assert model.pipeline.schedulers == FakePipeline.schedulers


async def test_front_waits_for_replicas_not_announced_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("img2img_server.backends.ray.roster.POLL_INTERVAL", 0.0)
    it = Rig(FakeReplicas(), QueueLimits())
    it.replicas.late = 3
    await it.roster.open(None)
    assert [model.id for model in it.roster.models] == ["m"]
    it.replicas.late = 10**6
    with pytest.raises(NoReplica):
        await it.roster.open(None)


async def test_models_follow_the_replicas_reports() -> None:
    async with rig() as it:
        it.replicas.looks["r1"] = Look("r1", IDLE, (CARD, replace(CARD, id="n")), None)
        await it.roster.poll()
        assert [model.id for model in it.roster.models] == ["m", "n"]
        del it.replicas.looks["r1"]
        await it.roster.poll()
        assert [model.id for model in it.roster.models] == ["m"]
        assert it.serving == {"m": True, "n": False}


async def test_models_of_a_slow_replica_stay() -> None:
    async with rig() as it:
        it.replicas.looks["r1"] = Look("r1", IDLE, (CARD, replace(CARD, id="n")), None)
        await it.roster.poll()
        it.replicas.slow = {"r1"}
        await it.roster.poll()
        assert [model.id for model in it.roster.models] == ["m", "n"]
        assert it.serving == {"m": True, "n": True}


async def test_a_model_on_no_replica_is_loaded_by_one() -> None:
    async with rig() as it:
        cards(it, UNLOADED, UNLOADED)
        await it.roster.poll()
        leaving, gone = Failed(ShuttingDown("draining")), ReplicaLeft("nobody is there")
        it.replicas.answers["bring"] = [LOST, leaving, CARD]
        it.replicas.answers["bring"] += [Failed(ModelMemoryFull("no room", 3.0)), LOST, leaving, gone, LOST, LOST, LOST]
        async with it.models.using(Source(path="m")) as model:
            assert model.state is READY
        async with it.models.using(Source(path="m")):
            assert len(it.replicas.asked) == 3, "it is known to be there"
        assert {asked.model for _, asked in it.replicas.asked} == {"m"}, "it is sent to where requests of it go"
        await it.roster.poll()
        for error in (ModelMemoryFull, NoReplica, ModelUnavailable):  # the last: each replica that tries dies
            with pytest.raises(error):
                async with it.models.using(Source(path="m")):
                    pass


async def test_front_refuses_known_errors_and_forwards_unknown_models() -> None:
    caller = Call("", "", models=("other*",))
    async with rig() as it:
        it.replicas.answers["bring"] = [Failed(ModelNotFound("there is none"))]
        with answering(caller):
            with pytest.raises(PermissionDenied):
                async with it.models.using(Source(path="m")):
                    pass
            assert it.replicas.asked == []
            with pytest.raises(ModelNotFound):
                async with it.models.using(Source(path="z")):
                    pass
        assert it.replicas.asked == [("bring", ModelQuery(caller, Source(path="z")))]


async def test_loading_and_unloading_reach_all_replicas() -> None:
    async with rig() as it:
        it.replicas.answers["load"] = [CARD, Failed(ModelNotFound("there is none"))]
        it.replicas.answers["all load"] = [[CARD, CARD]]
        reference = Source(repo_id="acme/m")
        assert (await it.models.load(reference)).state is READY
        assert [(method, asked.reference) for method, asked in it.replicas.asked] == [
            ("load", reference),
            ("load", Source(path="m")),
        ]
        with pytest.raises(ModelNotFound):
            await it.models.load(reference)
        it.replicas.answers["all unload"] = [[Unloaded(3), Unloaded(4)], [Failed(ModelNotFound("gone"))], []]
        assert await it.models.unload("m") == 7
        with pytest.raises(ModelNotFound, match="gone"):
            await it.models.unload("m")
        with pytest.raises(NoReplica):
            await it.models.unload("m")


async def test_a_front_finds_the_image_encoder_of_an_adapter_and_has_it_loaded() -> None:
    """By the widths on its card, before any replica has loaded it; afterwards the card also has the size of its squares."""
    model, encoder = prompting.model("m", FakePipeline()), prompting.image_encoder()
    async with rig() as it:
        known = tuple(Card.of(one) for one in (model, replace(encoder, pipeline=None)))
        it.replicas.looks = {"r0": Look("r0", IDLE, known, None)}
        await it.roster.poll()
        it.replicas.answers["bring"] = [Card.of(encoder)]
        adapter = ImageAdapterHeader("plain", needs_of(shapes_of("plain")))
        with answering(Call("", "")):
            async with AsyncExitStack() as lease:
                companions = CompanionLease(it.roster.models, it.models, it.roster.models.get("m"), lease)
                (found,) = await companions.encoders([adapter])
    assert found.id == encoder.id
    assert found.pipeline is not None
    assert found.pipeline.native_size == (prompting.SIDE, prompting.SIDE)
    assert [(method, asked.reference) for method, asked in it.replicas.asked] == [("bring", Source(path=encoder.id))]
