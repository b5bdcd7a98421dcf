"""The flat vector: views, digests, buffers as bytes, the hash of a model."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ditherps.errors import PayloadError, Reason, UserError
from ditherps.layout import FlatModel, Layout, TensorSpec, model_sha256, pack_buffers, unpack_buffers


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1, bias=False))


class Odd(nn.Module):
    """Buffers of many kinds, one of them empty, one a scalar, one not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("halves", torch.tensor([1.5, -2.5], dtype=torch.float16))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("count", torch.tensor(2**40 + 1))
        self.register_buffer("table", torch.arange(6, dtype=torch.float64).reshape(2, 3).t())


class TestFlatModel:
    def test_parameters_stand_in_the_flat_vector_in_order(self) -> None:
        reference, model = small(), FlatModel(small())
        assert torch.equal(model.flat, torch.cat([p.detach().reshape(-1) for p in reference.parameters()]))
        assert model.layout.coordinates == len(model.flat) == 3 * 2 + 2 + 2 + 2 + 2
        assert model.layout.starts == (0, 6, 8, 10, 12, 14)

    def test_what_is_written_into_the_flat_vector_is_in_the_module_and_back(self) -> None:
        model = FlatModel(small())
        with torch.no_grad():
            model.flat.copy_(torch.arange(14.0))
            assert torch.equal(model.module.get_parameter("0.weight"), torch.arange(6.0).reshape(2, 3))
            assert torch.equal(model.module.get_parameter("2.weight"), torch.tensor([[12.0, 13.0]]))
            model.module.get_parameter("1.bias").fill_(-1)
        assert model.flat.tolist()[10:12] == [-1, -1]

    def test_backward_fills_the_gradient(self) -> None:
        reference, model = small(), FlatModel(small())
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        for module in (reference, model.module):
            module(inputs).square().sum().backward()
        expected = torch.cat([p.grad.reshape(-1) for p in reference.parameters() if p.grad is not None])
        assert expected.abs().sum() > 0
        assert torch.equal(model.gradient, expected)
        # A second pass adds to it, in the same memory.
        address = model.gradient.data_ptr()
        before = model.gradient.clone()
        model.module(inputs).square().sum().backward()
        assert model.gradient.data_ptr() == address
        assert not torch.equal(model.gradient, before)

    def test_without_gradient_none_is_kept(self) -> None:
        model = FlatModel(small(), gradient=False)
        assert model.gradient.numel() == 0
        assert all(parameter.grad is None for parameter in model.module.parameters())

    def test_an_optimizer_over_the_flat_vector_trains_the_module(self) -> None:
        reference, model = small(), FlatModel(small())
        flat = nn.Parameter(model.flat)
        flat.grad = model.gradient
        ours = torch.optim.SGD([flat], lr=0.1, momentum=0.9)
        theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
        for seed in range(4):
            inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
            model.gradient.zero_()
            theirs.zero_grad()
            for module, optimizer in ((model.module, ours), (reference, theirs)):
                module(inputs).square().sum().backward()
                optimizer.step()
        assert torch.equal(model.flat, torch.cat([p.detach().reshape(-1) for p in reference.parameters()]))

    def test_shared_parameters_stand_once(self) -> None:
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[1].weight = module[0].weight
        model = FlatModel(module)
        assert model.layout.coordinates == 4
        model.module(torch.ones(1, 2)).sum().backward()
        assert model.gradient.abs().sum() > 0

    def test_a_model_without_parameters(self) -> None:
        model = FlatModel(nn.ReLU())
        assert (model.layout.coordinates, len(model.flat), model.buffers()) == (0, 0, b"")


