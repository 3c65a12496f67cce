"""Executing on a card, on one that Triton's interpreter stands for."""

import numpy as np
import pytest
import tokenmill.errors as errors
import torch
from tokenmill.runtime import Session
from tokenmill.runtime.artifact import Artifact, Target
from tokenmill.runtime.batch import Batch
from tokenmill.runtime.gpu import GpuExecutor
from tokenmill.runtime.gpu_target import choose_target
from tokenmill.runtime.sampling import Choices

from .interpreted import (
    DIRECTORY,
    VOCAB,
    AttendingModel,
    InterpretedDevice,
    TinyModel,
    write_artifact,
)


@pytest.fixture(scope="module", params=[False, True], ids=["kernels", "extern"])
def model(request):
    return TinyModel(extern=request.param)


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    path = write_artifact(tmp_path_factory.mktemp("gpu") / "m", model.plan, model.weights)
    return Artifact.open(path)


@pytest.fixture
def device():
    return InterpretedDevice()


@pytest.fixture
def executor(artifact, device):
    with GpuExecutor(artifact, device) as opened:
        yield opened


def batch_of(chunks, rows, seed=0):
    """Sequences of so many tokens from a position on, with random ids."""
    rng = np.random.default_rng(seed)
    parts = [
        (rng.integers(VOCAB, size=size).tolist(), first, [b])
        for b, (size, first) in enumerate(chunks)
    ]
    return Batch.of(parts, rows)


def check(executor, model, batch):
    got = executor.run(batch)
    want = model.logits(batch.ids, batch.positions)[batch.rows]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


BATCHES = {
    "one token": ([(1, 7)], [0]),
    "decode": ([(1, 5), (1, 9), (1, 0)], [0, 1, 2]),
    "a prompt": ([(7, 3)], [6]),
    "mixed": ([(1, 60), (10, 0)], [10, 0, 3]),
    "full": ([(12, 0)], [11, 2, 1, 0]),
    "no rows": ([(5, 0)], []),
    "an empty sequence": ([(0, 0), (2, 1)], [1]),
    "nothing": ([(0, 0)], []),
}


@pytest.mark.parametrize("name", BATCHES)
def test_logits_of_every_kind_of_batch_again_and_again(executor, model, device, name):
    for seed in range(3):
        check(executor, model, batch_of(*BATCHES[name], seed=seed))
    assert device.replays == 2 * (2 if executor.layout.externs else 1)


def test_tokens_are_chosen_on_the_card(executor, model, device):
    choices = Choices(
        temperature=np.array([0, 1, 2, 0], np.float32),
        top_k=np.array([0, 1, 0, 3], np.int32),
        top_p=np.array([1, 1, 1e-6, 0.5], np.float32),
        uniform=np.array([0.9, 0.9, 0.9, 0.1], np.float32),
    )
    for seed in range(3):
        batch = batch_of(*BATCHES["full"], seed=seed)
        likeliest = model.logits(batch.ids, batch.positions)[batch.rows].argmax(-1)
        assert executor.choose(batch, choices).tolist() == likeliest.tolist()
        check(executor, model, batch)
    one = batch_of(*BATCHES["one token"])
    free = Choices(*(array[:1] for array in choices))._replace(temperature=np.float32([50]))
    spread = {
        executor.choose(one, free._replace(uniform=np.float32([u]))).item() for u in (0, 0.5, 0.99)
    }
    assert len(spread) == 3
    assert executor.choose(batch_of([(3, 0)], []), Choices(*(a[:0] for a in choices))).size == 0


def test_buckets_take_turns(executor, model):
    order = ["one token", "full", "one token", "decode", "full", "no rows", "no rows", "one token"]
    for seed, name in enumerate(order):
        check(executor, model, batch_of(*BATCHES[name], seed=seed))


