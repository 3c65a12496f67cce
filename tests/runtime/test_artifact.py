"""Artifacts on disk: whole or not at all, and never believed when altered."""

import errno
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tokenmill.errors as errors
from safetensors.numpy import load_file
from tokenmill.runtime import Artifact, Session
from tokenmill.runtime.artifact import ArtifactWriter, Target, TensorSpec, check_output
from tokenmill.runtime.cpu import choose_target
from tokenmill.runtime.manifest import Manifest


@pytest.fixture
def artifact(model_dir, tmp_path):
    """A copy to damage."""
    return shutil.copytree(model_dir, tmp_path / "model.tm")


def contents(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def small(path, force=False, fail=None, text="plan"):
    with ArtifactWriter(path, force) as writer:
        writer.json("plan.json", {"is": text})
        writer.weights([TensorSpec("w", "f32", (2, 3))], [("w", np.ones((2, 3), np.float32))])
        if fail:
            raise fail
        writer.describe(targets=[])


def rewrite_manifest(path, change):
    """A manifest that was changed by someone who knows its digest."""
    data = json.loads((path / "manifest.json").read_text())
    change(data)
    del data["digest"]
    text = json.dumps(data, sort_keys=True, indent=1) + "\n"
    data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(data, sort_keys=True, indent=1) + "\n"
    (path / "manifest.json").write_text(text)


# --- reading -----------------------------------------------------------------------------------


def test_open_gives_plan_targets_and_files(model_dir, fake):
    artifact = Artifact.open(model_dir)
    assert artifact.plan == fake.plan()
    assert artifact.targets == (Target("cpu", "kernels/cpu-fake"),)
    assert artifact.manifest.recipe == {"weights": "fp32"}
    assert artifact.file("tokenizer/tokenizer.json").is_file()
    assert artifact.file("tokenizer/none.json") is None
    assert artifact.file("manifest.json") is None
    np.testing.assert_array_equal(artifact.weights()["bias"].array, fake.bias)


def test_one_flipped_byte_in_any_file_is_found(artifact):
    for name, data in contents(artifact).items():
        file = artifact / name
        for at in {0, len(data) // 2, len(data) - 1}:
            damaged = bytearray(data)
            damaged[at] ^= 0x10
            file.write_bytes(damaged)
            with pytest.raises((errors.ArtifactDamaged, errors.ArtifactTooNew), match=file.name):
                Artifact.open(artifact)
        file.write_bytes(data)
    Artifact.open(artifact)


def test_every_byte_of_the_manifest_counts(model_dir):
    raw = (model_dir / "manifest.json").read_bytes()
    for at in range(len(raw)):
        for mask in (0x01, 0x07, 0x20, 0x29):  # 7 and 29 make other white space of it
            damaged = bytearray(raw)
            damaged[at] ^= mask
            with pytest.raises((errors.ArtifactDamaged, errors.ArtifactTooNew)):
                Manifest.parse(bytes(damaged), "manifest.json")


def test_missing_and_truncated_files_are_named(artifact):
    for name, data in contents(artifact).items():
        if name == "manifest.json":
            continue
        (artifact / name).unlink()
        with pytest.raises(errors.ArtifactDamaged, match=f"{name}: it is missing"):
            Artifact.open(artifact, verify=False)
        (artifact / name).write_bytes(data[:-1])
        with pytest.raises(errors.ArtifactDamaged, match=f"{name}: it has"):
            Artifact.open(artifact, verify=False)
        (artifact / name).write_bytes(data)


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(errors.NotAnArtifact, match="no such directory"):
        Artifact.open(tmp_path / "none")
    with pytest.raises(errors.NotAnArtifact, match="no manifest"):
        Artifact.open(tmp_path)
    for text in ("", "[]", "{}", "null", "[" * 100_000, '{"format_version": "1"}', "\xff"):
        (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
        with pytest.raises(errors.ArtifactDamaged, match=r"manifest\.json"):
            Artifact.open(tmp_path)


def test_newer_version_even_with_a_foreign_digest(artifact):
    manifest = artifact / "manifest.json"
    data = json.loads(manifest.read_text()) | {"format_version": 2}
    manifest.write_text(json.dumps(data))
    with pytest.raises(errors.ArtifactTooNew, match="format 2"):
        Artifact.open(artifact)


@pytest.mark.parametrize("key", ["files", "targets", "tokenmill", "toolchain", "recipe", "report"])
def test_missing_manifest_keys(artifact, key):
    rewrite_manifest(artifact, lambda data: data.pop(key))
    with pytest.raises(errors.ArtifactDamaged, match=key):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    "change",
    [{"files": []}, {"files": None}, {"report": None}, {"recipe": []}, {"toolchain": 1},
     {"targets": [{"name": 3, "directory": "kernels/cpu-fake", "needs": []}]}],
    ids=str,
)  # fmt: skip
def test_manifest_fields_of_another_type(artifact, change):
    rewrite_manifest(artifact, lambda data: data.update(change))
    with pytest.raises(errors.ArtifactDamaged, match="malformed"):
        Artifact.open(artifact)


OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", "./x", "a//b", "", ".", "C:\\x", "a\\b"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_lead_outside(artifact, path):
    (artifact.parent / "secret").write_text("x")
    fact = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite_manifest(artifact, lambda data: data["files"].update({path: fact}))
    with pytest.raises(errors.ArtifactDamaged, match="leads outside"):
        Artifact.open(artifact)


def test_links_that_lead_outside(artifact):
    plan = artifact / "plan.json"
    outside = artifact.parent / "plan.json"
    plan.rename(outside)
    plan.symlink_to(outside)
    with pytest.raises(errors.ArtifactDamaged, match="leads outside"):
        Artifact.open(artifact)


def test_a_library_must_be_among_the_hashed_files(artifact):
    (artifact / "kernels/cpu-evil").mkdir()
    shutil.copy(artifact / "kernels/cpu-fake/step.so", artifact / "kernels/cpu-evil")
    evil = {"name": "cpu", "directory": "kernels/cpu-evil", "needs": []}
    rewrite_manifest(artifact, lambda data: data.update(targets=[evil]))
    with pytest.raises(errors.ArtifactDamaged, match="cpu-evil"):
        Artifact.open(artifact)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target("cpu", "kernels/cpu-fake", ("avx1024",)), "needs avx1024"),
        (Target("cpu", "kernels/cpu-fake", (), "riscv128"), "is for riscv128"),
    ],
)
def test_foreign_targets(fake, tmp_path, target, reason):
    path = fake.write(tmp_path / "m", target=target)
    with pytest.raises(errors.ForeignTarget, match=reason):
        Session(path)


