"""Configuration: who beats whom, what is refused, and in what words."""

from __future__ import annotations

import contextlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditherps.cli import main
from ditherps.codecs import codec_names
from ditherps.config import (
    JobConfig,
    OptimizerConfig,
    ServerConfig,
    WorkerConfig,
    assignments,
    merged,
    read_job_file,
    validated,
)
from ditherps.errors import ExitCode, OptionError, UserError
from ditherps.job import resolve_job
from ditherps.options import job_flags
from ditherps.tasks import load_task, task_names


def job_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(text)
    return path


class TestPrecedence:
    def test_the_recipe_beats_the_defaults(self) -> None:
        recipe, job = load_task("digits").recipe(), resolve_job({}).config
        assert (job.rounds, job.batch_size) == (recipe.rounds, recipe.batch_size)
        assert job.optimizer.lr == recipe.optimizer["lr"] != JobConfig().optimizer.lr
        assert job.schedule.name == recipe.schedule["name"] != JobConfig().schedule.name
        assert job.codec == JobConfig().codec

    def test_the_file_beats_the_recipe_and_flags_beat_the_file(self, tmp_path: Path) -> None:
        path = job_file(tmp_path, "rounds = 7\nseed = 9\n[optimizer]\nlr = 0.5\n")
        recipe = load_task("digits").recipe()
        job = resolve_job({"seed": 11, "workers": None}, path).config
        assert (job.rounds, job.seed, job.workers) == (7, 11, JobConfig().workers)
        # A table is merged key by key: what the file does not say stays the recipe's.
        assert (job.optimizer.lr, job.optimizer.momentum) == (0.5, recipe.optimizer["momentum"])
        job = resolve_job({"optimizer": {"lr": 0.25}}, path).config
        assert (job.optimizer.lr, job.optimizer.momentum) == (0.25, recipe.optimizer["momentum"])

    def test_set_beats_what_the_environment_may_have_said(self) -> None:
        flags = job_flags(None, None, None, 5, None, None, None, None, None, ["rounds=9", "optimizer.lr=0.125"])
        job = resolve_job(flags).config
        assert (job.rounds, job.optimizer.lr) == (9, 0.125)

    def test_another_optimizer_drops_the_recipes_options(self, tmp_path: Path) -> None:
        recipe = load_task("digits").recipe()
        assert recipe.optimizer["name"] == "sgd"
        assert recipe.optimizer["momentum"] != 0
        job = resolve_job({"optimizer": {"name": "adam"}}).config
        assert (
            job.optimizer.model_dump()
            == JobConfig.model_validate({"optimizer": {"name": "adam"}}).optimizer.model_dump()
        )
        # The same name again drops nothing.
        assert resolve_job({"optimizer": {"name": "sgd"}}).config.optimizer.momentum == recipe.optimizer["momentum"]
        # A flag that renames drops the file's options too.
        path = job_file(tmp_path, "[optimizer]\nname = 'adam'\neps = 0.125\n")
        assert resolve_job({}, path).config.optimizer.eps == 0.125
        assert resolve_job({"optimizer": {"name": "adamw"}}, path).config.optimizer.eps == 1e-8

    def test_another_codec_drops_the_files_codec_options(self, tmp_path: Path) -> None:
        path = job_file(tmp_path, "codec = 'ndqsg'\n[codec_options]\nratio = 5\n")
        assert resolve_job({}, path).config.codec_options == {"ratio": 5}
        assert resolve_job({"codec": "ndqsg"}, path).config.codec_options == {"ratio": 5}
        assert resolve_job({"codec": "dqsg"}, path).config.codec_options == {}

    def test_the_model_chooses_the_recipe(self) -> None:
        job = resolve_job({"model": "cnn"}).config
        assert job.optimizer.lr == load_task("digits").recipe("cnn").optimizer["lr"]
        assert job.optimizer.lr != load_task("digits").recipe("mlp").optimizer["lr"]

    def test_mode_local_takes_the_recipes_steps_at_the_workers(self) -> None:
        recipe = load_task("digits").recipe()
        job = resolve_job({"mode": "local", "local": {"steps": 5}}).config
        assert job.rounds == recipe.rounds // 5
        assert job.local.lr == recipe.optimizer["lr"]
        assert (job.optimizer.name, job.optimizer.lr, job.schedule.name) == ("sgd", 1.0, "constant")

    @pytest.mark.parametrize(
        ("name", "own"),
        [
            ("sgd", {"lr": 1.0}),
            ("adam", {"lr": 0.001, "betas": (0.9, 0.999), "eps": 1e-8}),
            ("fedavgm", {"lr": 1.0, "momentum": 0.9}),
            ("fedadagrad", {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3}),
            ("fedadam", {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-3}),
            ("fedyogi", {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-3}),
        ],
    )
    def test_each_optimizer_has_defaults_of_its_own(self, name: str, own: dict[str, Any], tmp_path: Path) -> None:
        import tomli_w

        given = resolve_job({"mode": "local", "optimizer": {"name": name}}).config
        assert given.optimizer.model_dump() == OptimizerConfig().model_dump() | {"name": name} | own
        assert (given.schedule.name, given.local.lr) == ("constant", load_task("digits").recipe().optimizer["lr"])
        assert resolve_job({}, job_file(tmp_path, tomli_w.dumps(given.model_dump(mode="json")))).config == given
        # What is said beats them.
        said = resolve_job({"mode": "local", "optimizer": {"name": name, "lr": 0.5}}).config.optimizer
        assert said.model_dump() == given.optimizer.model_dump() | {"lr": 0.5}

    def test_a_resolved_job_written_to_a_file_resolves_to_itself(self, tmp_path: Path) -> None:
        import tomli_w

        job = resolve_job({"codec_options": {"ratio": 5}, "optimizer": {"name": "adam", "lr": 0.01}}).config
        again = resolve_job({}, job_file(tmp_path, tomli_w.dumps(job.model_dump(mode="json")))).config
        assert again == job

    def test_tables_of_the_server_and_the_worker_are_no_part_of_the_job(self, tmp_path: Path) -> None:
        resolved = resolve_job({}, job_file(tmp_path, "[server]\nport = 5\n[worker]\ndevice = 'cpu'\n"))
        assert (resolved.server, resolved.worker) == ({"port": 5}, {"device": "cpu"})
        assert resolved.config == resolve_job({}).config