def test_the_smallest_bucket_is_launched(executor):
    for tokens, size in ((0, 1), (1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (12, 12)):
        assert executor._bucket(batch_of([(tokens, 0)], [])).tokens == size
    many = Batch.of([([1], 0, [0])] * 3, rows=[0])  # more sequences than buckets of two tokens have
    assert executor._bucket(many).sequences >= 3


def test_a_batch_beyond_the_capacity_is_refused(executor):
    with pytest.raises(errors.BadRequest, match="13 tokens"):
        executor.run(batch_of([(13, 0)], [0]))
    with pytest.raises(errors.BadRequest, match="5 rows"):
        executor.run(batch_of([(6, 0)], [0, 1, 2, 3, 4]))


def test_inputs_as_they_lie_on_the_card(executor):
    parts = [([4, 5], 64, [7, 3]), ([6], 0, [2])]
    executor.run(Batch.of(parts, rows=[2, 1]))
    memory = executor._memory["inputs"]
    found = {name: memory[name].view(torch.int32).tolist() for name in executor._inputs.sizes}
    assert found["counts"] == [3, 2, 2, 1]
    assert found["ids"][:3] == [4, 5, 6]
    assert found["positions"][:3] == [64, 65, 0]
    assert found["rows"][:2] == [2, 1]
    assert found["starts"][:3] == [0, 2, 3]
    assert found["block_table"][:8] == [7, 3, -1, -1, 2, 0, -1, -1]  # Batch fills up with 0
    assert all(memory.address(name) % 256 == 0 for name in executor._inputs.sizes)
    table = executor._view("block_table", Batch.of(parts, rows=[]))
    assert table.tolist() == [[7, 3, -1, -1], [2, 0, -1, -1]]


def test_the_host_waits_only_for_logits(executor, device):
    before = device.waits
    executor.run(batch_of([(5, 0)], []))
    assert device.waits == before
    executor.run(batch_of([(5, 5)], [4]))  # what was uploaded before must have arrived
    assert device.waits == before + 2


def test_steps_are_timed_one_by_one(executor, model):
    batch = batch_of(*BATCHES["mixed"])
    times = executor.time_steps(batch)
    assert len(times) == len(model.plan.steps)
    assert min(times) > 0
    check(executor, model, batch)


def test_close_gives_all_memory_back(artifact, device):
    executor = GpuExecutor(artifact, device)
    executor.run(batch_of([(1, 0)], [0]))
    assert device.free_bytes() < device.total
    executor.close()
    executor.close()
    assert device.free_bytes() == device.total
    with GpuExecutor(artifact, device):
        pass


def test_a_failing_card_is_reported_and_can_be_closed(artifact, device):
    with GpuExecutor(artifact, device) as executor:
        device.fails = True
        with pytest.raises(errors.KernelFailed, match="sm_90 stopped with code CUDA_ERROR_ILLEGAL"):
            executor.run(batch_of([(1, 0)], [0]))


# --- a session --------------------------------------------------------------------------------------


def test_a_session_generates_over_pages(attending, monkeypatch):
    model, artifact = attending
    monkeypatch.setattr("tokenmill.runtime.cuda.CudaDevice", InterpretedDevice)
    prompts = [list(range(1, 7)), [9, 3]]
    with Session(artifact, device="cuda", cache_tokens=128) as session:
        got = [g.tokens for g in session.generate(prompts, max_new_tokens=4)]
        np.testing.assert_allclose(
            session.logits(prompts[0]), model.logits(prompts[0]), rtol=2e-2, atol=2e-2
        )
    assert got == [model.greedy(prompt, 4) for prompt in prompts]


# --- memory -----------------------------------------------------------------------------------------


PAGE_BYTES = 64 * 2 * VOCAB * 2


@pytest.fixture(scope="module")
def attending(tmp_path_factory):
    model = AttendingModel()
    path = write_artifact(tmp_path_factory.mktemp("attending") / "m", model.plan, model.weights)
    return model, Artifact.open(path)


def test_a_cache_as_large_as_asked_for(attending):
    _, artifact = attending
    with GpuExecutor(artifact, InterpretedDevice(), cache_tokens=129) as executor:
        assert executor.pages == 3
        assert executor._memory["cache"]["cache"].numel() == 3 * PAGE_BYTES


def test_by_default_the_cache_takes_what_it_can_use_or_most_of_what_is_free(attending):
    model, artifact = attending
    with GpuExecutor(artifact, device := InterpretedDevice()) as executor:
        assert executor.pages == -(-2 * model.positions // 64)
        fixed = device.total - device.free_bytes() - executor.pages * PAGE_BYTES
    with GpuExecutor(artifact, InterpretedDevice(fixed + 15 * PAGE_BYTES)) as executor:
        assert executor.pages == 12
    with GpuExecutor(artifact, InterpretedDevice(fixed + 10 * PAGE_BYTES)) as executor:
        assert executor.pages == 10  # one sequence of the longest kind
    for short in (InterpretedDevice(fixed + 9 * PAGE_BYTES), InterpretedDevice(1000)):
        with pytest.raises(
            errors.GpuMemoryShort, match=r"Test card has 0\.00 GB free.*cache 0\.00"
        ):
            GpuExecutor(artifact, short)
        assert short.free_bytes() == short.total
    with pytest.raises(errors.GpuMemoryShort, match=r" 64\.00 GB are needed.*cache 64\.00"):
        GpuExecutor(artifact, InterpretedDevice(), cache_tokens=400_000_000)


def test_memory_that_others_took_meanwhile(attending, monkeypatch):
    device = InterpretedDevice()
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 40)
    monkeypatch.setattr(device, "alloc", raise_memory_error)
    with pytest.raises(errors.GpuMemoryShort):
        GpuExecutor(attending[1], device)


def raise_memory_error(nbytes):
    raise MemoryError


# --- which kernels ----------------------------------------------------------------------------------


class Targets:
    """An artifact's GPU targets: {name: (architecture, CUDA version)}, of some KiB of shared memory."""

    def __init__(self, made, shared=64):
        self.targets = tuple(Target(name, f"kernels/{name}") for name in made)
        self._made = made
        self._shared = shared << 10

    def json(self, file):
        name = file.split("/")[1]
        if name not in self._made:
            return {}
        architecture, cuda = self._made[name]
        facts = {"ptx_target": architecture, "cuda": cuda}
        binaries = {n: facts | {"shared_bytes": self._shared * (n == "b")} for n in "ab"}
        return {"version": 1, "target": name, "binaries": binaries}


ALL = {
    "cpu": None,
    "sm_80": ("sm_80", "12.8"),
    "sm_89": ("sm_89", "12.8"),
    "sm_90": ("sm_90a", "12.8"),
    "sm_100": ("sm_100a", "12.9"),
    "sm_120": ("sm_120a", "12.9"),
}


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (80, ("sm_80", "cubin")),
        (86, ("sm_80", "cubin")),
        (89, ("sm_89", "cubin")),
        (90, ("sm_90", "cubin")),
        (100, ("sm_100", "cubin")),
        (103, ("sm_89", "ptx")),
        (120, ("sm_120", "cubin")),
        (121, ("sm_89", "ptx")),
    ],
)
def test_a_card_gets_what_was_made_for_it_or_can_be_compiled_for_it(capability, chosen):
    card = InterpretedDevice(capability=capability)
    target, image = choose_target(Targets(ALL), card)
    assert (target.name, image) == chosen