def test_a_gpu_target_does_not_run_on_a_cpu():
    with pytest.raises(errors.ForeignTarget, match="sm_90 is not for a CPU"):
        choose_target((Target("sm_90", "kernels/sm_90"),))


def test_a_library_that_is_not_one_or_not_the_one_named(fake, tmp_path):
    path = fake.write(tmp_path / "m")
    library = path / "kernels/cpu-fake/step.so"
    library.write_bytes(b"\x7fELF" + bytes(library.stat().st_size - 4))
    with pytest.raises(errors.ForeignTarget):
        Session(path, verify=False)
    path = shutil.copytree(fake.write(tmp_path / "n"), tmp_path / "o")
    (path / "kernels/cpu-fake").rename(path / "kernels/cpu-other")

    def rename(data):
        data["targets"][0]["directory"] = "kernels/cpu-other"
        data["files"] = {k.replace("fake", "other"): v for k, v in data["files"].items()}

    rewrite_manifest(path, rename)
    with pytest.raises(errors.ArtifactDamaged, match="built for fake"):
        Session(path)


def test_weights_that_do_not_fit_the_plan(fake, tmp_path):
    plan = fake.plan()
    bias = next(b for b in plan["buffers"] if b["name"] == "bias")
    path = fake.write(tmp_path / "m", plan=plan)
    bias["shape"] = [260]
    raw = json.dumps(plan, sort_keys=True, indent=1).encode() + b"\n"
    (path / "plan.json").write_bytes(raw)
    fact = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite_manifest(path, lambda data: data["files"].update({"plan.json": fact}))
    with pytest.raises(errors.ArtifactDamaged, match=r"no f32 \[260\] named 'bias'"):
        Session(path)