class TestLayout:
    def test_half_precision_parameters_are_refused_by_name(self) -> None:
        with pytest.raises(UserError, match=r"parameter 2\.weight is float16"):
            Layout.of(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1).half()))

    def test_names(self) -> None:
        layout = Layout.of(small())
        names = [layout.name_at(coordinate) for coordinate in range(layout.coordinates)]
        assert names == ["0.weight"] * 6 + ["0.bias"] * 2 + ["1.weight"] * 2 + ["1.bias"] * 2 + ["2.weight"] * 2

    def test_an_empty_parameter_holds_no_coordinate(self) -> None:
        layout = Layout((TensorSpec("a", (2,), "float32"), TensorSpec("b", (0, 5), "float32"),
                         TensorSpec("c", (), "float32")), ())  # fmt: skip
        assert [layout.name_at(coordinate) for coordinate in range(layout.coordinates)] == ["a", "a", "c"]

    @pytest.mark.parametrize(
        "other",
        [
            Layout((TensorSpec("v", (2, 3), "float32"),), (TensorSpec("n", (), "int64"),)),
            Layout((TensorSpec("w", (3, 2), "float32"),), (TensorSpec("n", (), "int64"),)),
            Layout((TensorSpec("w", (6,), "float32"),), (TensorSpec("n", (), "int64"),)),
            Layout((TensorSpec("w", (2, 3), "float32"),), (TensorSpec("n", (), "int32"),)),
            Layout((TensorSpec("w", (2, 3), "float32"),), (TensorSpec("n", (1,), "int64"),)),
            Layout((TensorSpec("w", (2, 3), "float32"),), ()),
            Layout((TensorSpec("w", (2, 3), "float32"), TensorSpec("n", (), "int64")), ()),
        ],
    )
    def test_the_digest_changes_with_name_shape_dtype_and_kind(self, other: Layout) -> None:
        layout = Layout((TensorSpec("w", (2, 3), "float32"),), (TensorSpec("n", (), "int64"),))
        assert layout.digest != other.digest
        assert len(layout.digest) == 32

    def test_the_digest_does_not_depend_on_values(self) -> None:
        assert Layout.of(small()).digest == Layout.of(small().eval().requires_grad_(False)).digest
        # Both ends must agree across versions: this value never changes.
        expected = hashlib.sha256(b'[[["weight",[1,2],"float32"],["bias",[1],"float32"]],[]]').digest()
        assert Layout.of(nn.Linear(2, 1)).digest == expected


class TestBuffers:
    def test_they_are_little_endian_in_order(self) -> None:
        expected = struct.pack("<3?2eq6d", True, False, True, 1.5, -2.5, 2**40 + 1, 0, 3, 1, 4, 2, 5)
        assert FlatModel(Odd()).buffers() == expected

    @pytest.mark.parametrize("make", [Odd, small])
    def test_round_trip(self, make: Callable[[], nn.Module]) -> None:
        model, other = FlatModel(make()), FlatModel(make())
        with torch.no_grad():
            for _, buffer in other.module.named_buffers():
                buffer.copy_(torch.ones_like(buffer))
        assert other.buffers() != model.buffers()
        other.load_buffers(model.buffers())
        assert other.buffers() == model.buffers()
        for (_, ours), (_, theirs) in zip(other.module.named_buffers(), model.module.named_buffers(), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("change", [-1, 1, 8])
    def test_a_wrong_size_is_refused_and_changes_nothing(self, change: int) -> None:
        model = FlatModel(small())
        before = model.buffers()
        wrong = before[:change] if change < 0 else before + bytes(change)
        with pytest.raises(PayloadError) as refused:
            model.load_buffers(wrong)
        assert refused.value.reason is Reason.SIZE
        assert model.buffers() == before

    def test_unpacked_tensors_own_their_memory(self) -> None:
        layout = Layout.of(small())
        data = bytearray(FlatModel(small()).buffers())
        unpacked = unpack_buffers(layout, data)
        before = pack_buffers(unpacked)
        data[:] = bytes(len(data))
        assert pack_buffers(unpacked) == before != bytes(data)

    def test_they_may_lie_at_an_odd_address(self) -> None:
        layout = Layout.of(Odd())
        data = FlatModel(Odd()).buffers()
        assert pack_buffers(unpack_buffers(layout, memoryview(b"x" + data)[1:])) == data


class TestSha256:
    def test_known_value(self) -> None:
        flat = torch.tensor([1.0, -2.0, 0.5])
        expected = hashlib.sha256(struct.pack("<3f", 1.0, -2.0, 0.5) + b"\x07\x00").hexdigest()
        assert model_sha256(flat, b"\x07\x00") == expected
        assert expected == "128bc9642c08cd7b4ba620f76377e15867798a0fcd3b9a76b6e4347e90477bc6"

    def test_every_bit_counts(self) -> None:
        flat = torch.tensor([1.0, 0.0, 3.0])
        found = {model_sha256(flat, b"ab"), model_sha256(flat, b"ac"), model_sha256(flat.flip(0), b"ab"),
                 model_sha256(torch.tensor([1.0, -0.0, 3.0]), b"ab"), model_sha256(flat[:2], b"ab"),
                 model_sha256(torch.nextafter(flat, torch.tensor(9.0)), b"ab")}  # fmt: skip
        assert len(found) == 6

    def test_memory_layout_does_not_count(self) -> None:
        flat = torch.arange(6.0)
        assert model_sha256(torch.stack([flat, -flat], 1)[:, 0], b"") == model_sha256(flat, b"")
        assert model_sha256(torch.empty(0), b"") == hashlib.sha256().hexdigest()