@pytest.mark.parametrize(
    ("targets", "capability", "advised"),
    [
        (["sm_80"], 75, "sm_80"),
        (["sm_90"], 86, "sm_80"),
        (["sm_90", "cpu"], 100, "sm_100"),
        (["sm_90"], 89, "sm_89"),
        (["sm_100"], 103, "sm_89"),
        (["cpu"], 90, "sm_90"),
    ],
)
def test_a_card_without_kernels_is_named_with_the_target_it_needs(targets, capability, advised):
    made = {name: ALL[name] for name in targets}
    with pytest.raises(errors.ForeignTarget) as caught:
        choose_target(Targets(made), InterpretedDevice(capability=capability))
    assert f"compute capability {capability / 10}" in caught.value.message
    assert all(name in caught.value.message for name in targets)
    assert caught.value.advice.endswith(f"--target {advised}")


@pytest.mark.parametrize(("capability", "advised"), [(89, "sm_89"), (120, "sm_120"), (86, "cpu")])
def test_a_card_with_less_shared_memory_for_a_block_is_told_so(capability, advised):
    """Its capability alone would do: made for an A100, and met by a card for desktops."""
    card = InterpretedDevice(capability=capability, shared_bytes=99 << 10)
    made = {"sm_80": ALL["sm_80"]}
    assert choose_target(Targets(made, shared=99), card)[0].name == "sm_80"
    why = "99 KiB of shared memory for a block, which needs 160"
    with pytest.raises(errors.ForeignTarget, match=why) as caught:
        choose_target(Targets(made, shared=160), card)
    assert caught.value.advice.endswith(f"--target {advised}")