tables = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from(["a", "b", "name"]), inner, max_size=3)
)
layers = st.dictionaries(st.sampled_from(["a", "b", "name"]), tables, max_size=3)


def leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


class TestMerged:
    @given(layers, layers)
    def test_everything_that_the_last_layer_says_holds(self, first: dict[str, Any], last: dict[str, Any]) -> None:
        before = repr((first, last))
        result = leaves(merged(first, last))
        assert {key: result[key] for key in leaves(last)} == leaves(last)
        assert set(result) <= set(leaves(first)) | set(leaves(last))
        assert repr((first, last)) == before

    @given(layers)
    def test_one_layer_is_itself(self, layer: dict[str, Any]) -> None:
        assert merged(layer) == layer
        assert merged(layer, {}) == merged({}, layer) == layer


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "named", "allowed"),
        [
            ({"workers": 0}, "workers = 0", "greater than or equal to 1"),
            ({"rounds": 2**32}, "rounds = 4294967296", "less than 4294967296"),
            ({"seed": -1}, "seed = -1", "greater than or equal to 0"),
            ({"mode": "fast"}, "mode = 'fast'", "'gradient', 'local', 'data' or 'auto'"),
            ({"quorum": 0}, "quorum = 0", "greater than 0"),
            ({"sample_fraction": 0}, "sample_fraction = 0", "greater than 0"),
            ({"sample_fraction": 1.5}, "sample_fraction = 1.5", "less than or equal to 1"),
            ({"workers": 4, "min_workers": 5}, "min_workers = 5", "at most workers = 4"),
            ({"min_workers": -1}, "min_workers = -1", "greater than or equal to 0"),
            ({"optimizer": {"name": "lion"}}, "optimizer.name = 'lion'", "'fedadam' or 'fedyogi'"),
            ({"optimizer": {"name": "adam", "momentum": 0.9}}, "optimizer.momentum = 0.9", "0.0 with adam"),
            ({"optimizer": {"name": "fedadam", "nesterov": True}}, "optimizer.nesterov = True", "False with fedadam"),
            ({"optimizer": {"name": "fedyogi", "weight_decay": 1}}, "optimizer.weight_decay = 1", "sgd, fedavgm, adam"),
            ({"optimizer": {"name": "fedavgm", "eps": 0.1}}, "optimizer.eps = 0.1", "1e-08 with fedavgm"),
            ({"optimizer": {"name": "adam", "betas": [0.9, 1]}}, "optimizer.betas.1 = 1", "less than 1"),
            ({"optimizer": {"momentum": 0, "nesterov": True}}, "optimizer.nesterov = True", "momentum above 0"),
            ({"local": {"lr": 0.1, "proximal_mu": 11}}, "local.proximal_mu = 11", "at most 1 / local.lr = 10"),
            ({"local": {"proximal_mu": -1}}, "local.proximal_mu = -1", "greater than or equal to 0"),
            ({"optimizer": {"momentum": 1.5}}, "optimizer.momentum = 1.5", "less than 1"),
            ({"optimizer": {"decay": 1}}, "optimizer.decay = 1", "weight_decay"),
            ({"split": {"kind": "sorted"}}, "split.kind = 'sorted'", "'iid', 'dirichlet' or 'key'"),
            ({"round": 5}, "round = 5", "rounds"),
            ({"task": "digit"}, "task = 'digit'", "digits, mnist"),
            ({"model": "vgg"}, "model of task digits = 'vgg'", "mlp, cnn"),
            ({"codec": "zip"}, "codec = 'zip'", ", ".join(codec_names())),
            ({"codec": "dqsg", "codec_options": {"levels": 0.3}}, "levels = 0.3", "0.5, 1, 1.5"),
            ({"codec": "dqsg", "codec_options": {"ratio": 3}}, "dqsg.ratio = 3", "levels"),
            ({"codec": "none", "codec_options": {"levels": 1}}, "none.levels = 1", "none"),
            ({"members": ["a", "b", "a"]}, "", "members must name each worker once: 3 names, workers = 4"),
            ({"members": ["a", "a", "b"], "workers": 2}, "", "members must name each worker once"),
            ({"members": ["a", "b", "c", "D/.."]}, "", "'D/..' is not a worker name"),
            ({"idle_timeout_seconds": 9, "round_deadline_seconds": 5}, "idle_timeout_seconds = 9", "must not exceed"),
        ],
    )  # fmt: skip
    def test_one_line_names_the_option_and_what_is_allowed(
        self, flags: dict[str, Any], named: str, allowed: str
    ) -> None:
        with pytest.raises(UserError) as refused:
            resolve_job(flags)
        message = str(refused.value)
        assert named in message
        assert allowed in message
        assert "\n" not in message
        assert refused.value.exit_code == ExitCode.USAGE

    @pytest.mark.parametrize(
        ("text", "says"), [("rounds = ", "is not valid TOML"), ("rounds = 'many'", "rounds = 'many'")]
    )
    def test_a_wrong_file_is_named(self, tmp_path: Path, text: str, says: str) -> None:
        with pytest.raises(UserError, match=says):
            resolve_job({}, job_file(tmp_path, text))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"nowhere\.toml does not exist"):
            read_job_file(tmp_path / "nowhere.toml")
        with pytest.raises(UserError, match="cannot be read"):
            read_job_file(tmp_path)

    @pytest.mark.parametrize(
        ("model", "values", "named"),
        [
            (ServerConfig, {"run_dir": ".", "port": 70_000}, "port = 70000"),
            (ServerConfig, {}, "run_dir"),
            (
                ServerConfig,
                {"run_dir": ".", "on_empty": "stay"},
                "on_empty = 'stay' is not allowed; allowed: 'exit' or 'wait'",
            ),
            (ServerConfig, {"run_dir": ".", "grace_seconds": -1}, "grace_seconds = -1"),
            (WorkerConfig, {"name": "Worker 1"}, "name = 'Worker 1'"),
            (WorkerConfig, {"device": "gpu"}, "device = 'gpu'"),
            (WorkerConfig, {"metric_port": 1}, "metric_port = 1"),
        ],
    )
    def test_server_and_worker(
        self, model: type[ServerConfig] | type[WorkerConfig], values: dict[str, Any], named: str
    ) -> None:
        with pytest.raises(OptionError) as refused:
            validated(model, values)
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)


