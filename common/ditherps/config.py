"""Configuration: one model per component, checked by name, merged from flags, job file, task recipe and defaults.

Precedence: flags (and the environment variables that stand for them) beat the job file, the job file beats the task's
recipe, the recipe beats the defaults.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ditherps.errors import OptionError, UserError
from ditherps.logs import LogFormat
from ditherps.text import one_line


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


WORKER_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
DEVICE = r"^(auto|cpu|cuda(:\d+)?)$"
Seconds = Annotated[float, Field(gt=0, le=7 * 86_400)]


_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.001},
    "adamw": {"lr": 0.001},
    "fedavgm": {"lr": 1.0, "momentum": 0.9},
    "fedadagrad": {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3},
    "fedadam": {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-3},
    "fedyogi": {"lr": 0.03, "betas": (0.9, 0.99), "eps": 1e-3},
}
"""Where an optimizer's defaults are others than its fields'."""
_OPTIMIZER_USES = {
    "momentum": ("sgd", "fedavgm"),
    "nesterov": ("sgd", "fedavgm"),
    "weight_decay": ("sgd", "fedavgm", "adam", "adamw"),
    "betas": ("adam", "adamw", "fedadagrad", "fedadam", "fedyogi"),
    "eps": ("adam", "adamw", "fedadagrad", "fedadam", "fedyogi"),
}
"""Who has a use for an option; the others take nothing but its default."""

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(_Config):
    """The server's optimizer: a class of torch.optim over the flat vector, or one of the federated ones.

    fedadagrad, fedadam, fedyogi: Reddi et al., "Adaptive federated optimization", arXiv 2003.00295, algorithm 2.
    fedavgm: Hsu, Qi, Brown, arXiv 1909.06335. Their defaults are meant for mode `local`, with whose updates FedAvg is
    sgd at a learning rate of 1.
    """

    name: Literal["sgd", "adam", "adamw", "fedavgm", "fedadagrad", "fedadam", "fedyogi"] = "sgd"
    lr: float = Field(0.1, gt=0)
    """Default: 0.1 of sgd, 0.001 of adam and adamw, 1 of fedavgm, 0.1 of fedadagrad, 0.03 of fedadam and fedyogi."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """sgd and fedavgm only; default: 0.9 of fedavgm."""
    nesterov: bool = False
    """sgd and fedavgm only; needs a momentum."""
    weight_decay: float = Field(0.0, ge=0)
    """Not of fedadagrad, fedadam and fedyogi."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Not of sgd and fedavgm; default: (0.9, 0.99) of fedadagrad, which uses the first only, fedadam and fedyogi."""
    eps: float = Field(1e-8, gt=0)
    """Not of sgd and fedavgm; of fedadagrad, fedadam and fedyogi it is the paper's tau, 0.001 by default."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_name(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and isinstance(values.get("name"), str):
            return {**_OPTIMIZER_DEFAULTS.get(values["name"], {}), **values}
        return values

    @field_validator(*_OPTIMIZER_USES)
    @classmethod
    def _of_use(cls, value: Any, info: ValidationInfo) -> Any:
        name, users = info.data.get("name"), _OPTIMIZER_USES[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].default
        if name is not None and name not in users and value != default:
            raise ValueError(f"{default} with {name}: it is an option of {', '.join(users)}")
        if info.field_name == "nesterov" and value and not info.data.get("momentum", 1):
            raise ValueError("true only with a momentum above 0")
        return value


class ScheduleConfig(_Config):
    """Learning-rate schedule over rounds: a class of torch.optim.lr_scheduler."""

    name: Literal["constant", "cosine", "step", "exponential"] = "constant"
    final_fraction: float = Field(0.0, ge=0, le=1)
    """cosine: the last learning rate, as a fraction of the first."""
    step_rounds: int = Field(100, ge=1)
    """step: rounds between two decays."""
    gamma: float = Field(0.9, gt=0, le=1)
    """step and exponential: factor of each decay."""


class LocalConfig(_Config):
    """Mode `local`: what a worker does between two rounds."""

    steps: int = Field(10, ge=1, le=1 << 20)
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx (Li et al., arXiv 1812.06127): each step also pulls w back to where the round began, by the gradient of
    mu/2 ||w - w_round||^2. At most 1 / lr, which takes it all the way back. 0: no pull."""

    @field_validator("proximal_mu")
    @classmethod
    def _does_not_overshoot(cls, value: float, info: ValidationInfo) -> float:
        lr = info.data.get("lr")
        if lr is not None and value * lr > 1:
            raise ValueError(f"at most 1 / local.lr = {1 / lr:g}")
        return value


