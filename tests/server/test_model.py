"""The server's model: what its snapshot says, what it loads, what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditherps import wire
from ditherps.errors import UserError
from ditherps.layout import FlatModel, model_sha256
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps_server.model import ServerModel
from tests.tiny import Tiny


def make(model: str = "norm", seed: int = 1, **options: Any) -> ServerModel:
    return ServerModel(Tiny().build(model, seed), **options)


def received(messages: list[bytes]) -> tuple[pb.PullHeader, bytes]:
    first = pb.PullResponse.FromString(messages[0])
    assert first.WhichOneof("part") == "header"
    return first.header, b"".join(pb.PullResponse.FromString(message).chunk for message in messages[1:])


class TestSnapshot:
    @pytest.mark.parametrize("chunk_bytes", [1, 7, 100, 1 << 20])
    def test_it_carries_w_and_the_buffers(self, chunk_bytes: int) -> None:
        model = make(chunk_bytes=chunk_bytes)
        header, content = received(model.snapshot())
        size = 4 * model.layout.coordinates
        assert (header.parameter_bytes, header.buffer_bytes) == (size, model.layout.buffer_bytes)
        assert header.encoding == pb.PULL_ENCODING_SNAPSHOT
        assert not header.HasField("from_version")
        assert torch.equal(torch.frombuffer(bytearray(content[:size]), dtype=torch.float32), model.w)
        assert content[size:] == model.buffers
        assert wire.digest_of(content) == header.digest
        assert all(len(message) <= chunk_bytes + 6 for message in model.snapshot()[1:])

    def test_it_is_made_once_a_version(self) -> None:
        model = make()
        first = model.snapshot()
        assert model.snapshot() is first
        buffers = bytes(model.layout.buffer_bytes)
        with torch.no_grad():
            model.x.add_(1)
        model.advance(buffers)
        header, content = received(model.snapshot())
        assert (header.to_version, model.version) == (1, 1)
        assert content == model.w.numpy().tobytes() + buffers
        assert received(first)[1] != content

    def test_a_copy_evaluates_w_with_the_servers_buffers(self) -> None:
        model, other = make(seed=1), FlatModel(Tiny().build("norm", 2), gradient=False)
        model.advance(FlatModel(Tiny().build("norm", 3)).buffers()[:-8] + (9).to_bytes(8, "little"))
        model.copy_into(other)
        assert torch.equal(other.flat, model.w)
        assert other.buffers() == model.buffers


class TestFile:
    def test_save_and_load_round_trip(self, tmp_path: Path) -> None:
        model = make(seed=1)
        with torch.no_grad():
            model.x.mul_(3)
        model.advance(b"\x00\x00\x80\x3f" * 16 + (41).to_bytes(8, "little"))
        model.save(tmp_path / "m.safetensors")
        other = make(seed=2)
        assert other.sha256 != model.sha256
        before = other.snapshot()
        other.load(tmp_path / "m.safetensors")
        assert torch.equal(other.x, model.x)
        assert other.buffers == model.buffers
        assert other.sha256 == model.sha256
        assert other.version == 0
        assert received(other.snapshot())[1] == model.w.numpy().tobytes() + model.buffers != received(before)[1]

    def test_what_it_says_of_itself_is_true(self, tmp_path: Path) -> None:
        model = make()
        model.advance(model.buffers)
        model.save(tmp_path / "m.safetensors")
        tensors = load_file(tmp_path / "m.safetensors")
        flat = torch.cat([tensors[spec.name].reshape(-1) for spec in model.layout.parameters])
        buffers = b"".join(tensors[spec.name].numpy().tobytes() for spec in model.layout.buffers)
        with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert metadata == {"version": "1", "model_sha256": model_sha256(flat, buffers)}
        assert metadata["model_sha256"] == model.sha256

    def test_a_module_loads_it_as_its_state(self, tmp_path: Path) -> None:
        model = make(seed=1)
        model.save(tmp_path / "m.safetensors")
        module = Tiny().build("norm", 2)
        module.load_state_dict(load_file(tmp_path / "m.safetensors"))
        assert torch.equal(FlatModel(module).flat, model.x)

    def test_buffers_may_be_missing(self, tmp_path: Path) -> None:
        model = make(seed=1)
        tensors = {spec.name: torch.full(spec.shape, 2.0) for spec in model.layout.parameters}
        save_file(tensors, tmp_path / "m.safetensors")
        buffers = model.buffers
        model.load(tmp_path / "m.safetensors")
        assert torch.equal(model.x, torch.full_like(model.x, 2.0))
        assert model.buffers == buffers

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda t: t.pop("0.weight"), "0.weight is missing"),
            (lambda t: t.update({"0.bias": torch.zeros(9)}), r"0.bias has shape \(9,\), not \(8,\)"),
            (lambda t: t.update({"1.running_mean": torch.zeros(1)}), "1.running_mean has shape"),
            (lambda t: t.update({"extra": torch.zeros(1)}), "no tensor extra"),
        ],
    )
    def test_a_file_of_another_model_is_refused(self, tmp_path: Path, change: Any, says: str) -> None:
        tensors: dict[str, Tensor] = {name: t.clone() for name, t in Tiny().build("norm", 1).state_dict().items()}
        change(tensors)
        save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=says) as refused:
            make().load(tmp_path / "m.safetensors")
        assert "\n" not in str(refused.value)

    def test_a_file_with_nan_is_refused(self, tmp_path: Path) -> None:
        tensors = {name: t.clone() for name, t in Tiny().build("norm", 1).state_dict().items()}
        tensors["0.weight"][0, 0] = torch.nan
        save_file(tensors, tmp_path / "m.safetensors")
        with pytest.raises(UserError, match=r"0\.weight"):
            make().load(tmp_path / "m.safetensors")

    @pytest.mark.parametrize("content", [None, b"", b"not safetensors at all", b"\xff" * 64])
    def test_a_file_that_cannot_be_read_is_refused(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "m.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.safetensors cannot be read"):
            make().load(path)

    def test_a_refused_file_changes_nothing(self, tmp_path: Path) -> None:
        tensors = {name: torch.zeros_like(t) for name, t in Tiny().build("norm", 1).state_dict().items()}
        del tensors["3.bias"]
        save_file(tensors, tmp_path / "m.safetensors")
        model = make()
        before = model.sha256
        with pytest.raises(UserError):
            model.load(tmp_path / "m.safetensors")
        assert model.sha256 == before