class TestMembers:
    def test_default_names_are_numbered(self) -> None:
        assert JobConfig(workers=3).member_table == ("worker-0", "worker-1", "worker-2")

    def test_given_names_keep_their_order(self) -> None:
        assert JobConfig(workers=2, members=("zoe", "pool/1")).member_table == ("zoe", "pool/1")

    def test_a_run_evaluates_about_thirty_times_or_as_told(self) -> None:
        assert JobConfig(rounds=300).evaluation_interval == 10
        assert JobConfig(rounds=5).evaluation_interval == 1
        assert JobConfig(rounds=300, evaluate_every=7).evaluation_interval == 7


class TestAssignments:
    def test_values_are_toml_where_they_are_and_text_elsewhere(self) -> None:
        items = ["a=1", "b=0.5", "c=true", "d=[1, 2]", "e=adam", "f='1'", "g=", "h=x=y", "i=1_000", "j=1e-3"]
        expected = {"a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "adam", "f": "1", "g": "", "h": "x=y", "i": 1000,
                    "j": 1e-3}  # fmt: skip
        assert assignments(items, "--set") == expected

    def test_dots_go_into_tables_and_the_last_value_counts(self) -> None:
        items = ["optimizer.lr=1", "optimizer.momentum=0.5", "seed=1", "optimizer.lr=2", "seed=3"]
        assert assignments(items, "--set") == {"optimizer": {"lr": 2, "momentum": 0.5}, "seed": 3}

    @pytest.mark.parametrize("item", ["lr", "=1", ".a=1", "a.=1", "a..b=1"])
    def test_other_forms_are_refused(self, item: str) -> None:
        with pytest.raises(OptionError, match="NAME=VALUE"):
            assignments([item], "--set")

    @pytest.mark.parametrize("text", ["1\nseed = 2", "1 # x", "[[", "'", '"""', "{a=1}"])
    def test_nothing_leaves_its_own_name(self, text: str) -> None:
        assert set(assignments([f"a={text}"], "--set")) == {"a"}


