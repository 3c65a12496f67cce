"""A real card, where there is one; and what is said where there is none."""

import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import tokenmill
import tokenmill.errors as errors
import torch
from tokenmill.runtime import Artifact, Session, cuda
from tokenmill.runtime.batch import Batch
from tokenmill.runtime.cuda import CudaDevice, available
from tokenmill.runtime.gpu import GpuExecutor
from tokenmill.runtime.gpu_target import advised_target
from tokenmill.runtime.schedule import Binary, Launch

IDS = [5, 9, 33, 120, 7, 8, 250, 1, 2, 3, 77]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA")
def test_without_cuda_in_torch_one_is_told_what_to_install():
    assert not available()
    with pytest.raises(errors.NoGpu, match=r"torch .* is built without CUDA"):
        CudaDevice()


def test_without_a_driver_its_absence_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", _no_driver)
    with pytest.raises(errors.NoGpu, match="Found no NVIDIA driver on your system") as caught:
        CudaDevice()
    assert "nvidia-smi" in caught.value.advice


def _no_driver():
    raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check ...")


def test_without_cuda_core_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(errors.MissingExtra, match=r"cuda\.core") as caught:
        CudaDevice()
    assert "tokenmill[cuda]" in caught.value.advice


class Config:
    """cuda.core's, of a version that knows all of these."""

    programmatic_stream_serialization = False

    def __init__(self, **given):
        self.__dict__ |= given


class OldConfig:
    def __init__(self, grid, block, shmem_size):
        pass


@pytest.mark.parametrize("waits", [True, False])
def test_only_kernels_that_wait_begin_early(waits):
    launch = Launch(Binary("k.0", "k", (True,), 128, 0, (), waits), ("x",), (3, 1, 1))
    device = CudaDevice.__new__(CudaDevice)
    device._stream, device._sms, launched = "stream", 132, []
    device._core = SimpleNamespace(LaunchConfig=Config, launch=lambda *args: launched.append(args))
    device.launcher("kernel", launch, [16])()
    ((stream, config, *rest),) = launched
    assert [stream, *rest] == ["stream", "kernel", 16]
    assert (config.grid, config.block) == ((3, 1, 1), 128)
    assert config.programmatic_stream_serialization is waits
    device._core.LaunchConfig = OldConfig
    device.launcher("kernel", launch, [16])()
    assert len(launched) == 2


def test_the_stream_is_torchs(monkeypatch):
    """Pinned memory that torch frees waits for every stream that used it: none of them may be gone then."""
    torchs, streams = MagicMock(), MagicMock()
    torchs.cuda.Stream = lambda device: SimpleNamespace(cuda_stream=77)
    torchs.cuda.get_device_capability = lambda index: (9, 0)
    core = SimpleNamespace(Device=MagicMock(), Stream=streams)
    driver = MagicMock()
    driver.cuDriverGetVersion.return_value = (0, 13000)
    driver.cuDeviceGetAttribute.return_value = (0, 227 << 10)
    monkeypatch.setattr(cuda, "_import_torch", lambda: torchs)
    monkeypatch.setattr(cuda, "_import_core", lambda: (core, driver, RuntimeError))
    device = CudaDevice()
    streams.from_handle.assert_called_once_with(77)
    assert device._stream is streams.from_handle.return_value
    assert (device.capability, device.shared_bytes, device.cuda) == (90, 227 << 10, (13, 0))


# --- with a card ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card():
    if not available():
        pytest.skip("no GPU")
    return CudaDevice()


@pytest.fixture(scope="module")
def compiled(card, tiny_deepseek, tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("cuda") / "m"
    targets = [advised_target(card.capability), "cpu"]
    tokenmill.optimize(tiny_deepseek, path, recipe=tokenmill.Recipe(targets=targets))
    return Artifact.open(path)


def test_the_card_says_what_the_cpu_says(compiled):
    with Session(compiled, device="cpu") as cpu, Session(compiled, device="cuda") as gpu:
        want = torch.from_numpy(cpu.logits(IDS)).log_softmax(-1)
        for _ in range(3):  # launched, recorded, replayed
            got = torch.from_numpy(gpu.logits(IDS)).log_softmax(-1)
            distance = torch.nn.functional.kl_div(got, want, log_target=True, reduction="batchmean")
            assert distance < 1e-2
        prompts = [IDS, IDS[:2], IDS[3:]]
        together = gpu.generate(prompts, max_new_tokens=20)
        alone = [gpu.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
        assert [g.tokens for g in together] == [g.tokens for g in alone]


def test_replays_read_the_batch_of_the_moment(compiled, card):
    with GpuExecutor(compiled, card, cache_tokens=512) as executor:
        first = [executor.run(_batch(ids)).copy() for ids in (IDS, IDS[::-1], IDS[:5])]
        again = [executor.run(_batch(ids)).copy() for ids in (IDS, IDS[::-1], IDS[:5])]
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
        times = executor.time_steps(_batch(IDS))
    assert len(times) == executor.layout.steps
    assert min(times) > 0
    assert max(times) < 0.1


def test_close_gives_memory_back(compiled, card):
    free = card.free_bytes()
    for _ in range(3):
        with GpuExecutor(compiled, card, cache_tokens=4096) as executor:
            executor.run(_batch(IDS))
    assert card.free_bytes() >= free - (64 << 20)


def test_more_cache_than_memory_is_refused(compiled, card):
    with pytest.raises(errors.GpuMemoryShort, match="GB are needed"):
        GpuExecutor(compiled, card, cache_tokens=10**12)


def _batch(ids):
    return Batch.of([(list(ids), 0, [1])], rows=[0, len(ids) - 1])
