"""Tasks: models, initial parameters, inputs, finding and reading data, loading by name."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ditherps.errors import DataMissingError, OptionError, UserError
from ditherps.tasks import Keys, ModelSpec, Recipe, Samples, Task, files, load_task, task_names
from ditherps.tasks.augment import center_crop, random_crop_flip

PARAMETERS = {
    ("digits", "mlp"): 19_210,
    ("digits", "cnn"): 38_282,
    ("mnist", "fc"): 266_610,
    ("mnist", "lenet"): 1_663_370,
    ("fashion-mnist", "fc"): 266_610,
    ("fashion-mnist", "lenet"): 1_663_370,
    ("cifar10", "cifarnet"): 1_068_298,
    ("cifar10", "resnet18"): 11_173_962,
}
STORED = {"digits": (8, 8), "mnist": (28, 28), "fashion-mnist": (28, 28), "cifar10": (3, 32, 32)}


def images(task: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 17 if task == "digits" else 256, (count, *STORED[task]), generator=generator).to(
        torch.uint8
    )


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, an empty cache, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_download", lambda source, root: "no network")
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


class TestModels:
    def test_every_model_is_counted_here(self) -> None:
        assert {(task, model) for task in task_names() for model in load_task(task).models} == set(PARAMETERS)

    @pytest.mark.parametrize(("task_name", "model"), PARAMETERS)
    def test_parameters_and_outputs(self, task_name: str, model: str) -> None:
        task = load_task(task_name)
        network = task.build(model, seed=3)
        assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[task_name, model]
        inputs = task.inputs(model, images(task_name, 2), None)
        assert inputs.dtype == torch.float32
        outputs = network.eval()(inputs)
        assert outputs.shape == (2, task.classes)
        assert task.loss(outputs, torch.tensor([0, 9])).ndim == 0

    @pytest.mark.parametrize("task_name", ["digits", "mnist", "cifar10"])
    def test_build_depends_on_the_seed_alone(self, task_name: str) -> None:
        task = load_task(task_name)

        def parameters(seed: int) -> Tensor:
            return nn.utils.parameters_to_vector(task.build(None, seed).parameters())

        first = parameters(7)
        torch.rand(11)
        assert torch.equal(first, parameters(7))
        assert not torch.equal(first, parameters(8))
        assert not torch.equal(first, parameters(7 + (1 << 32)))
        parameters(2**64 - 1)

    def test_build_leaves_the_global_generator_alone(self) -> None:
        torch.manual_seed(5)
        expected = torch.rand(4)
        torch.manual_seed(5)
        load_task("digits").build("cnn", seed=1)
        assert torch.equal(torch.rand(4), expected)

    def test_the_first_model_is_the_default(self) -> None:
        task = load_task("mnist")
        assert task.model() is task.models["fc"]
        assert task.recipe() == task.recipe("fc")

    def test_an_unknown_model_is_named(self) -> None:
        with pytest.raises(OptionError, match=r"model of task mnist = 'vgg'.*fc, lenet"):
            load_task("mnist").build("vgg", 1)

    def test_correct_counts(self) -> None:
        outputs = torch.eye(10)[[3, 1, 4]]
        assert load_task("digits").correct(outputs, torch.tensor([3, 1, 5])) == 2


class TestInputs:
    def test_digits_are_scaled_to_one(self) -> None:
        task = load_task("digits")
        stored = torch.tensor([0, 8, 16], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)
        assert task.inputs(None, stored, None)[:, 0, 0, 0].tolist() == [0.0, 0.5, 1.0]

    def test_grey_images_are_scaled_to_one(self) -> None:
        stored = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)
        assert load_task("mnist").inputs(None, stored, None)[:, 0, 0, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])

    def test_grey_images_are_never_augmented(self) -> None:
        task = load_task("mnist")
        stored = images("mnist", 4)
        keys = np.arange(4, dtype=np.uint64)
        assert torch.equal(task.inputs(None, stored, keys), task.inputs(None, stored, None))

    @pytest.mark.parametrize(("model", "side", "pad"), [("cifarnet", 24, 0), ("resnet18", 32, 4)])
    def test_cifar10_augments_by_the_key_alone(self, model: str, side: int, pad: int) -> None:
        task = load_task("cifar10")
        stored = images("cifar10", 8)
        keys = np.random.default_rng(2).integers(0, 2**64, 8, dtype=np.uint64)
        together = task.inputs(model, stored, keys)
        assert together.shape == (8, 3, side, side)
        alone = torch.cat([task.inputs(model, stored[i : i + 1], keys[i : i + 1]) for i in range(8)])
        assert torch.equal(together, alone)
        plain = task.inputs(model, stored, None)
        assert plain.shape == together.shape
        assert not torch.equal(plain, together)

    def test_crop_and_flip_are_exact(self) -> None:
        stored = images("cifar10", 3)
        top, left = 5, 2
        key = (top * 65536 + 65535) // 9 | ((left * 65536 + 65535) // 9) << 16
        keys = np.array([0, key, key | 1 << 63], dtype=np.uint64)
        cut = random_crop_flip(stored, keys, 24)
        assert cut.dtype == torch.uint8
        assert torch.equal(cut[0], stored[0, :, :24, :24])
        assert torch.equal(cut[1], stored[1, :, 5:29, 2:26])
        assert torch.equal(cut[2], stored[2, :, 5:29, 2:26].flip(2))

    def test_padding_is_zero(self) -> None:
        stored = images("cifar10", 1)
        cut = random_crop_flip(stored, np.zeros(1, np.uint64), 32, pad=4)
        assert not cut[:, :, :4].any()
        assert not cut[:, :, :, :4].any()
        assert torch.equal(cut[:, :, 4:, 4:], stored[:, :, :28, :28])

    def test_every_crop_is_equally_likely(self) -> None:
        keys = np.random.default_rng(3).integers(0, 2**64, 9_000, dtype=np.uint64)
        rows = torch.arange(32, dtype=torch.uint8).view(1, 1, 32, 1).expand(9_000, 1, 32, 32)
        tops = torch.bincount(random_crop_flip(rows, keys, 24)[:, 0, 0, 0].long(), minlength=9)
        lefts = random_crop_flip(rows.transpose(2, 3), keys, 24)[:, 0, 0]
        mirrored = lefts[:, 0] > lefts[:, -1]
        assert tops.min() > 850
        assert torch.bincount(lefts.min(1).values.long(), minlength=9).min() > 850
        assert abs(mirrored.double().mean() - 0.5) < 0.03

    def test_center_crop(self) -> None:
        stored = images("cifar10", 2)
        assert torch.equal(center_crop(stored, 24), stored[:, :, 4:28, 4:28])


class TestSamples:
    def test_columns_that_do_not_fit(self) -> None:
        with pytest.raises(UserError, match="labels must be int64 of shape"):
            Samples(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(UserError, match="groups must be int64"):
            Samples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(3))


class TestDigits:
    def test_the_split_is_stratified_and_complete(self) -> None:
        task = load_task("digits")
        train, test = (task.load(None, train=part) for part in (True, False))
        assert (len(train), len(test)) == (1442, 355)
        assert train.features.dtype == torch.uint8
        assert train.features.shape[1:] == (8, 8)
        assert int(train.features.max()) == 16
        share = torch.bincount(test.labels) / (torch.bincount(train.labels) + torch.bincount(test.labels))
        assert torch.all((share - 0.2).abs() < 0.01)

    def test_nothing_heavy_is_imported_before_data_is_read(self) -> None:
        script = (
            "import sys, ditherps.tasks as t\n"
            "for name in t.task_names(): t.load_task(name)\n"
            "t.load_task('digits').build(None, 1)\n"
            "print({'torchvision', 'sklearn', 'PIL'} & set(sys.modules))"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ended = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        assert ended.stdout.strip() == "set()"


def write_idx(path: Path, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], *, packed: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def write_mnist(root: Path, source: str = "MNIST", *, packed: bool = True) -> None:
    """Two training images and one test image."""
    for part, count in (("train", 2), ("t10k", 1)):
        pixels = np.arange(count * 784, dtype=np.int64).astype(np.uint8).reshape(count, 28, 28)
        write_idx(root / source / "raw" / f"{part}-images-idx3-ubyte", pixels, packed=packed)
        write_idx(root / source / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8), packed=packed)


class TestFindingData:
    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("below", ["mnist", "."])
    def test_mnist_in_both_layouts_packed_or_not(self, nowhere: Path, below: str, packed: bool) -> None:
        write_mnist(nowhere / below, packed=packed)
        train = load_task("mnist").load(nowhere, train=True)
        assert train.features.shape == (2, 28, 28)
        assert train.features[1, 0, :3].tolist() == [16, 17, 18]
        assert train.labels.tolist() == [0, 1]
        assert train.groups is None
        assert len(load_task("mnist").load(nowhere, train=False)) == 1

    def test_mnist_and_fashion_mnist_are_not_confused(self, nowhere: Path) -> None:
        write_mnist(nowhere)
        with pytest.raises(DataMissingError, match=r"^fashion-mnist: "):
            load_task("fashion-mnist").load(nowhere, train=True)

    def test_the_cache_is_looked_at_too(self, nowhere: Path) -> None:
        write_mnist(files.cache_dir())
        assert len(load_task("mnist").load(None, train=True)) == 2
        assert len(load_task("mnist").load(nowhere, train=True)) == 2

    @pytest.mark.parametrize("task_name", ["mnist", "fashion-mnist", "cifar10"])
    def test_missing_data_is_one_line_that_says_what_to_do(self, nowhere: Path, task_name: str) -> None:
        with pytest.raises(DataMissingError) as caught:
            load_task(task_name).load(nowhere, train=True)
        message = str(caught.value)
        assert "\n" not in message
        for part in (task_name, str(nowhere), str(files.cache_dir()), "no network", "--data-dir", "DITHERPS_DATA"):
            assert part in message

    def test_a_download_lands_in_the_data_directory(self, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def download(source: str, root: Path) -> str:
            write_mnist(root, source)
            return ""

        monkeypatch.setattr(files, "_download", download)
        write_mnist(nowhere)
        (nowhere / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
        assert len(load_task("mnist").load(nowhere, train=False)) == 1
        assert [entry.name for entry in nowhere.iterdir()] == ["MNIST"]

    def test_a_directory_that_cannot_be_written_falls_back_to_the_cache(
        self, nowhere: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def download(source: str, root: Path) -> str:
            write_mnist(root, source)
            return ""

        monkeypatch.setattr(files, "_download", download)
        blocked = nowhere / "file"
        blocked.touch()
        assert len(load_task("mnist").load(blocked / "data", train=True)) == 2
        assert (files.cache_dir() / "MNIST").is_dir()

    def test_a_download_that_hangs_ends(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_SCRIPT", "import time; time.sleep(60)")
        monkeypatch.setattr(files, "DOWNLOAD_TIMEOUT", 0.5)
        assert "not finished after" in files._download("MNIST", tmp_path)

    def test_a_download_that_fails_says_why_in_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "_SCRIPT", "raise RuntimeError('no route')")
        assert files._download("MNIST", tmp_path) == "RuntimeError: no route"

    @pytest.mark.parametrize("content", [b"", b"\0\0\x08\x03", b"not gzip at all", gzip.compress(b"\1\2\3\4", mtime=0)])
    def test_a_damaged_file_is_named(self, nowhere: Path, content: bytes) -> None:
        write_mnist(nowhere)
        path = nowhere / "MNIST/raw/train-images-idx3-ubyte.gz"
        path.write_bytes(content)
        with pytest.raises(DataMissingError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
            load_task("mnist").load(nowhere, train=True)

    def test_labels_that_do_not_fit_the_images(self, nowhere: Path) -> None:
        write_mnist(nowhere)
        write_idx(nowhere / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(5, np.uint8), packed=True)
        with pytest.raises(DataMissingError, match="do not fit"):
            load_task("mnist").load(nowhere, train=True)

    def test_damaged_batches_of_cifar10(self, nowhere: Path) -> None:
        folder = nowhere / "cifar10" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]:
            (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        with pytest.raises(DataMissingError, match="cifar-10-batches-py is not complete or damaged"):
            load_task("cifar10").load(nowhere, train=True)

    def test_sheets_of_cifar10(self, nowhere: Path) -> None:
        root = nowhere / "cifar10"
        root.mkdir()
        pixels = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        sheet = np.block([[[pixels[0]], [pixels[1]]], [[pixels[2]], [pixels[3]]]])
        Image.fromarray(sheet).save(root / "test_batch.webp", lossless=True, exact=True)
        with lzma.open(root / "index.tsv.xz", "wt") as index:
            index.writelines(f"test_batch\t{label}\tname.png\n" for label in (3, 1, 4, 1))
        test = load_task("cifar10").load(nowhere, train=False)
        assert test.labels.tolist() == [3, 1, 4, 1]
        assert np.array_equal(test.features.numpy(), pixels.transpose(0, 3, 1, 2))
        with pytest.raises(DataMissingError, match="packed images cannot be read"):
            load_task("cifar10").load(nowhere, train=True)


@pytest.fixture(scope="module")
def data_dir() -> Path:
    where = os.environ.get("DITHERPS_DATA")
    if not where:
        pytest.skip("DITHERPS_DATA does not point at a folder with datasets")
    return Path(where)


@pytest.mark.data
class TestRealData:
    def load(self, task_name: str, data_dir: Path, *, train: bool) -> Samples:
        try:
            return load_task(task_name).load(data_dir, train=train)
        except DataMissingError as error:
            pytest.skip(str(error))

    @pytest.mark.parametrize(
        ("task_name", "first", "counts", "mean", "deviation"),
        [
            (
                "mnist",
                [5, 0, 4, 1, 9, 2, 1, 3],
                [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
                0.1307,
                0.3081,
            ),
            ("fashion-mnist", [9, 0, 0, 3, 0, 2, 7, 2], [6000] * 10, 0.2860, 0.3530),
        ],
    )
    def test_mnist(
        self, data_dir: Path, task_name: str, first: list[int], counts: list[int], mean: float, deviation: float
    ) -> None:
        train = self.load(task_name, data_dir, train=True)
        assert train.features.shape == (60_000, 28, 28)
        assert train.labels[:8].tolist() == first
        assert torch.bincount(train.labels).tolist() == counts
        pixels = train.features.double() / 255
        assert (float(pixels.mean()), float(pixels.std())) == pytest.approx((mean, deviation), abs=5e-5)
        assert len(self.load(task_name, data_dir, train=False)) == 10_000

    def test_mnist_writers(self, data_dir: Path) -> None:
        train, test = (self.load("mnist", data_dir, train=part) for part in (True, False))
        if train.groups is None or test.groups is None:
            pytest.skip("the writers of MNIST are not in DITHERPS_DATA")
        assert len(train.groups.unique()) == 539  # type: ignore[no-untyped-call]
        assert len(test.groups.unique()) == 297  # type: ignore[no-untyped-call]
        sizes = np.unique_counts(train.groups.numpy()).counts
        assert [int(sizes.min()), int(sizes.max()), int(np.median(sizes))] == [19, 131, 116]

    def test_cifar10(self, data_dir: Path) -> None:
        train, test = (self.load("cifar10", data_dir, train=part) for part in (True, False))
        assert train.features.shape == (50_000, 3, 32, 32)
        assert test.features.shape == (10_000, 3, 32, 32)
        assert torch.bincount(train.labels).tolist() == [5_000] * 10
        assert torch.bincount(test.labels).tolist() == [1_000] * 10
        assert train.labels[:8].tolist() == [6, 9, 9, 4, 1, 1, 2, 7]
        assert test.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
        means = train.features.double().mean((0, 2, 3)) / 255
        assert means.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)


class Coin(Task):
    name = "coin"
    classes = 2
    models = {  # noqa: RUF012
        "linear": ModelSpec(
            lambda: nn.Linear(3, 2), lambda x, keys: x, Recipe(1, 1, {"name": "sgd"}, {"name": "cosine"})
        )
    }

    def load(self, data_dir: Path | None, *, train: bool) -> Samples:
        return Samples(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))

    def inputs(self, model: str | None, features: Tensor, keys: Keys | None) -> Tensor:
        return features


class TestLoadTask:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A module of the user in the working directory."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.delitem(sys.modules, "usertask", raising=False)
        return tmp_path / "usertask.py"

    def test_built_in_tasks_know_their_names(self) -> None:
        assert [load_task(name).name for name in task_names()] == task_names()

    def test_recipes_name_an_optimizer_and_a_schedule(self) -> None:
        for name, model in PARAMETERS:
            recipe = load_task(name).recipe(model)
            assert recipe.optimizer["name"] in {"sgd", "adam", "adamw"}
            assert recipe.schedule["name"] in {"constant", "cosine", "step", "exponential"}

    @pytest.mark.parametrize("spec", ["imagenet", "", ":", "module:", ":attribute"])
    def test_an_unknown_name_lists_what_exists(self, spec: str) -> None:
        with pytest.raises(OptionError, match="digits, mnist, fashion-mnist, cifar10, or module:attribute"):
            load_task(spec)

    def test_a_class_an_instance_or_a_factory_of_the_user(self, module: Path) -> None:
        module.write_text(f"from {__name__} import Coin\ninstance = Coin()\ndef factory():\n    return Coin()\n")
        for attribute in ("Coin", "instance", "factory"):
            assert load_task(f"usertask:{attribute}").name == "coin"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "AttributeError"),
            ("import does_not_exist", "ModuleNotFoundError: No module named 'does_not_exist'"),
            ("raise ValueError('two\\nlines')", "ValueError: two lines"),
            ("def", "SyntaxError"),
            ("task = 3", "is of type int, not a ditherps.tasks.Task"),
            ("def task(needed): ...", "TypeError"),
            ("from ditherps.tasks import Task as task", "TypeError"),
            ("from ditherps.tasks import Task\nclass task(Task):\n  load = None", "does not set name, classes, models"),
        ],
    )
    def test_a_mistake_in_the_users_module_is_one_line(self, module: Path, content: str, message: str) -> None:
        module.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            load_task("usertask:task")
        assert "\n" not in str(caught.value)
        assert "usertask:task" in str(caught.value)

    def test_a_missing_module(self) -> None:
        with pytest.raises(UserError, match="No module named 'no_such_module'"):
            load_task("no_such_module:task")