@pytest.mark.parametrize(
    ("made", "cuda", "chosen"),
    [
        (("sm_90a", "12.8"), (12, 4), ("sm_90", "cubin")),  # minor versions are compatible
        (("sm_90a", "12.8"), (13, 0), ("sm_90", "cubin")),
        (("sm_90a", "13.0"), (12, 9), None),
        (("sm_80", "12.8"), (12, 4), None),
        (("sm_80", "12.8"), (12, 8), ("sm_90", "ptx")),
    ],
)
def test_an_old_driver(made, cuda, chosen):
    card, artifact = InterpretedDevice(cuda=cuda), Targets({"sm_90": made})
    if chosen is None:
        with pytest.raises(errors.DriverTooOld, match=r"knows CUDA 12\.\d.* need 1[23]\.\d"):
            choose_target(artifact, card)
    else:
        target, image = choose_target(artifact, card)
        assert (target.name, image) == chosen


def test_of_a_cubin_any_driver_of_its_major_version_is_asked_for():
    card, artifact = InterpretedDevice(cuda=(12, 9)), Targets({"sm_90": ("sm_90a", "13.4")})
    with pytest.raises(errors.DriverTooOld, match=r"knows CUDA 12\.9, .* need 13\.0"):
        choose_target(artifact, card)


def test_ptx_is_loaded_where_the_cubins_are_for_another_card(tmp_path):
    model = TinyModel(extern=False)
    path = write_artifact(tmp_path / "m", model.plan, model.weights, architecture="sm_80")
    device = InterpretedDevice()
    with GpuExecutor(Artifact.open(path), device) as executor:
        check(executor, model, batch_of([(3, 0)], [2]))
    assert device.images == {"ptx"}


# --- damage -----------------------------------------------------------------------------------------


def _group_of(schedule, step):
    return schedule["groups"][schedule["buckets"][0]["steps"][step]]