# --- writing -----------------------------------------------------------------------------------


def test_two_writes_are_byte_identical(fake, tmp_path):
    first, second = fake.write(tmp_path / "a"), fake.write(tmp_path / "b")
    assert contents(first) == contents(second)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_existing_output(tmp_path):
    path = tmp_path / "out"
    small(path, text="first")
    with pytest.raises(errors.OutputExists):
        small(path)
    small(path, force=True, text="second")
    assert Artifact.open(path).plan == {"is": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_spares_what_is_not_an_artifact(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    check_output(mine, force=True)  # an empty directory holds nothing to lose
    (mine / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for path in (mine, tmp_path / "file"):
        with pytest.raises(errors.OutputForeign):
            small(path, force=True)
    assert (mine / "thesis.tex").read_text() == "x"


def test_an_output_that_cannot_be_is_known_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    check_output(tmp_path / "new" / "deep", force=False)
    with pytest.raises(errors.OutputFailed, match="file is not a directory"):
        check_output(tmp_path / "file" / "deep" / "out", force=False)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(errors.OutputFailed, match="no permission"):
        check_output(tmp_path / "out", force=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "fail", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "full")]
)
def test_failure_leaves_nothing_and_keeps_the_old(tmp_path, fail):
    path = tmp_path / "out"
    for force in (False, True):
        with pytest.raises((type(fail), errors.OutputFailed)):
            small(path, force=force, fail=fail, text="new")
        left = [p.name for p in tmp_path.iterdir()]
        assert left == (["out"] if force else [])
        if not force:
            small(path, text="old")
    assert Artifact.open(path).plan == {"is": "old"}


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.write_bytes"])
def test_a_full_disk_at_any_moment(tmp_path, monkeypatch, call):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "out"
    small(path, text="old")
    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        with pytest.raises(errors.OutputFailed, match="No space left"):
            small(path, force=True, text="new")
    assert Artifact.open(path).plan == {"is": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_larger_than_the_system_allows(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(errors.OutputFailed), ArtifactWriter(tmp_path / "out") as writer:
            writer.bytes("plan.json", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def killed(tmp_path, force):
    """Run a writer in a process that is killed in the middle; ``swap``: between the renames."""
    code = f"""
        import os, pathlib, signal
        from tokenmill.runtime.artifact import ArtifactWriter
        die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        with ArtifactWriter({str(tmp_path / "out")!r}, force={force}) as writer:
            writer.json("plan.json", {{"is": "new"}})
            writer.describe(targets=[])
            if not {force}:
                die()
            rename = pathlib.Path.rename
            pathlib.Path.rename = lambda *a: (rename(*a), die())
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert result.returncode == -signal.SIGKILL


def test_the_run_after_a_killed_one_starts_clean(tmp_path):
    killed(tmp_path, force=False)
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".stage"]
    assert not (tmp_path / "out").exists()
    small(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    path = tmp_path / "out"
    small(path, text="old")
    killed(tmp_path, force=True)
    assert not path.exists()
    with pytest.raises(errors.OutputExists):  # the old one is back, so this is a replacement
        small(path)
    assert Artifact.open(path).plan == {"is": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_directories_of_a_living_process_are_left_alone(tmp_path):
    with ArtifactWriter(tmp_path / "out") as writer:
        mine = writer.path("x").parent
        living = mine.with_name(mine.name.replace(f"-{os.getpid()}.", f"-{os.getppid()}."))
        living.mkdir()
        writer.json("plan.json", {})
        writer.describe(targets=[])
    assert living.is_dir()


def test_writer_refuses_paths_outside_and_an_undescribed_artifact(tmp_path):
    with pytest.raises(ValueError, match="outside"), ArtifactWriter(tmp_path / "out") as writer:
        writer.text("../x", "")
    with pytest.raises(ValueError, match="describe"), ArtifactWriter(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- weights -----------------------------------------------------------------------------------


def test_weights_of_every_dtype_survive_and_safetensors_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    data = {
        "f32": ("f32", rng.standard_normal((3, 5)).astype(np.float32)),
        "bf16": ("bf16", rng.integers(0, 1 << 16, (4, 7), np.uint16)),
        "e4m3": ("e4m3", rng.integers(0, 255, 9, np.uint8)),
        "i8": ("i8", rng.integers(-128, 127, (5, 1), np.int8)),
        "u8": ("u8", rng.integers(0, 255, (2, 2, 2), np.uint8)),
        "i32": ("i32", np.array(7, np.int32)),
        "i64": ("i64", np.arange(6, dtype=np.int64)[::2]),
        "bool": ("bool", np.array([True, False])),
        "none": ("f32", np.empty((0, 4), np.float32)),
    }
    index = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in data.items()]
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.json("plan.json", {})
        stream = ((name, array) for name, (_, array) in reversed(data.items()))
        writer.weights(index, stream, shard_bytes=100)
        writer.describe(targets=[])
    shards = sorted((tmp_path / "out/weights").iterdir())
    assert len(shards) > 1
    stored = Artifact.open(tmp_path / "out").weights()
    for name, (dtype, array) in data.items():
        assert stored[name].dtype == dtype
        assert not stored[name].array.flags.writeable or array.size == 0
        np.testing.assert_array_equal(stored[name].array, array)
    theirs = {}
    for shard in shards:
        if b"F8_E4M3" not in shard.read_bytes() and b"BF16" not in shard.read_bytes():
            theirs |= load_file(shard)
    assert "i64" in theirs or "f32" in theirs
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, data[name][1])


def test_tensors_whose_size_allows_it_are_aligned(tmp_path):
    sizes = [3, 64, 100, 4096, 48, 1, 640, 32]
    index = [TensorSpec(f"t{i}", "u8", (n,)) for i, n in enumerate(sizes)]
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.json("plan.json", {})
        writer.weights(index, ((s.name, bytes(s.nbytes)) for s in index))
        writer.describe(targets=[])
    for tensor in Artifact.open(tmp_path / "out").weights().values():
        align = np.gcd(tensor.array.nbytes, 64)
        assert tensor.array.ctypes.data % align == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([("w", bytes(24)), ("v", b"")], "not in the index"),
        ([("w", bytes(24)), ("w", bytes(24))], "came twice"),
        ([("w", bytes(23))], "23 bytes"),
        ([], "no data"),
    ],
)
def test_data_that_contradicts_the_index(tmp_path, data, reason):
    with pytest.raises(ValueError, match=reason), ArtifactWriter(tmp_path / "out") as writer:
        writer.weights([TensorSpec("w", "f32", (2, 3))], data)


@pytest.mark.parametrize("offsets", [[0, 25], [-8, 16], [24, 0], [0, 1 << 60], ["a", "b"]])
def test_a_header_that_lies_is_caught_without_hashes(tmp_path, offsets):
    small(tmp_path / "out")
    file = next((tmp_path / "out/weights").iterdir())
    header = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}}
    text = json.dumps(header).encode()
    raw = len(text).to_bytes(8, "little") + text
    size = file.stat().st_size
    file.write_bytes(raw + bytes(size - len(raw)))
    with pytest.raises(errors.ArtifactDamaged, match="bad header"):
        Artifact.open(tmp_path / "out", verify=False).weights()


def test_this_machine_is_what_targets_call_it(fake, tmp_path):
    from tokenmill.runtime.cpu import choose_target, cpu_features

    features = tuple(sorted(cpu_features() or ()))[:2]
    plain = Target("cpu-plain", "kernels/a")
    best = Target("cpu-best", "kernels/b", features, platform.machine())
    beyond = Target("cpu-beyond", "kernels/c", (*features, "avx1024"))
    chosen = choose_target((plain, best, beyond))
    assert chosen == (best if features else beyond)