class DownlinkConfig(_Config):
    """How the model w travels to the workers: in encoded steps, and whole to those who lack too many of them."""

    codec: str = ""
    """NAME or NAME:option=value,... of the steps; empty: the uplink's, fine enough for w to keep up
    with x. With `none` the model travels in float32."""
    history_steps: int = Field(1000, ge=0)
    """Most steps that the server keeps for workers that were away."""
    history_bytes: int = Field(256 << 20, ge=0)
    """Most bytes of them."""
    digest_every: int = Field(10, ge=1)
    """Versions between two checks that a worker's w is the server's. A worker that comes back is always checked."""
    snapshot: Literal["float32", "bf16"] = "float32"
    """bf16: both ends round w to bfloat16 at every `snapshot_every`-th version, and that version is the one that is
    sent whole, at half of the bytes, with the steps since."""
    snapshot_every: int = Field(100, ge=1)
    """Versions between two snapshots with `snapshot = "bf16"`; in float32 the newest version is sent."""


class SplitConfig(_Config):
    """How the training samples are dealt to the workers."""

    kind: Literal["iid", "dirichlet", "key"] = "iid"
    alpha: float = Field(0.3, gt=0)
    """dirichlet: the smaller, the more a worker's labels differ from the others'."""


class DataConfig(_Config):
    """Mode `data`: quantized samples instead of gradients (Hanna et al., arXiv 2012.07913)."""

    level: int = Field(2, ge=0, le=15)
    """Bits of a feature; as deep as its own bits it is lossless."""
    refine: str = ""
    """NAME or NAME:option=value,... of the codec in which a worker also sends the difference between its gradient and
    that at the quantized samples, which makes the estimate unbiased; empty: it does not."""
    keep: float = Field(1.0, ge=1 / 16, le=1)
    """Share of a batch's samples that a worker sends: those that matter more to the gradient more often. 1: all."""
    cache_bytes: int = Field(1 << 30, ge=0)
    """What the server keeps of samples, so that they need not be sent again; the least recently used go first."""
    probe_every: int = Field(100, ge=1)
    """With `refine`: rounds between two probes of whether server and worker compute the same gradient."""
    probe_limit: float = Field(0.01, gt=0, allow_inf_nan=False)
    """Relative error between the two above which a contribution is refused: it would be a bias."""


_AGGREGATION_USES = {"trim": "trimmed_mean", "attackers": "krum", "chosen": "krum"}


class AggregationConfig(_Config):
    """How a round's contributions become one update. All but `weighted_mean` count every worker alike.

    median and trimmed_mean: coordinate by coordinate (Yin et al., arXiv 1803.01498). krum: Blanchard et al., "Machine
    learning with adversaries", NIPS 2017.
    """

    name: Literal["weighted_mean", "mean", "median", "trimmed_mean", "krum"] = "weighted_mean"
    """weighted_mean: by samples."""
    trim: float = Field(0.125, ge=0, le=0.45)
    """trimmed_mean: share of the contributions that is cut at each end of each coordinate, rounded up: one of eight."""
    attackers: int = Field(1, ge=1)
    """krum: how many hostile workers it must withstand, f; takes at least 2 f + 3 contributions."""
    chosen: int = Field(1, ge=1)
    """krum: how many of the best contributions are averaged (multi-krum); at most those but f + 2."""

    @field_validator(*_AGGREGATION_USES)
    @classmethod
    def _of_use(cls, value: Any, info: ValidationInfo) -> Any:
        name, user = info.data.get("name"), _AGGREGATION_USES[str(info.field_name)]
        default = cls.model_fields[str(info.field_name)].default
        if name is not None and name != user and value != default:
            raise ValueError(f"{default} with {name}: it is an option of {user}")
        return value

    @property
    def robust(self) -> bool:
        """Whether one hostile contribution among many has only a bounded effect."""
        return self.name in ("median", "krum") or (self.name == "trimmed_mean" and self.trim > 0)