SCHEDULES = {
    "no version": lambda s: s.pop("version"),
    "another target": lambda s: s.update(target="sm_80"),
    "an unknown binary": lambda s: _group_of(s, 0)[0].update(binary="other"),
    "an unknown argument": lambda s: _group_of(s, 0)[0]["args"].__setitem__(0, "y"),
    "an unknown count": lambda s: _group_of(s, 0)[0]["args"].__setitem__(-1, "count.all"),
    "scratch without end": lambda s: _group_of(s, 0)[0]["args"].__setitem__(0, "scratch:0"),
    "no such area": lambda s: _group_of(s, 0)[0]["args"].__setitem__(0, "heap:0"),
    "an argument too few": lambda s: _group_of(s, 0)[0]["args"].pop(),
    "an empty grid": lambda s: _group_of(s, 0)[0].update(grid=[1, 0, 1]),
    "a huge grid": lambda s: _group_of(s, 0)[0].update(grid=[1, 65536, 1]),
    "blocks by halves": lambda s: _group_of(s, 0)[0].update(per_sm=0.5),
    "a flat grid": lambda s: _group_of(s, 0)[0].update(grid=[1, 1]),
    "a group out of range": lambda s: s["buckets"][0]["steps"].__setitem__(0, 99),
    "torch for a kernel": lambda s: s["buckets"][0]["steps"].__setitem__(0, -1),
    "a step too few": lambda s: s["buckets"][1]["steps"].pop(),
    "buckets in disorder": lambda s: s["buckets"].reverse(),
    "no buckets": lambda s: s["buckets"].clear(),
    "no bucket for the capacity": lambda s: s["buckets"].pop(),
    "a short table": lambda s: s.update(table_pitch=3),
    "a misaligned count": lambda s: s["binaries"][-1]["params"].__setitem__(-1, ["*i32", True]),
    "nothing to choose tokens": lambda s: s["buckets"][0].pop("sample"),
    "the choice of a step": lambda s: s["buckets"][0]["steps"].__setitem__(
        0, s["buckets"][0]["sample"]
    ),
    "areas of no size": lambda s: s.pop("zero_bytes"),
}
BINARIES = {
    "no version": lambda b: b.clear(),
    "a binary that is not there": lambda b: b["binaries"].popitem(),
    "no threads": lambda b: next(iter(b["binaries"].values())).update(threads=0),
    "no symbol": lambda b: next(iter(b["binaries"].values())).pop("kernel"),
    "a strange version": lambda b: next(iter(b["binaries"].values())).update(cuda="new"),
}
DAMAGE = [("schedule.json", name) for name in SCHEDULES] + [("binaries.json", n) for n in BINARIES]


@pytest.mark.parametrize(("file", "name"), DAMAGE)
def test_damage_is_found_before_memory_is_taken(tmp_path, device, file, name):
    model = TinyModel(extern=False)
    damage = (SCHEDULES if file == "schedule.json" else BINARIES)[name]
    path = write_artifact(
        tmp_path / "m", model.plan, model.weights, edit=lambda files: damage(files[file])
    )
    with pytest.raises(errors.ArtifactDamaged, match=r"schedule\.json|binaries\.json") as caught:
        GpuExecutor(Artifact.open(path), device).run(batch_of([(1, 0)], [0]))
    assert caught.value.facts["file"].startswith(DIRECTORY)
    assert name == "a misaligned count" or not device.taken


@pytest.mark.parametrize("file", ["schedule.json", "binaries.json"])
def test_a_newer_schedule_is_refused(tmp_path, device, file):
    model = TinyModel(extern=False)
    path = write_artifact(
        tmp_path / "m", model.plan, model.weights, edit=lambda files: files[file].update(version=2)
    )
    with pytest.raises(errors.ArtifactTooNew, match=file):
        GpuExecutor(Artifact.open(path), device)


def test_a_missing_binary_and_a_missing_weight_are_named(tmp_path, device):
    model = TinyModel(extern=False)

    def rename(files):
        binary = files["schedule.json"]["binaries"][0]
        launches = [launch for group in files["schedule.json"]["groups"] for launch in group]
        for launch in launches:
            if launch["binary"] == binary["name"]:
                launch["binary"] = "lost"
        made = files["binaries.json"]["binaries"]
        made["lost"] = made[binary["name"]]
        binary["name"] = "lost"

    path = write_artifact(tmp_path / "m", model.plan, model.weights, edit=rename)
    with pytest.raises(errors.ArtifactDamaged, match=r"lost\.cubin: it is missing"):
        GpuExecutor(Artifact.open(path), device)

    other = TinyModel(extern=False)
    other.weights["shift"] = other.weights["shift"].bfloat16()
    path = write_artifact(tmp_path / "w", model.plan, other.weights)
    with pytest.raises(
        errors.ArtifactDamaged, match=r"plan\.cuda\.json: .*f32 \[40\] named 'shift'"
    ):
        GpuExecutor(Artifact.open(path), device)
    assert not device.taken
