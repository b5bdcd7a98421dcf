"""The server's checkpoint: it comes back as it was, the last one survives every failure, and damage is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import multiprocessing
import os
import random
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditherps.config import JobConfig
from ditherps.errors import UserError
from ditherps_server import checkpoint as module
from ditherps_server.checkpoint import FORMAT, Checkpoint, Entered, differences, read, write

JOB = JobConfig(
    workers=3, members=("left", "right", "middle"), codec="dqsg", codec_options={"levels": 5, "names": ["a", "b"]},
    seed=2**64 - 1, optimizer={"name": "adam", "betas": (0.8, 0.95)}, local={"lr": 0.1 + 0.2},
)  # fmt: skip


def vector(coordinates: int, seed: int) -> Tensor:
    return torch.randn(coordinates, generator=torch.Generator().manual_seed(seed))


def make(coordinates: int = 5, version: int = 7, **changes: Any) -> Checkpoint:
    """A checkpoint whose content follows from its version."""
    whole = Checkpoint(
        job=JOB, job_id="0123abcd", server_epoch=2, version=version, x=vector(coordinates, version),
        w=vector(coordinates, version + 1_000_000), buffers=bytes(range(11)), layout_digest=bytes(range(32)),
        initial_digest=b"\x00\xff" * 8,
        optimizer_tensors={"exp_avg": vector(coordinates, version + 2_000_000), "step": torch.tensor(float(version))},
        optimizer_values={"optimizer": "adam", "updates": version, "learning_rate": 0.1 + 0.2},
        leases={0: b"", 2: b"key\x00"}, entered={1: Entered(5, 0, 6, 2)}, logged=True,
        totals={"contributions": 12, "traffic": {"uplink_bytes": 2**63 + 1}},
    )  # fmt: skip
    return replace(whole, **changes)


def bits(tensor: Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.numpy().tobytes())


def plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything in it, as values that can be compared bit by bit; JSON's text tells NaN from NaN's absence."""
    return {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)} | {
        "x": bits(checkpoint.x),
        "w": bits(checkpoint.w),
        "optimizer_tensors": {name: bits(tensor) for name, tensor in checkpoint.optimizer_tensors.items()},
        "optimizer_values": json.dumps(checkpoint.optimizer_values, sort_keys=True),
        "totals": json.dumps(checkpoint.totals, sort_keys=True),
    }


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return plain(one) == plain(other)


