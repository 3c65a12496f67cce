"""What CudaDevice asks of a driver, by way of the real cuda.core: a library stands for the driver."""

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import tokenmill
import torch

DRIVER = Path(__file__).with_name("driver.c")
COMPILER = shutil.which("cc")
STREAM = 0x77

BEGIN = f"""
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

torch.version.cuda = "13.0"
torch.cuda.init = lambda: None
torch.cuda.Stream = lambda device: SimpleNamespace(cuda_stream={STREAM})
torch.cuda.stream = lambda stream: nullcontext()
torch.cuda.get_device_name = lambda index: "Test card"
torch.cuda.get_device_properties = lambda index: SimpleNamespace(multi_processor_count=132)
torch.cuda.get_device_capability = lambda index: (9, 0)

from tokenmill import errors
from tokenmill.runtime.cuda import CudaDevice
from tokenmill.runtime.schedule import Binary, Launch, Scratch

device = CudaDevice()
assert (device.capability, device.shared_bytes, device.cuda) == (90, 227 << 10, (13, 0))
file = Path(sys.argv[1])
file.write_bytes(b"code")


def work(shared=0, grid=(5, 6, 7), per_sm=0, waits=False):
    binary = Binary("k", "symbol", (True, True), 96, shared, (Scratch(0, 1),), waits)
    launch = Launch(binary, ("x", "y"), grid, per_sm)
    return device.launcher(device.load(file, "cubin", binary), launch, [0x7F00_0000_0100, 0x200, 0])

"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("cuda.bindings.driver")
    include = files(pytest.importorskip("triton")) / "backends" / "nvidia" / "include"
    if COMPILER is None:
        pytest.skip("no C compiler")
    if torch.version.cuda is not None:
        pytest.skip("torch would meet the library too")
    path = tmp_path_factory.mktemp("driver")
    made = ["-w", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    library = ["-o", str(path / "libcuda.so.1"), str(DRIVER), "-ldl"]
    subprocess.run([COMPILER, *made, *library], check=True)
    return path


def said(folder, text, **environment):
    """What the driver was asked for by ``text``, line by line."""
    home = str(Path(tokenmill.__file__).parents[1])
    paths = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join([home, *sys.path])}
    command = [sys.executable, "-c", BEGIN + text, str(folder / "file")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **paths, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_launch_passes_addresses_on_torchs_stream(folder):
    assert said(folder, "work()()") == [
        "load code",
        "kernel symbol",
        "launch 0x30 on 0x77: grid 5 6 7 block 96 1 1 shared 0 7f0000000100 200 0",
    ]


def test_shared_memory_beyond_48_kib_is_asked_for(folder):
    *_, attribute, launch = said(folder, "work(shared=100_000)()")
    assert attribute == "attribute 8 of 0x30: 100000"
    assert "shared 100000" in launch
    text = """
try:
    work(shared=300_000)
except errors.ArtifactDamaged as error:
    print(error)
"""
    (line,) = [line for line in said(folder, text) if "refuses" in line]
    assert "300000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE" in line


def test_blocks_that_go_on_are_as_many_as_the_card_holds(folder):
    *_, launch = said(folder, "work(grid=(5000, 1, 1), per_sm=2)()")
    assert "grid 264 1 1" in launch


def test_a_kernel_that_waits_may_begin_early(folder):
    cuda_core = pytest.importorskip("cuda.core")
    if not hasattr(cuda_core.LaunchConfig, "programmatic_stream_serialization"):
        pytest.skip("this cuda.core knows no such launches")
    assert said(folder, "work(waits=True)()")[-1].endswith(" early 1")
    assert "early" not in said(folder, "work()()")[-1]
    *_, recorded, _ = said(folder, "device.record(work(waits=True))()")
    assert recorded.startswith("capture")
    assert recorded.endswith(" early 1")


def test_a_graph_is_recorded_once_and_replayed(folder):
    text = """
one = work()
graph = device.record(lambda: (one(), one()))
graph()
graph()
"""
    _, _, *lines = said(folder, text)
    assert [line.split(":")[0] for line in lines] == [
        *["capture 0x30 on 0x77"] * 2,
        *["replay 0x50 on 0x77"] * 2,
    ]


def test_what_fails_while_a_graph_is_recorded_ends_the_recording(folder):
    text = """
one = work()
try:
    device.record(lambda: 1 / 0)
except ZeroDivisionError:
    one()
"""
    *_, launch = said(folder, text)
    assert launch.startswith("launch")


def test_what_the_driver_says_is_among_the_failures(folder):
    text = """
try:
    work()()
except device.failures as error:
    print("caught", error)
"""
    *_, line = said(folder, text, LAUNCHES_FAIL="1")
    assert line.startswith("caught CUDA_ERROR_ILLEGAL_ADDRESS")
