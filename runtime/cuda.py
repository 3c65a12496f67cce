"""An NVIDIA card, through cuda.core (binaries, launches, graphs) and torch (memory, copies, events).

Both are imported when a card is used, not before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from .device import Image, Work
from .schedule import Binary, Launch

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

# What lets a launch begin while the one before it runs.
EARLY = "programmatic_stream_serialization"
# Shared memory that a block gets without asking.
SHARED_BYTES = 48 * 1024
# When works are timed, the card first waits so many cycles while the host launches so many works.
HEAD_START, TIMED_AT_ONCE = 20_000_000, 128


def available() -> bool:
    """Whether there is a card that torch can use.

    Without a driver this is known before torch is imported.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return bool(torch.cuda.is_available())


class CudaDevice:
    """The card that torch calls ``index``, with a stream of its own; see runtime.device.Device.

    Raises NoGpu, or MissingExtra if cuda.core is not installed.
    """

    def __init__(self, index: int = 0) -> None:
        self._torch = torch = _import_torch()
        self._core, self._driver, cuda_error = _import_core()
        self._index = index
        self._card = self._core.Device(index)
        self._card.set_current()
        # torch's, which is never destroyed: what it frees later waits for the stream that used it.
        self._torch_stream = torch.cuda.Stream(device=index)
        self._stream = self._core.Stream.from_handle(int(self._torch_stream.cuda_stream))
        self.name = str(torch.cuda.get_device_name(index))
        self._sms = int(torch.cuda.get_device_properties(index).multi_processor_count)
        major, minor = torch.cuda.get_device_capability(index)
        self.capability = 10 * major + minor
        self.failures: tuple[type[Exception], ...] = (torch.AcceleratorError, cuda_error)
        most = self._driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        _, self.shared_bytes = self._driver.cuDeviceGetAttribute(most, index)
        _, version = self._driver.cuDriverGetVersion()
        self.cuda = (version // 1000, version % 1000 // 10)

    def free_bytes(self) -> int:
        self._torch.cuda.empty_cache()
        free, _ = self._torch.cuda.mem_get_info(self._index)
        return int(free)

    def alloc(self, nbytes: int) -> TorchTensor:
        torch = self._torch
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", self._index))
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    def pinned(self, nbytes: int) -> TorchTensor:
        return self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True)

    def load(self, file: Path, image: Image, binary: Binary) -> Any:
        code = self._core.ObjectCode
        read = code.from_cubin if image == "cubin" else code.from_ptx
        refusals: tuple[type[Exception], ...] = (*self.failures, RuntimeError)
        try:
            kernel = read(file.read_bytes()).get_kernel(binary.symbol)
            if binary.shared > SHARED_BYTES:
                self._allow_shared(kernel, binary.shared)
        except refusals as error:
            reason = f"the driver refuses it on {self.name}: {error}"
            raise errors.ArtifactDamaged(file=str(file), reason=reason) from error
        return kernel

    def launcher(self, kernel: Any, launch: Launch, addresses: Sequence[int]) -> Work:
        # Older versions of cuda.core let no launch begin early.
        early = launch.binary.waits and hasattr(self._core.LaunchConfig, EARLY)
        config = self._core.LaunchConfig(
            grid=launch.blocks(self._sms),
            block=launch.binary.threads,
            shmem_size=launch.binary.shared,
            **({EARLY: True} if early else {}),
        )
        return partial(self._core.launch, self._stream, config, kernel, *addresses)

    @contextmanager
    def stream(self) -> Iterator[None]:
        self._card.set_current()  # another thread may have been here before
        with self._torch.cuda.stream(self._torch_stream):
            yield

    def record(self, work: Work) -> Work:
        builder = self._stream.create_graph_builder().begin_building()
        try:
            work()
            graph = builder.end_building().complete()
        finally:
            builder.close()
        return partial(graph.launch, self._stream)

    def wait(self) -> None:
        self._torch_stream.synchronize()

    def time(self, works: Sequence[Work]) -> list[float]:
        """The card waits until the host has launched many works, so that the host's pace does not count."""
        spans = []
        for number, work in enumerate(works):
            if number % TIMED_AT_ONCE == 0:
                self._torch.cuda._sleep(HEAD_START)
            start = self._mark()
            work()
            spans.append((start, self._mark()))
        self.wait()
        return [start.elapsed_time(end) / 1000 for start, end in spans]

    def _mark(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch_stream)
        return event

    def _allow_shared(self, kernel: Any, nbytes: int) -> None:
        attribute = (
            self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        )
        (status,) = self._driver.cuKernelSetAttribute(attribute, nbytes, kernel.handle, self._index)
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{nbytes} bytes of shared memory: {status.name}")


def _import_torch() -> Any:
    """torch, if it can use a card; raises NoGpu."""
    try:
        import torch
    except ImportError as error:
        raise _missing("torch") from error
    if torch.version.cuda is None:
        raise errors.NoGpu(
            reason=f"torch {torch.__version__} is built without CUDA",
            advice="install a CUDA build of torch (pytorch.org/get-started), or run on the CPU",
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise errors.NoGpu(
            reason=(str(error).strip() or type(error).__name__).splitlines()[0],
            advice="check with `nvidia-smi` that driver and card are there, or run on the CPU",
        ) from error
    return torch


def _import_core() -> tuple[Any, Any, type[Exception]]:
    """cuda.core, the driver's functions, and what cuda.core raises; raises MissingExtra."""
    try:
        return (
            import_module("cuda.core"),
            import_module("cuda.bindings.driver"),
            import_module("cuda.core._utils.cuda_utils").CUDAError,
        )
    except ImportError as error:
        raise _missing("cuda.core") from error


def _missing(package: str) -> errors.MissingExtra:
    return errors.MissingExtra(package=package, purpose="running on NVIDIA GPUs", extra="cuda")