def parts(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".part"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.safetensors"


class TestThereAndBack:
    @pytest.mark.parametrize("coordinates", [0, 1, 4095, 4096, 4097])
    @pytest.mark.parametrize("lossless", [True, False])
    def test_everything_comes_back_bit_by_bit(self, path: Path, coordinates: int, lossless: bool) -> None:
        written = replace(make(coordinates), w=None) if lossless else make(coordinates)
        size = write(path, written)
        assert size == path.stat().st_size
        assert same(read(path), written)
        assert (read(path).w is None) == lossless

    def test_nothing_but_a_model_without_a_coordinate(self, path: Path) -> None:
        written = make(
            0, w=None, buffers=b"", optimizer_tensors={}, optimizer_values={}, leases={}, totals={}, job_id=""
        )
        write(path, written)
        assert same(read(path), written)

    def test_every_pattern_of_a_float_is_kept(self, path: Path) -> None:
        patterns = np.array([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFC12345], dtype=np.uint32)
        x = torch.from_numpy(patterns.view(np.float32))
        write(path, make(x=x, w=x.flip(0), optimizer_tensors={}))
        assert read(path).x.numpy().view(np.uint32).tolist() == patterns.tolist()

    def test_views_and_parameters_are_written_as_they_look(self, path: Path) -> None:
        base = vector(40, 1)
        parameter = torch.nn.Parameter(base[10:20])
        written = make(x=parameter, w=base[::4], optimizer_tensors={"m": base[:20].view(4, 5).T, "x": base[:3]})
        write(path, written)
        found = read(path)
        assert torch.equal(found.x, base[10:20])
        assert torch.equal(found.w if found.w is not None else base, base[::4])
        assert torch.equal(found.optimizer_tensors["m"], base[:20].view(4, 5).T)
        assert torch.equal(found.optimizer_tensors["x"], base[:3])

    def test_nan_and_infinity_are_kept_in_values(self, path: Path) -> None:
        totals = {"elapsed": math.nan, "least": -math.inf, "most": [math.inf, -0.0, 5e-324]}
        write(path, make(totals=totals, optimizer_values={"learning_rate": math.nan}))
        found = read(path)
        assert math.isnan(found.totals["elapsed"])
        assert math.isnan(found.optimizer_values["learning_rate"])
        assert found.totals["least"] == -math.inf
        assert [math.copysign(1, x) * abs(x) for x in found.totals["most"]] == [math.inf, -0.0, 5e-324]
        assert math.copysign(1, found.totals["most"][1]) == -1

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(
            st.text(),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=10,
            ),
            max_size=5,
        )
    )
    def test_plain_values_come_back_as_they_were(self, path: Path, values: dict[str, Any]) -> None:
        written = make(1, totals=values, optimizer_values=values)
        write(path, written)
        assert same(read(path), written)

    @pytest.mark.parametrize("values", [{1: 2}, {"a": [{None: 1}]}, {"a": {1, 2}}, {"a": torch.zeros(1)}, {"a": b""}])
    def test_values_that_json_would_change_are_not_written(self, path: Path, values: dict[str, Any]) -> None:
        write(path, make(version=1))
        with pytest.raises(TypeError):
            write(path, make(version=2, totals=values))
        assert same(read(path), make(version=1))

    @pytest.mark.parametrize(
        "changes",
        [
            {"x": torch.zeros(5, dtype=torch.float64)},
            {"x": torch.zeros(1, 5)},
            {"w": torch.zeros(4)},
            {"w": torch.zeros(5, dtype=torch.bfloat16)},
            {"optimizer_tensors": {"step": torch.tensor(3)}},
            {"optimizer_tensors": {str(n): torch.zeros(1) for n in range(100)}},
            {"job_id": "x" * (65 << 20)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_what_could_not_be_read_is_not_written(self, path: Path, changes: Mapping[str, Any]) -> None:
        write(path, make(version=1))
        with pytest.raises(ValueError, match=r"tensor|coordinates|at most"):
            write(path, make(**changes))
        assert same(read(path), make(version=1))
        assert parts(path.parent) == []

    def test_equal_states_are_equal_files(self, path: Path) -> None:
        write(path, make())
        first = path.read_bytes()
        reordered = make()
        tensors, leases = reordered.optimizer_tensors, reordered.leases
        write(
            path,
            replace(
                reordered,
                optimizer_tensors=dict(reversed(list(tensors.items()))),
                leases=dict(reversed(list(leases.items()))),
            ),
        )
        assert path.read_bytes() == first

    def test_other_readers_of_the_format_open_it(self, path: Path) -> None:
        written = make()
        write(path, written)
        assert set(load_file(path)) == {"x", "w", "buffers", "optimizer.exp_avg", "optimizer.step"}
        assert bits(load_file(path)["x"]) == bits(written.x)
        assert load_file(path)["buffers"].numpy().tobytes() == written.buffers

    def test_only_its_owner_reads_the_lease_keys(self, path: Path) -> None:
        write(path, make())
        assert path.stat().st_mode & 0o077 == 0

    def test_a_hundred_thousand_members(self, path: Path) -> None:
        names = tuple(f"{index:06}" + "n" * 57 for index in range(100_000))
        leases = {index: bytes([index % 256]) * 64 for index in range(100_000)}
        job = JOB.model_copy(update={"workers": 100_000, "members": names})
        write(path, make(job=job, leases=leases))
        assert (read(path).leases, read(path).job) == (leases, job)


class TestWhateverHappensInBetween:
    def test_synced_before_it_is_renamed_and_the_folder_after(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        fsync, rename = os.fsync, Path.replace

        def syncs(descriptor: int) -> None:
            target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            steps.append("folder" if target == path.parent else f"part of {target.stat().st_size}")
            fsync(descriptor)

        def renames(self: Path, target: Path) -> Path:
            steps.append("rename")
            return rename(self, target)

        monkeypatch.setattr(os, "fsync", syncs)
        monkeypatch.setattr(Path, "replace", renames)
        size = write(path, make())
        assert steps == [f"part of {size}", "rename", "folder"]

    @pytest.mark.parametrize("name", ["fsync", "replace"])
    def test_a_failing_system_leaves_the_last_one(self, path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        write(path, make(version=1))

        def fails(*_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os if name == "fsync" else Path, name, fails)
            with pytest.raises(OSError, match="Input/output error"):
                write(path, make(version=2))
        assert same(read(path), make(version=1))
        assert parts(path.parent) == []

    def test_leftovers_of_killed_writers_are_removed_and_nothing_else(self, path: Path) -> None:
        for name in ("checkpoint.safetensors.0123.part", "checkpoint.safetensors.part"):
            (path.parent / name).write_bytes(b"half")
        for name in ("other.safetensors.0123.part", "server.json.part", "checkpoint.safetensors.copy"):
            (path.parent / name).write_bytes(b"of others")
        write(path, make())
        assert {file.name for file in path.parent.iterdir()} == {
            path.name, "other.safetensors.0123.part", "server.json.part", "checkpoint.safetensors.copy",
        }  # fmt: skip

    def test_a_writer_that_should_be_dead_puts_nothing_in_place(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = Path.replace

        def overtaken(self: Path, target: Path) -> Path:
            monkeypatch.setattr(Path, "replace", rename)
            write(path, make(version=2))
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", overtaken)
        with pytest.raises(FileNotFoundError):
            write(path, make(version=1))
        assert same(read(path), make(version=2))

    def test_no_folder(self, path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            write(path.parent / "no" / "checkpoint", make())


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module.__name__, __name__])
    return context


def even(version: int) -> Checkpoint:
    """4 MB of each of two numbers that follow from the version: made so fast that a writer does little but write."""
    x = torch.full((1_000_000,), float(version))
    return replace(make(1, version), x=x, w=x + 0.5)


def write_on(path: Path, version: int, reports: Connection) -> None:
    """Write one checkpoint after another, and say so after each."""
    while True:
        version += 1
        write(path, even(version))
        reports.send(version)


def write_limited(path: Path, limits: list[int], reports: Connection) -> None:
    """Write checkpoints, whose files may not exceed a size, and at last one without a limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for version, limit in enumerate([*limits, hard], 2):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            reports.send((write(path, make(100_000, version)), "", parts(path.parent)))
        except OSError as error:
            reports.send((0, errno.errorcode[error.errno or 0], parts(path.parent)))


def grown_by(path: Path, reports: Connection) -> None:
    """Peak of this process's own memory over writing, then over reading, 40 MB of x and as much of w, in bytes."""
    big = make(10_000_000, w=torch.ones(10_000_000), optimizer_tensors={})
    write(path.with_name("small"), make())
    read(path.with_name("small"))
    for step in (lambda: write(path, big), lambda: read(path)):
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmHWM")
        kept = step()
        reports.send(resident("VmHWM") - before)
        del kept


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class TestRealProcesses:
    def test_killed_in_the_middle_of_writing_at_random_moments(self, path: Path, processes: ForkServerContext) -> None:
        choice = random.Random(1)
        version = in_the_middle = kills = 0
        while kills < 12 or in_the_middle < 5:
            assert kills < 60
            reports, ends = processes.Pipe(duplex=False)
            child = processes.Process(target=write_on, args=(path, version, ends))
            child.start()
            ends.close()
            assert reports.poll(60)
            version = reports.recv()
            time.sleep(choice.uniform(0, 0.05))
            child.kill()
            child.join()
            kills += 1
            with contextlib.suppress(EOFError):
                while True:
                    version = reports.recv()
            in_the_middle += bool(parts(path.parent))
            assert len(parts(path.parent)) <= 1
            found = read(path)
            # What has been acknowledged is there; the one after it may be.
            assert found.version in (version, version + 1)
            assert same(found, even(found.version))
            version = found.version
        write(path, make())
        assert parts(path.parent) == []

    def test_no_more_room_at_any_place_of_the_file(self, path: Path, processes: ForkServerContext) -> None:
        size = write(path, make(100_000, 1))
        first = path.read_bytes()
        header = 8 + int.from_bytes(first[:8], "little")
        limits = [0, 7, 8, 100, header, header + 4, size // 2, size - 1]
        reports, ends = processes.Pipe(duplex=False)
        child = processes.Process(target=write_limited, args=(path, limits, ends))
        child.start()
        ends.close()
        seen = []
        for _ in limits:
            assert reports.poll(60)
            seen.append(reports.recv())
        assert seen == [(0, "EFBIG", [])] * len(limits)
        assert reports.poll(60)
        assert reports.recv()[1:] == ("", [])
        child.join()
        assert same(read(path), make(100_000, 2 + len(limits)))

    def test_a_full_disk(self, tmp_path: Path) -> None:
        """In namespaces of its own, with a disk of 1 MB: one checkpoint of 600 KB fits, two do not."""
        namespace = ["unshare", "--user", "--map-root-user", "--mount"]
        mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
        try:
            possible = subprocess.run([*namespace, "sh", "-c", mount], capture_output=True, timeout=10)
        except OSError:
            pytest.skip("needs unshare")
        if possible.returncode:
            pytest.skip("needs user namespaces")
        program = "import sys; from tests.server.test_checkpoint import fill; fill(sys.argv[1])"
        shell = f'{mount} && exec "$@"'
        child = subprocess.run(
            [*namespace, "sh", "-c", shell, "sh", sys.executable, "-c", program, str(tmp_path)],
            capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert child.stdout.splitlines() == ["ENOSPC", "version 1", "parts []", "version 3"], child.stderr

    def test_tensors_are_not_copied(self, path: Path, processes: ForkServerContext) -> None:
        reports, ends = processes.Pipe(duplex=False)
        child = processes.Process(target=grown_by, args=(path, ends))
        child.start()
        ends.close()
        assert reports.poll(60)
        assert reports.recv() < 4 << 20
        # Reading checks the digest, so all pages of the file have been in memory, but no copy of them.
        assert reports.poll(60)
        assert reports.recv() < (80 << 20) + (4 << 20)
        child.join()


def fill(folder: str) -> None:
    """What the test of a full disk runs on it."""
    path = Path(folder) / "checkpoint"
    write(path, make(50_000, 1))
    try:
        write(path, make(50_000, 2))
    except OSError as error:
        print(errno.errorcode[error.errno or 0])
    found = read(path)
    print(f"version {found.version}" if same(found, make(50_000, 1)) else "damaged")
    print("parts", parts(path.parent))
    write(path, make(30_000, 3))
    print(f"version {read(path).version}")


def refusal(path: Path) -> str:
    """The line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 600
    assert any(way in message for way in ("begin anew without --resume", "resume with the version that wrote it"))
    return message


def signed(path: Path, values: Any, tensors: dict[str, Tensor], *, form: str = str(FORMAT)) -> None:
    """A file with a right digest, written and signed as the module's docstring says, not by its code."""
    text = values if isinstance(values, str) else json.dumps(values)
    names = sorted(tensors)
    kinds = [
        [name, {torch.float32: "F32", torch.uint8: "U8"}.get(tensors[name].dtype, "?"), list(tensors[name].shape)]
        for name in names
    ]
    head = json.dumps([form, text, kinds], separators=(",", ":")).encode()
    state = xxhash.xxh3_128(struct.pack("<Q", len(head)) + head)
    for name in names:
        state.update(tensors[name].view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b"")
    save_file(tensors, path, {"format": form, "values": text, "digest": state.hexdigest()})


def opened(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values and tensors of a file, to be changed."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["values"]), load_file(path)


def places(size: int) -> list[int]:
    """Both ends of a file, and some of what is between."""
    middle = random.Random(size).sample(range(40, size - 60), 150)
    return [*range(40), *sorted(middle), *range(size - 60, size)]


class TestDamageAndStrangers:
    def test_the_digest_is_what_the_docstring_says(self, path: Path) -> None:
        write(path, make())
        values, tensors = opened(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items() if tensor.dim()}
        signed(path, values, tensors)
        assert same(read(path), make(optimizer_tensors={"exp_avg": make().optimizer_tensors["exp_avg"]}))

    def test_a_flipped_bit_is_found(self, path: Path) -> None:
        write(path, make(2, optimizer_tensors={}, leases={}, totals={}))
        whole = path.read_bytes()
        flipped = path.with_name("flipped")
        for place in places(len(whole)):
            bit = random.Random(place).randrange(8)
            flipped.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            refusal(flipped)

    def test_a_truncation_is_found(self, path: Path) -> None:
        write(path, make(2, optimizer_tensors={}, leases={}, totals={}))
        whole = path.read_bytes()
        for length in places(len(whole)):
            path.write_bytes(whole[:length])
            refusal(path)
        path.write_bytes(whole + b"\0")
        refusal(path)

    def test_a_torn_page_is_found(self, path: Path) -> None:
        """What a power cut may leave: a page of zeros, or two pages in each other's place."""
        size = write(path, make(10_000))
        whole = path.read_bytes()
        for page in range(0, size - 8192, 4096):
            path.write_bytes(whole[:page] + bytes(4096) + whole[page + 4096 :])
            refusal(path)
            middle = whole[page + 4096 : page + 8192] + whole[page : page + 4096]
            path.write_bytes(whole[:page] + middle + whole[page + 8192 :])
            refusal(path)

    def test_tensors_in_each_others_place_are_found(self, path: Path) -> None:
        write(path, make())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for swapped in (
            tensors | {"x": tensors["w"], "w": tensors["x"]},
            {name: tensor for name, tensor in tensors.items() if name != "w"},
            tensors | {"optimizer.step": tensors["optimizer.step"].reshape(1)},
            tensors | {"optimizer.exp_avg": torch.cat([tensors["optimizer.exp_avg"], torch.zeros(1)])},
        ):
            save_file({name: tensor.clone() for name, tensor in swapped.items()}, path.with_name("other"), metadata)
            assert "does not have its digest" in refusal(path.with_name("other"))

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=300))
    def test_any_bytes(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        refusal(path)

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 2**64 - 1), st.binary(max_size=30), st.integers(0, 40))
    def test_hostile_header_lengths(self, path: Path, length: int, rest: bytes, zeros: int) -> None:
        path.write_bytes(struct.pack("<Q", length) + rest)
        os.truncate(path, 8 + len(rest) + 2**zeros)
        refusal(path)

    @pytest.mark.parametrize("shape", [[2**40], [2**62], [2**64 - 1], [2**63, 2], [-1], [0, 2**62], [1.5]])
    def test_hostile_shapes(self, path: Path, shape: list[int]) -> None:
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
        self._header(path, {"x": tensor}, bytes(16))
        refusal(path)

    @pytest.mark.parametrize("dtype", ["F64", "BF16", "F16", "I32", "BOOL", "F8_E4M3", "C64", "U8", "?", "PICKLE"])
    def test_other_dtypes(self, path: Path, dtype: str) -> None:
        size = {"F64": 8, "C64": 8, "I32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        self._header(path, {"x": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}}, bytes(size))
        refusal(path)

    def test_far_too_many_tensors(self, path: Path) -> None:
        tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        self._header(path, {f"optimizer.{n}": tensor for n in range(10_000)}, b"")
        assert "10000 tensors" in refusal(path)

    @staticmethod
    def _header(path: Path, tensors: dict[str, Any], data: bytes) -> None:
        metadata = {"format": str(FORMAT), "values": "{}", "digest": "0" * 32}
        header = json.dumps({"__metadata__": metadata, **tensors}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data)

    @pytest.mark.parametrize(
        ("change", "shown"),
        [
            (lambda values: values.pop("job_id"), "job_id"),
            (lambda values: values.update(version=-1), "version"),
            (lambda values: values.update(version=2**32), "version"),
            (lambda values: values.update(version="many"), "version"),
            (lambda values: values.update(server_epoch=None), "server_epoch"),
            (lambda values: values.update(layout_digest="0g"), "layout_digest"),
            (lambda values: values.update(initial_digest=7), "initial_digest"),
            (lambda values: values.update(leases={"-1": ""}), "leases"),
            (lambda values: values.update(leases={"a": ""}), "leases"),
            (lambda values: values.update(leases={"1": ["00"]}), "leases.1"),
            (lambda values: values.update(totals=[1]), "totals"),
            (lambda values: values.update(optimizer=None), "optimizer"),
            (lambda values: values.update(log=1), "log"),
            (lambda values: values["job"].update(new_option=1), "job.new_option"),
            (lambda values: values["job"].update(rounds=0), "job.rounds"),
            (lambda values: values["job"]["optimizer"].update(name="lion\x1b[31m\n"), "job.optimizer.name"),
            (lambda values: values["job"].update(task="t" * 10_000, seed="s" * 10_000), "job.seed"),
        ],
    )
    def test_values_of_another_version(self, path: Path, change: Callable[[dict[str, Any]], Any], shown: str) -> None:
        write(path, make(optimizer_tensors={}))
        values, tensors = opened(path)
        change(values)
        signed(path, values, {name: tensor.clone() for name, tensor in tensors.items()})
        message = refusal(path)
        assert shown in message
        assert "resume with the version that wrote it" in message

    @pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, "1" * 10_000, '"\\ud800"', "NaN"])
    def test_values_that_are_no_values(self, path: Path, text: str) -> None:
        signed(path, text, {"x": torch.zeros(1), "buffers": torch.zeros(1, dtype=torch.uint8)})
        refusal(path)

    @pytest.mark.parametrize(
        ("tensors", "shown"),
        [
            ({}, "buffers is missing"),
            ({"buffers": torch.zeros(1, dtype=torch.uint8)}, "x is missing"),
            ({"x": torch.zeros(2, 2)}, "not flat"),
            ({"x": torch.zeros(4, dtype=torch.float16)}, "float16"),
            ({"x": torch.zeros(4), "w": torch.zeros(3)}, "3 coordinates"),
            ({"x": torch.zeros(4), "log\n\x1b": torch.zeros(3)}, "no tensor"),
            ({"x": torch.zeros(4), "optimizer.m": torch.zeros(3, dtype=torch.float64)}, "float64"),
            ({"x": torch.zeros(4), "buffers": torch.zeros(3)}, "float32"),
        ],
    )
    def test_other_tensors(self, path: Path, tensors: dict[str, Tensor], shown: str) -> None:
        write(path, make())
        values, _ = opened(path)
        rest = {"buffers": torch.zeros(1, dtype=torch.uint8)} if "x" in tensors else {}
        signed(path, values, rest | tensors)
        assert shown in refusal(path)

    def test_another_format(self, path: Path) -> None:
        write(path, make(optimizer_tensors={}))
        values, tensors = opened(path)
        for form in ("0", str(FORMAT + 1), "", "x" * 1000):
            signed(path, values, {name: tensor.clone() for name, tensor in tensors.items()}, form=form)
            assert "checkpoint format" in refusal(path)

    def test_a_model_is_no_checkpoint(self, path: Path) -> None:
        save_file({"weight": torch.zeros(3)}, path)
        assert "not a checkpoint of ditherps" in refusal(path)
        save_file({"x": torch.zeros(3)}, path, {"version": "3", "model_sha256": "0" * 64})
        assert "not a checkpoint of ditherps" in refusal(path)

    def test_a_pickle_is_not_opened(self, path: Path, tmp_path: Path) -> None:
        class Touches:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "touched",))

        torch.save(Touches(), path)
        refusal(path)
        assert not (tmp_path / "touched").exists()

    def test_no_file_a_folder_a_pipe(self, path: Path) -> None:
        assert "no checkpoint" in refusal(path)
        os.mkfifo(path)
        assert "not a file" in refusal(path)
        path.unlink()
        path.mkdir()
        assert "not a file" in refusal(path)

    def test_no_permission(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(path, make())

        def denied(*_: Any) -> None:  # root, who may run this, is denied nothing
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
        assert "cannot be read: Permission denied" in refusal(path)

    def test_the_next_checkpoint_changes_nothing_of_what_was_read(self, path: Path) -> None:
        write(path, make(100_000, version=1))
        found = read(path)
        write(path, make(100_000, version=2))
        path.unlink()
        assert same(found, make(100_000, version=1))

    def test_what_was_read_can_be_changed_and_the_file_stays(self, path: Path) -> None:
        write(path, make())
        read(path).x.zero_()
        assert same(read(path), make())


class TestDifferences:
    def test_equal_jobs(self, path: Path) -> None:
        write(path, make())
        assert differences(read(path).job, JOB) == []
        assert differences(JobConfig(), JobConfig()) == []

    def test_names_are_nested_and_both_values_shown(self) -> None:
        then = JobConfig(optimizer={"lr": 0.1}, rounds=10)
        now = JobConfig(optimizer={"lr": 0.2}, rounds=10, downlink={"codec": "none"})
        assert differences(then, now) == ['downlink.codec: "" then, "none" now', "optimizer.lr: 0.1 then, 0.2 now"]

    def test_an_option_that_one_of_them_does_not_set(self) -> None:
        then = JobConfig(codec_options={"ratio": 3, "deep": {"a": [1]}})
        now = JobConfig(codec_options={"deep": {"a": [1, 2]}, "none": None})
        assert differences(then, now) == [
            "codec_options.deep.a: [1] then, [1, 2] now",
            "codec_options.none: not set then, null now",
            "codec_options.ratio: 3 then, not set now",
        ]

    def test_lists_are_named_by_their_first_difference(self) -> None:
        then = JobConfig(workers=5, members=("a", "b", "c", "d", "e"), optimizer={"name": "adam"})
        now = JobConfig(workers=5, members=("a", "x", "c", "y", "e"), optimizer={"name": "adam", "betas": (0.9, 0.9)})
        assert differences(then, now) == [
            'members[1]: "b" then, "x" now (and 1 more of members)',
            "optimizer.betas[1]: 0.999 then, 0.9 now",
        ]
        assert differences(JobConfig(workers=5), then)[0] == "members: [] then, a list of 5 now"

    def test_one_line_each_however_long_the_value(self) -> None:
        found = differences(JobConfig(task="a\nb"), JobConfig(task="c" * 10_000))
        assert len(found) == 1
        assert found[0].startswith('task: "a\\nb" then, "ccc')
        assert len(found[0]) < 300

    def test_each_option_is_noticed(self) -> None:
        """Another value of any option of a job is a difference of just that name."""
        now = JobConfig(workers=3, optimizer={"name": "adam"})
        for name, value in (
            ("task", "mnist"), ("seed", 2), ("error_feedback", True), ("mode", "local"), ("quorum", 0.5),
            ("staging_bytes", 5), ("evaluate_every", 3), ("compute_threads", 2),
        ):  # fmt: skip
            found = differences(JobConfig.model_validate(now.model_dump() | {name: value}), now)
            assert [line.split(":")[0] for line in found] == [name]
