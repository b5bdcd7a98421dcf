"""The server's model: its two parameter vectors, what it loads, what it leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditherps import downlink
from ditherps.errors import UserError
from ditherps.layout import FlatModel, model_sha256
from ditherps_server.model import ServerModel
from tests.tiny import Tiny


def make(model: str = "norm", seed: int = 1) -> ServerModel:
    return ServerModel(Tiny().build(model, seed))


class TestVersions:
    def test_w_is_x_until_it_is_parted_from_it(self) -> None:
        model = make()
        assert model.w is model.x
        model.part_w()
        assert torch.equal(model.w, model.x)
        with torch.no_grad():
            model.x.add_(1)
        assert not torch.equal(model.w, model.x)

    def test_the_digest_is_of_w_and_the_buffers_of_the_version(self) -> None:
        model = make()
        model.part_w()
        first = model.digest
        assert first == downlink.digest(model.w, model.buffers)
        with torch.no_grad():
            model.x.add_(1)
        model.advance(model.buffers)
        assert (model.version, model.digest) == (1, first)
        with torch.no_grad():
            model.w[3] += 1
        model.advance(model.buffers)
        assert model.digest != first
        second = model.digest
        model.advance(bytes(len(model.buffers)))
        assert model.digest not in (first, second)

    def test_a_copy_evaluates_x_with_the_servers_buffers(self) -> None:
        model, other = make(seed=1), FlatModel(Tiny().build("norm", 2), gradient=False)
        model.part_w()
        with torch.no_grad():
            model.w.zero_()
        model.advance(FlatModel(Tiny().build("norm", 3)).buffers()[:-8] + (9).to_bytes(8, "little"))
        model.copy_into(other)
        assert torch.equal(other.flat, model.x)
        assert other.buffers() == model.buffers

    @pytest.mark.parametrize("parted", [False, True])
    def test_restored_is_what_was_saved(self, parted: bool) -> None:
        model, other = make(seed=1), make(seed=2)
        for each in (model, other):
            if parted:
                each.part_w()
                with torch.no_grad():
                    each.w.mul_(0.5)
        model.advance(bytes(len(model.buffers)))
        other.restore(model.x, model.w if parted else None, model.buffers, model.version)
        assert torch.equal(other.x, model.x)
        assert torch.equal(other.w, model.w)
        assert (other.buffers, other.version, other.digest) == (model.buffers, 1, model.digest)


class TestFile:
    def test_save_and_load_round_trip(self, tmp_path: Path) -> None:
        model = make(seed=1)
        with torch.no_grad():
            model.x.mul_(3)
        model.advance(b"\x00\x00\x80\x3f" * 16 + (41).to_bytes(8, "little"))
        model.save(tmp_path / "m.safetensors")
        other = make(seed=2)
        assert other.sha256 != model.sha256
        other.part_w()
        other.load(tmp_path / "m.safetensors")
        assert torch.equal(other.x, model.x)
        assert other.buffers == model.buffers
        assert other.sha256 == model.sha256
        assert other.version == 0
        assert torch.equal(other.w, model.x)
        assert other.digest == model.digest

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
