"""Which of an artifact's GPU targets runs on a card."""

from __future__ import annotations

import re

from .. import errors
from .artifact import Artifact, Target
from .device import Device, Image
from .schedule import Build, builds

# Architectures that can be compiled for, and whether later cards can run what comes of it.
ARCHITECTURES = {80: True, 89: True, 90: False, 100: False, 120: False}


def choose_target(artifact: Artifact, device: Device) -> tuple[Target, Image]:
    """The target whose cubins run on ``device``, or else whose PTX its driver can compile.

    A cubin runs on cards of its major capability and no lower minor one, PTX on any later card, and what
    is made for ``sm_90a`` on 9.0 alone; neither where a block may have less shared memory than it takes.
    Raises ForeignTarget; DriverTooOld if a newer one would do.
    """
    choices: list[tuple[tuple[bool, int], Target, Image]] = []
    drivers: list[tuple[int, int]] = []
    shared: list[int] = []
    for target in artifact.targets:
        for build in builds(artifact, target) if target.device == "cuda" else ():
            made, runs, portable = _fits(build, device.capability)
            if (runs or portable) and build.shared > device.shared_bytes:
                shared.append(build.shared)
            elif runs and build.cuda[0] <= device.cuda[0]:
                choices.append(((True, made), target, "cubin"))
            elif portable and build.cuda <= device.cuda:
                choices.append(((False, made), target, "ptx"))
            elif portable or runs:
                drivers.append((build.cuda[0], 0) if runs else build.cuda)
    if choices:
        _, target, image = max(choices, key=lambda choice: choice[0])
        return target, image
    if drivers:
        found, needed = (".".join(map(str, version)) for version in (device.cuda, min(drivers)))
        raise errors.DriverTooOld(found=found, needed=needed)
    major, minor = divmod(device.capability, 10)
    reason = f"{device.name} has compute capability {major}.{minor}"
    if shared:
        have, need = device.shared_bytes >> 10, min(shared) >> 10
        reason += f" and {have} KiB of shared memory for a block, which needs {need}"
    names = [target.name for target in artifact.targets]
    advised = advised_target(device.capability)
    raise errors.ForeignTarget(
        targets=", ".join(names) or "none",
        reason=reason,
        target="cpu" if shared and advised in names else advised,
    )


def _fits(build: Build, capability: int) -> tuple[int, bool, bool]:
    """The capability that a build is for, and whether its cubins and its PTX are for a card's."""
    match = re.fullmatch(r"sm_(\d+)([a-z]?)", build.architecture)
    if match is None:
        return 0, False, False
    made = int(match[1])
    portable = made == capability or (made < capability and not match[2])
    return made, portable and made // 10 == capability // 10, portable


def advised_target(capability: int) -> str:
    """The target to compile for a card."""
    fitting = [
        made
        for made, portable in ARCHITECTURES.items()
        if made == capability or (portable and made < capability)
    ]
    return f"sm_{max(fitting, default=min(ARCHITECTURES))}"