class TestEnvironment:
    """`ditherps local` with an option that is refused: which value it names tells who won."""

    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert main(["local", *map(str, arguments)]) == ExitCode.USAGE
        output, error = capsys.readouterr()
        assert output == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert list(Path.cwd().glob("runs")) == []
        return error

    def test_the_environment_beats_the_file_and_flags_beat_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = job_file(tmp_path, "codec = 'of-the-file'\n")
        assert "'of-the-file'" in self.refused(capsys, "--config", path)
        monkeypatch.setenv("DITHERPS_CODEC", "of-the-environment")
        assert "'of-the-environment'" in self.refused(capsys, "--config", path)
        assert "'of-the-flag'" in self.refused(capsys, "--config", path, "--codec", "of-the-flag")

    def test_every_flag_of_the_job_has_its_variable(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        values = {"TASK": "no-task", "MODEL": "no-model", "WORKERS": "-3", "ROUNDS": "-4", "CODEC": "no-codec",
                  "CODEC_OPTION": "no_option=5", "MODE": "no-mode", "SEED": "-6"}  # fmt: skip
        for name, value in values.items():
            with monkeypatch.context() as one:
                one.setenv(f"DITHERPS_{name}", value)
                assert value.split("=")[0] in self.refused(capsys), name

    def test_a_repeatable_option_takes_several_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("DITHERPS_CODEC_OPTION", "levels=3 ratio=-2")
        assert "ndqsg.ratio = -2" in self.refused(capsys)

    def test_tables_of_the_ends_are_checked_before_anything_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for text, said in (
            ("[server]\nprot = 1\n", "server.prot = 1"),
            ("[worker]\ndevise = 'x'\n", "worker.devise = 'x'"),
            ("server = 5\n", "server = 5"),
        ):
            assert said in self.refused(capsys, "--config", job_file(tmp_path, text))

    def test_a_value_of_the_wrong_type_names_its_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["local", "--rounds", "many"]) == ExitCode.USAGE
        assert "--rounds" in capsys.readouterr().err

    def test_help_names_every_task_and_codec(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["local", "--help"]) == ExitCode.OK
        shown = capsys.readouterr().out
        for name in (*task_names(), *codec_names()):
            assert name in shown


class TestFilesThatHoldAnything:
    """A job file is the work of a person, and a worker's job that of a server: neither ends in anything but a line."""

    texts = st.one_of(
        st.binary(max_size=300),
        st.text("ab=[]{}.\"'\n#0123456789_-+einf ", max_size=120).map(str.encode),
        st.sampled_from([b"a = " + b"[" * 5000, b"a." * 3000 + b"b = 1", b"a = 1\n" * 2, b"a = 9" + b"9" * 5000]),
    )

    @given(texts)
    def test_bytes(self, content: bytes) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder, "job.toml")
            path.write_bytes(content)
            with contextlib.suppress(UserError):
                assert isinstance(read_job_file(path), dict)

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )

    @given(st.dictionaries(st.sampled_from([*JobConfig.model_fields, "x"]), values, max_size=4))
    def test_values(self, options: dict[str, Any]) -> None:
        with contextlib.suppress(UserError):
            validated(JobConfig, options)