class JobConfig(_Config):
    """Everything that a run is a function of, besides the data and who took part."""

    task: str = "digits"
    """A built-in task, or `module:attribute`."""
    model: str = ""
    """One of the task's models; empty: its default."""
    workers: int = Field(4, ge=1, le=100_000)
    members: tuple[str, ...] = ()
    """Names of the workers, in the order of their index; empty: worker-0, worker-1, ...; POOL/* alone: POOL/0,
    POOL/1, ..."""
    rounds: int = Field(300, ge=1, lt=2**32)
    mode: Literal["gradient", "local", "data", "auto"] = "gradient"
    """auto: `data` or `gradient`, whichever takes fewer bits."""
    codec: str = "ndqsg"
    codec_options: dict[str, Any] = Field(default_factory=dict)
    error_feedback: bool = False
    """Each worker adds what compression lost of an update to its next one. Needs a contractive codec, such as scaled,
    signsgd or topk. A worker that is started again begins without what it carried."""
    downlink: DownlinkConfig = DownlinkConfig()
    seed: int = Field(1, ge=0, lt=2**64)
    batch_size: int = Field(32, ge=1, le=1 << 20)
    """Samples of a worker in one step."""
    local: LocalConfig = LocalConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    split: SplitConfig = SplitConfig()
    aggregation: AggregationConfig = AggregationConfig()
    max_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Largest L2 norm of a contribution: one beyond it is refused. 0: no limit."""
    max_norm_ratio: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The same as a multiple of the median norm of the round's sources, checked when the round closes. 0: no limit."""
    max_weight: int = Field(0, ge=0, lt=2**40)
    """Most samples that a contribution may say stand behind it; 0: those of the job's own batches."""
    evaluate_every: int = Field(0, ge=0)
    """Rounds between two evaluations; 0: about 30 in a run."""
    evaluator: Literal["auto", "server", "worker"] = "auto"
    """`auto`: the server where it has test data, else the lowest worker present."""
    compute_threads: int = Field(1, ge=1, le=256)
    """Threads of torch in a worker: its results depend on them."""
    sample_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the present workers that a round invites, rounded up. Which ones follows from seed, round and who is
    present."""
    min_workers: int = Field(0, ge=0)
    """How many workers have to be present for a round to open. 0: all of them for the first one, after
    `join_timeout_seconds` and for later ones a quorum."""
    quorum: float = Field(1.0, gt=0, le=1)
    """Share of each role's invited workers without whose contributions a round is not closed."""
    join_timeout_seconds: Seconds = 120.0
    """How long the server waits for the workers without whom no round can open or close."""
    round_deadline_seconds: Seconds = 600.0
    """How long a round waits for contributions."""
    idle_timeout_seconds: Seconds = 60.0
    """How long either end stays silent before it is taken for gone."""
    nested_failure_limit: float = Field(0.9, ge=0, le=1)
    """Share of failed nested tiles above which the run warns. A tile of 4096 coordinates fails with a single one of
    them, so at ratio 3 a share of one half is common on IID shards, and harmless there."""
    staging_bytes: int = Field(4 << 30, ge=1)
    """Most bytes of contributions that the server holds at once."""

    @field_validator("min_workers")
    @classmethod
    def _no_more_than_there_are(cls, value: int, info: ValidationInfo) -> int:
        workers = info.data.get("workers")
        if workers is not None and value > workers:
            raise ValueError(f"at most workers = {workers}")
        return value

    @model_validator(mode="after")
    def _members_named(self) -> JobConfig:
        table = self.member_table
        if not len(table) == len(set(table)) == self.workers:
            raise ValueError(f"members must name each worker once: {len(table)} names, workers = {self.workers}")
        for name in table:
            if not WORKER_NAME.fullmatch(name):
                raise ValueError(f"members: {name!r} is not a worker name; allowed: {WORKER_NAME.pattern}")
        return self

    @model_validator(mode="after")
    def _timeouts_in_order(self) -> JobConfig:
        if self.idle_timeout_seconds > self.round_deadline_seconds:
            raise ValueError(
                f"idle_timeout_seconds = {self.idle_timeout_seconds:g} must not exceed round_deadline_seconds = "
                f"{self.round_deadline_seconds:g}: a silent worker would hold every round to its deadline"
            )
        return self

    @model_validator(mode="after")
    def _weight_possible(self) -> JobConfig:
        if self.max_weight and self.max_weight < self.batch_samples:
            raise ValueError(
                f"max_weight = {self.max_weight} must not be below {self.batch_samples}, the samples of a contribution"
            )
        return self

    @model_validator(mode="after")
    def _no_update_to_correct(self) -> JobConfig:
        if self.mode == "data" and self.error_feedback:
            raise ValueError('error_feedback = true is not for mode = "data", whose refinement has to be unbiased')
        return self

    @property
    def member_table(self) -> tuple[str, ...]:
        """Names of the workers: a worker's index is the position of its name."""
        if len(self.members) == 1 and self.members[0].endswith("/*"):
            return tuple(f"{self.members[0][:-1]}{index}" for index in range(self.workers))
        return self.members or tuple(f"worker-{index}" for index in range(self.workers))

    @property
    def weight_limit(self) -> int:
        """Most samples that a contribution may claim."""
        return self.max_weight or self.batch_samples

    @property
    def batch_samples(self) -> int:
        """Samples behind a contribution of the job's own batches."""
        return self.batch_size * (self.local.steps if self.mode == "local" else 1)

    @property
    def uplink(self) -> str:
        """What a contribution is encoded in: the codec's name, and in mode `data` samples and how they are refined."""
        if self.mode != "data":
            return self.codec
        return f"samples+{self.data.refine.partition(':')[0]}" if self.data.refine else "samples"

    @property
    def evaluation_interval(self) -> int:
        """Rounds between two evaluations."""
        return self.evaluate_every or max(1, self.rounds // 30)


class LimitsConfig(_Config):
    """What a server bears, beside the sizes that follow from its job.

    A limit of one worker holds for each identity, as often as that has members (one pool's certificate may serve many).
    """

    joins_per_second: float = Field(100.0, gt=0, le=1e6)
    """Joins of all workers, after a first burst."""
    join_burst: int = Field(1000, ge=1)
    """Joins that are let through at once."""
    worker_joins_per_second: float = Field(1.0, gt=0, le=1e6)
    worker_join_burst: int = Field(20, ge=1)
    worker_streams: int = Field(16, ge=1)
    """Pushes at once of one worker, and as many that have not said yet whose they are: all but the newest are over,
    or about to be."""
    worker_pulls: int = Field(2, ge=1)
    """Pulls at once of one worker: each may hold a whole model in memory."""
    window_bytes: int = Field(0, ge=0, le=64 << 20)
    """How much of a push the server takes ahead; 0: about a chunk. A worker's uplink carries about that much a round
    trip, so a far and fast link wants more, which costs the server as much memory for each worker."""


class ServerConfig(_Config):
    """Where a server listens and what it leaves behind; nothing here changes a run's result, but for `device`."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535)
    """0: any free port."""
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(9464, ge=-1, le=65535)
    """0: any free port; -1: none."""
    run_dir: Path
    data_dir: Path | None = None
    init: Path | None = None
    """A safetensors file with the first parameters (and buffers)."""
    threads: int = Field(0, ge=0, le=1024)
    """Threads that decode; 0: as many as cores."""
    heartbeat_seconds: Seconds = 5.0
    checkpoint_every: int = Field(0, ge=0)
    """Rounds between two checkpoints; 0: about 20 in a run, at least 10 rounds apart. One is written on SIGTERM
    and on an interrupt too. Room for two is needed."""
    resume: bool = False
    """Go on from the checkpoint and the redo log in `run_dir`, where there is one."""
    durability: Literal["round", "none"] = "round"
    """round: a contribution is acknowledged, and a round closed, when it is on disk: a server that is killed loses
    nothing that it had acknowledged. none: it loses the rounds since its checkpoint."""
    redo_bytes: int = Field(1 << 30, ge=1)
    """Length of the redo log above which a checkpoint is written sooner, which cuts the log."""
    on_empty: Literal["exit", "wait"] = "exit"
    """Too few workers for `join_timeout_seconds`: end the run, or go on waiting without a limit."""
    grace_seconds: float = Field(20.0, ge=0, le=7 * 86_400)
    """On SIGTERM: how long the open round may still take to close. Whoever sent it (docker stop, Kubernetes) has to
    allow at least 10 seconds more before it kills."""
    certs: Path | None = None
    """Folder with ca.pem, cert.pem and key.pem: workers have to show a certificate of this authority."""
    token_file: Path | None = None
    """Names and hashes of tokens, with `certs`: workers have to show one of these instead."""
    insecure: bool = False
    """Allow plaintext beyond this machine."""
    reflection: bool = False
    limits: LimitsConfig = LimitsConfig()
    health_socket: Path | None = None
    """Serve on this Unix socket too, in plaintext: for health checks beside a server that asks for certificates."""
    device: str = Field("auto", pattern=DEVICE)
    """Where gradients are computed in mode `data`. Another kind of device rounds otherwise: a job that goes on on one
    has another result than it would have had."""
    cache_dir: Path | None = None
    """Mode `data`: a folder for the samples that the server keeps; None: in memory. The checkpoint holds them too."""
    keep_cache: bool = False
    """Mode `data`: leave them in the run folder at the end of the job, where another one with the same seed finds them;
    else they are wiped."""
    log_format: LogFormat = "text"
    tensorboard: Path | None = None
    """Folder for TensorBoard's event files."""


class WorkerConfig(_Config):
    """One worker: whom it talks to, what it computes on."""

    server: str = "127.0.0.1:50051"
    """HOST:PORT, or @FILE: the server.json of a server on this machine, which may be about to start."""
    name: str = Field("", pattern=r"^([a-z0-9][a-z0-9._/-]{0,62})?$")
    """A name of the job's member table; empty: the lowest that is free."""
    task: str = ""
    """Empty: the built-in task that the server's job names. A `module:attribute` is only taken from here."""
    device: str = Field("auto", pattern=DEVICE)
    allow_data: bool = False
    """Let a server that trains in mode `data` see this worker's samples and labels."""
    max_data_level: int = Field(15, ge=0, le=15)
    """With `allow_data`: the finest level, in bits of a feature, at which samples may leave this worker."""
    data_dir: Path | None = None
    metrics_host: str = "127.0.0.1"
    metrics_port: int = Field(-1, ge=-1, le=65535)
    """0: any free port; -1: none."""
    state_dir: Path | None = None
    """Where the worker keeps the key of its lease and, with error feedback, the error that it carries: one that is
    started again goes on as if it had not been away."""
    connect_timeout_seconds: Seconds = 60.0
    max_model_bytes: int = Field(16 << 30, ge=1)
    certs: Path | None = None
    """Folder with ca.pem, and with cert.pem and key.pem unless the server asks for a token."""
    token: SecretStr = SecretStr("")
    """A token, or @FILE."""
    insecure: bool = False
    log_format: LogFormat = "text"


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], values: Mapping[str, Any], prefix: str = "") -> Model:
    """`values` as a `model`; raises `OptionError` with the first wrong option's name, its value and what is allowed.

    `prefix` stands before the option's name.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise option_error(error, allowed_options=model, prefix=prefix) from None


def option_error(
    error: ValidationError, *, allowed_options: type[BaseModel] | None = None, prefix: str = ""
) -> UserError:
    """The first mistake that pydantic found, as one line."""
    first = error.errors(include_url=False)[0]
    name = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(allowed_options, first["loc"][:-1])) if allowed_options else []
        return OptionError(name, first["input"], allowed or "no such option")
    if not first["loc"]:
        return UserError(str(first["msg"]).removeprefix("Value error, "))
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return OptionError(name, first["input"], message)


def _fields_at(model: type[BaseModel], path: Sequence[int | str]) -> Sequence[str]:
    for part in path:
        inner = model.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One nested mapping of all layers; the later beats the earlier, table by table.

    A layer that changes a table's `name` (another optimizer, another schedule) drops what earlier layers said there.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            old = result.get(key)
            if isinstance(value, Mapping) and isinstance(old, dict):
                renamed = "name" in value and value["name"] != old.get("name")
                result[key] = merged({} if renamed else old, value)
            else:
                result[key] = merged(value) if isinstance(value, Mapping) else value
    return result


def read_job_file(path: Path) -> dict[str, Any]:
    """The tables of a TOML job file; raises `UserError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"job file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"job file {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8, or nested without end
        raise UserError(f"job file {path} is not valid TOML: {one_line(str(error))}") from None


def assignments(items: Sequence[str], option: str) -> dict[str, Any]:
    """Nested mapping of `NAME=VALUE` items; dots in a name go into tables; raises `OptionError` on another form.

    Values are read as TOML where they are (numbers, booleans, lists), else taken as text.
    """
    result: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not all(name.split(".")):
            raise OptionError(option, item, "NAME=VALUE")
        table: dict[str, Any] = {}
        inner = table
        *path, last = name.split(".")
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = _value(text)
        result = merged(result, table)
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
