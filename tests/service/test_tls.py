"""A server and its workers over TLS: who is let in, who is not, and what those are told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ditherps import wire
from ditherps.config import JobConfig, WorkerConfig
from ditherps.errors import ExitCode, HandshakeError, Reason, RefusedError, UserError
from ditherps.gradient import make_deterministic
from ditherps.metrics import WorkerMetrics
from ditherps.security.certificates import Authority, read_certificate
from ditherps.security.credentials import Files
from ditherps.security.probe import probe
from ditherps.security.tokens import TokenFile, hashed, make_token
from ditherps.status import fetch_status
from ditherps.v1 import parameter_server_pb2 as pb
from ditherps.v1 import types_pb2
from ditherps_worker.client import Client
from ditherps_worker.compute import Computer
from ditherps_worker.connection import check_plaintext
from ditherps_worker.loop import Loop
from tests import authorities
from tests.service import harness
from tests.service.inprocess import CALL_SECONDS, Peer, Refused, Served, serving
from tests.service.simulation import simulated
from tests.tiny import Tiny

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make_deterministic(1)
    return authorities.make(tmp_path_factory.mktemp("certs"))


async def worker(address: str, certs: Path | None = None, **options: Any) -> types_pb2.JobResult:
    """One worker from Join to the end of the job."""
    config = WorkerConfig.model_validate(
        {"server": address, "task": "tiny", "connect_timeout_seconds": 10, "certs": certs, **options}
    )
    client = Client(config, wire.WireMeter())

    def make_computer(job: JobConfig, index: int) -> Computer:
        return Computer(job, index, Tiny(), None, torch.device("cpu"))

    try:
        return await Loop(config, client, make_computer, WorkerMetrics("test")).run()
    finally:
        await client.close()


async def refusal(address: str, certs: Path | None = None, **options: Any) -> Reason:
    """Why a worker is not let in; its message is one line."""
    began = time.monotonic()
    with pytest.raises((HandshakeError, RefusedError)) as refused:
        await worker(address, certs, **options)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) > 30
    assert time.monotonic() - began < 8  # long before it gives up
    assert isinstance(refused.value, (HandshakeError, RefusedError))
    return refused.value.reason


async def finished(served: Served, workers: Sequence[types_pb2.JobResult]) -> None:
    """The run is over, and its model is the one that it should be."""
    run = await served.running
    expected = simulated(served.job, Tiny())
    assert {result.model_sha256 for result in workers} == {run.model_sha256} == {expected}
    assert run.contributions == served.job.rounds * served.job.workers


def mutual(folders: Path, **options: Any) -> dict[str, Any]:
    return {"certs": folders / "server", **options}


async def test_a_run_over_mutual_tls(tmp_path: Path, folders: Path) -> None:
    async with serving(tmp_path, server=mutual(folders), metrics=True, model="norm", rounds=4) as served:
        own = folders / "workers"
        async with Peer(served.address, own / "worker-1") as peer:
            await peer.join()
            status = await asyncio.to_thread(fetch_status, served.address, own / "worker-0")
            assert [member.worker for member in status.members] == ["worker-1"]
        for name, path in (("own", "server/cert.pem"), ("ca", "ca.pem")):
            ends = await served.metric(f'ditherps_certificate_expiry_timestamp_seconds{{certificate="{name}"}}')
            assert ends == read_certificate(folders / path).not_valid_after_utc.timestamp()
        first = worker(served.address, own / "worker-0", name="worker-0")
        second = worker(served.address, own / "worker-1")  # without a name it has its certificate's
        await finished(served, await asyncio.gather(first, second))


async def test_strangers_are_told_why_and_harm_nobody(tmp_path: Path, folders: Path) -> None:
    """All at once, at one server, whose run goes on to its end."""
    own, bad = folders / "workers", folders / "bad"
    async with serving(tmp_path, server=mutual(folders, host="0.0.0.0"), metrics=True) as served:
        port = served.address.rpartition(":")[2]
        at, elsewhere = f"127.0.0.1:{port}", f"127.0.0.2:{port}"
        rows: list[tuple[Reason, str, Path | None, str]] = [
            (Reason.WRONG_CA, at, folders / "other/workers/worker-0", "worker-0"),
            (Reason.CERTIFICATE_REFUSED, at, bad / "mixed", "worker-0"),
            (Reason.CERTIFICATE_EXPIRED, at, bad / "expired-worker-0", "worker-0"),
            (Reason.CERTIFICATE_NOT_YET_VALID, at, bad / "early-worker-0", "worker-0"),
            (Reason.WRONG_HOST, elsewhere, own / "worker-0", "worker-0"),
            (Reason.NO_CERTIFICATE, at, folders, "worker-0"),
            (Reason.CERTIFICATE_REFUSED, at, folders / "server", "worker-0"),
            (Reason.TLS_SERVER, at, None, "worker-0"),
            (Reason.IDENTITY_MISMATCH, at, own / "worker-0", "worker-1"),
            (Reason.IDENTITY_MISMATCH, at, folders / "pools/gpu", "worker-1"),
            (Reason.UNKNOWN_MEMBER, at, own / "gpu+0", ""),
            (Reason.UNKNOWN_MEMBER, at, folders / "pools/gpu", ""),
        ]
        found = await asyncio.gather(*(refusal(address, certs, name=name) for _, address, certs, name in rows))
        assert found == [row[0] for row in rows]
        assert await served.metric('ditherps_refused_rpcs_total{reason="identity_mismatch"}') == 2
        status = await asyncio.to_thread(fetch_status, at, own / "worker-0")
        assert list(status.members) == []
        await finished(served, await asyncio.gather(*(worker(at, own / f"worker-{index}") for index in range(2))))


@pytest.mark.parametrize(
    ("at", "reason"),
    [
        ("bad/expired-server", Reason.SERVER_EXPIRED),
        ("bad/early-server", Reason.SERVER_NOT_YET_VALID),
        ("other/server", Reason.WRONG_CA),
        (None, Reason.PLAINTEXT_SERVER),
    ],
)
async def test_a_server_that_a_worker_does_not_trust(
    tmp_path: Path, folders: Path, at: str | None, reason: Reason
) -> None:
    async with serving(tmp_path, server={"certs": folders / at} if at else {}) as served:
        assert await refusal(served.address, folders / "workers/worker-0") is reason


async def test_nobody_speaks_for_another(tmp_path: Path, folders: Path) -> None:
    """A session is a small number, easily guessed: it is worth nothing without its certificate."""
    own = folders / "workers"
    async with (
        serving(tmp_path, server=mutual(folders)) as served,
        Peer(served.address, own / "worker-0") as first,
        Peer(served.address, own / "worker-1") as second,
    ):
        await first.join()
        await second.join()
        plan = await first.plan()
        update = first.update(plan)
        fence, second.joined = second.fence, first.joined
        attempts = [
            second.stub.Heartbeat(pb.HeartbeatRequest(fence=second.fence), timeout=CALL_SECONDS),
            second.stub.Leave(pb.LeaveRequest(fence=second.fence), timeout=CALL_SECONDS),
            second.stub.Report(pb.ReportRequest(fence=second.fence), timeout=CALL_SECONDS),
        ]
        for attempt in attempts:
            with pytest.raises(Exception, match="this session is worker-0's, the caller is worker-1"):
                await attempt
        for other in (second.pull(0), second.push(second.header(plan, update), update)):
            with pytest.raises(Refused) as refused:
                await other
            assert refused.value.reason is Reason.IDENTITY_MISMATCH
        with pytest.raises(Exception, match="this session is worker-0's"):
            await second.watch().read()
        assert first.fence.session != fence.session
        assert await first.states() == ["computing", "computing"]
        assert (await first.push(first.header(plan, update), update)).HasField("accepted")


async def test_a_pool_shares_one_certificate(tmp_path: Path, folders: Path) -> None:
    """Its members lease the lowest free slots under keys of their own, and no slot of others."""
    pool, members = folders / "pools/gpu", ["worker-0", "gpu/0", "gpu/1"]
    async with serving(tmp_path, server=mutual(folders), members=members, workers=3) as served:
        async with Peer(served.address, pool) as first, Peer(served.address, pool) as second:
            assert (await first.join(lease_key=b"one")).index == 1
            assert (await second.join(lease_key=b"two")).index == 2
            with pytest.raises(Refused) as refused:
                await Peer(served.address, pool).join(lease_key=b"three")
            assert (refused.value.reason, refused.value.message) == (
                Reason.MEMBERS_FULL, "all 2 members of gpu/* of this job are here",
            )  # fmt: skip
            assert (await first.join(lease_key=b"one")).index == 1
        results = await asyncio.gather(
            worker(served.address, pool, name="gpu/1"),
            worker(served.address, folders / "workers/gpu+0"),
            worker(served.address, folders / "workers/worker-0"),
        )
        await finished(served, results)


async def test_a_job_that_is_one_pool(tmp_path: Path, folders: Path) -> None:
    """As many workers as there are, all with the same folder."""
    async with serving(tmp_path, server=mutual(folders), members=["gpu/*"], workers=3) as served:
        assert served.job.member_table == ("gpu/0", "gpu/1", "gpu/2")
        await finished(served, await asyncio.gather(*(worker(served.address, folders / "pools/gpu") for _ in range(3))))


async def test_tokens(tmp_path: Path, folders: Path) -> None:
    """The server shows a certificate, a worker its token; a folder with ca.pem is all that it needs besides."""
    file = tmp_path / "tokens"
    tokens = {name: make_token(name, file) for name in ("worker-0", "worker-1", "gpu/*")}
    (tmp_path / "token").write_text(tokens["worker-1"] + "\n")
    trust = tmp_path / "trust"
    trust.mkdir()
    (trust / "ca.pem").write_bytes((folders / "ca.pem").read_bytes())
    async with serving(tmp_path, server=mutual(folders, token_file=file), metrics=True) as served:
        at = served.address
        rows = [
            (Reason.TOKEN_INVALID, trust, {"token": "worker-0:wrong", "name": "worker-0"}),
            (Reason.TOKEN_INVALID, trust, {"token": tokens["worker-0"].replace("-0", "-1")}),
            (Reason.TOKEN_INVALID, trust, {"token": "nobody:" + tokens["worker-0"].partition(":")[2]}),
            (Reason.UNAUTHENTICATED, trust, {"name": "worker-0"}),
            (Reason.UNAUTHENTICATED, folders / "workers/worker-0", {}),
            (Reason.IDENTITY_MISMATCH, trust, {"token": tokens["worker-0"], "name": "worker-1"}),
            (Reason.UNKNOWN_MEMBER, trust, {"token": tokens["gpu/*"]}),
            (Reason.TLS_SERVER, None, {"name": "worker-0"}),
        ]
        found = await asyncio.gather(*(refusal(at, certs, **options) for _, certs, options in rows))
        assert found == [row[0] for row in rows]
        assert await served.metric('ditherps_refused_rpcs_total{reason="token_invalid"}') == 3

        async with Peer(at, trust) as stranger:
            with pytest.raises(Refused) as refused:
                await stranger.status()
            assert refused.value.reason is Reason.UNAUTHENTICATED
        with pytest.raises(RefusedError, match="the server asks for a token"):
            await asyncio.to_thread(fetch_status, at, trust)
        assert (await asyncio.to_thread(fetch_status, at, trust, tokens["gpu/*"])).task == "tiny"
        async with (
            Peer(at, trust, tokens["worker-0"]) as first,
            Peer(at, trust, tokens["worker-1"]) as second,
        ):
            counted = [(await first.status()).uplink_bytes for _ in range(2)]
            header = len(wire.TOKEN_KEY) + len(tokens["worker-0"]) + wire.TOKEN_PREFIX_BYTES
            rpc = wire.RPC_UPLINK_BYTES + wire.MESSAGE_PREFIX_BYTES + header
            assert (counted[1] - counted[0], first.meter.traffic.uplink_bytes) == (rpc, 2 * rpc)
            await first.join()
            second.joined = first.joined
            with pytest.raises(Refused) as refused:
                await second.pull(0)
            assert refused.value.reason is Reason.IDENTITY_MISMATCH
        results = await asyncio.gather(
            worker(at, trust, token=tokens["worker-0"]), worker(at, trust, token=f"@{tmp_path / 'token'}")
        )
        await finished(served, results)


async def test_a_token_is_taken_back_and_another_given_while_the_server_runs(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has a session is out with the next message, its watch with the next change; nothing else ends."""
    monkeypatch.setattr(TokenFile, "LOOK_SECONDS", 0.0)
    file = tmp_path / "tokens"
    tokens = {name: make_token(name, file) for name in ("worker-0", "worker-1")}
    async with (
        serving(tmp_path, server=mutual(folders, token_file=file)) as served,
        Peer(served.address, folders, tokens["worker-0"]) as first,
        Peer(served.address, folders, tokens["worker-1"]) as second,
    ):
        await first.join()
        watch = first.watch()
        await watch.read()
        file.write_text(f"worker-1 {hashed(tokens['worker-1'])}\n")
        for work in (first.pull(0), first.join(), first.status()):
            with pytest.raises(Refused) as refused:
                await work
            assert refused.value.reason is Reason.TOKEN_INVALID
        await second.join()  # now a round opens, of which the first is not told
        with pytest.raises(Exception, match="does not know this token"):
            await watch.read()
        file.unlink()
        again = {name: make_token(name, file) for name in ("worker-0", "worker-1")}
        async with Peer(served.address, folders, again["worker-0"]) as third:
            await third.join()
            await third.plan()


@asynccontextmanager
async def renewable(tmp_path: Path) -> AsyncIterator[tuple[Path, Served]]:
    """An authority of the test's own, and a server that uses it."""
    root = tmp_path / "certs"
    authority = Authority(root)
    authority.server([], days=10)
    authority.worker("worker-0")
    async with serving(tmp_path, server={"certs": root / "server"}, workers=1, metrics=True) as served:
        yield root, served


async def test_certificates_are_read_again(tmp_path: Path) -> None:
    """New connections have the new one; who is connected stays so; a pair that does not match changes nothing."""
    async with renewable(tmp_path) as (root, served):
        files = Files(root / "workers/worker-0")
        gauge = 'ditherps_certificate_expiry_timestamp_seconds{certificate="own"}'

        async def expires() -> int:
            found = (await asyncio.to_thread(probe, served.address, files)).expires
            assert found is not None
            assert int(await served.metric(gauge)) == int(found.timestamp())
            return int(found.timestamp())

        async with Peer(served.address, files.folder) as connected:
            await connected.join()
            first = await expires()
            Authority(root).server([], days=50, renew=True)
            second = await expires()
            assert second - first > 30 * 86400
            await connected.status()

            (root / "server/key.pem").rename(root / "kept.pem")
            (root / "server/key.pem").write_bytes((root / "workers/worker-0/key.pem").read_bytes())
            assert await expires() == second
            (root / "kept.pem").rename(root / "server/key.pem")
            assert await expires() == second


async def test_a_worker_takes_its_new_certificate_when_it_connects_again(tmp_path: Path) -> None:
    async with renewable(tmp_path) as (root, served):
        config = WorkerConfig(server=served.address, certs=root / "workers/worker-0", task="tiny")
        client = Client(config, wire.WireMeter())
        try:
            # A new authority on both ends, before the first connection: the old certificates are worth nothing now.
            for path in root.glob("ca.*"):
                path.unlink()
            authority = Authority(root)
            authority.server([], renew=True)
            assert await refusal(served.address, root / "workers/worker-0") is Reason.WRONG_CA
            authority.worker("worker-0", renew=True)
            await client.join(b"key", 5)
            await client.heartbeat()
        finally:
            await client.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "would serve plaintext beyond this machine: make certificates"),
        ({"certs": "server", "insecure": True}, "exclude each other"),
        ({"token_file": "tokens"}, "--token-file needs --certs"),
        ({"certs": "pools"}, r"pools/ca\.pem cannot be read"),
        ({"certs": "."}, r"cert\.pem is missing: --certs takes the folder of one end"),
        ({"certs": "nowhere"}, "is not a folder: make it with `ditherps certs init`"),
    ],
)
async def test_a_server_that_does_not_start(
    tmp_path: Path, folders: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "tokens").write_text("")
    places = {"certs": folders, "token_file": tmp_path}
    server = {key: places[key] / value if key in places else value for key, value in options.items()}
    with pytest.raises(UserError, match=message):
        async with serving(tmp_path, server=server):
            pass


async def test_a_worker_that_does_not_start(folders: Path) -> None:
    def config(**options: Any) -> WorkerConfig:
        return WorkerConfig.model_validate({"server": "server.example:1", **options})

    with pytest.raises(UserError, match="would be reached in plaintext: say --certs"):
        check_plaintext(config())
    with pytest.raises(UserError, match="exclude each other"):
        check_plaintext(config(certs=folders, insecure=True))
    check_plaintext(config(insecure=True))
    check_plaintext(config(certs=folders))
    with pytest.raises(UserError, match="--token needs --certs"):
        Client(config(token="worker-0:secret", insecure=True), wire.WireMeter())
    with pytest.raises(UserError, match="cannot be read"):
        Client(config(token="@/nowhere", certs=folders), wire.WireMeter())
    assert "secret" not in repr(config(token="worker-0:secret"))


@pytest.mark.slow  # a process for each
async def test_each_refused_worker_logs_one_line_that_says_what_to_do(tmp_path: Path, folders: Path) -> None:
    """Whole processes: exit code, and standard error, where gRPC has nothing to add."""
    own = folders / "workers"
    file = tmp_path / "tokens"
    token = make_token("worker-0", file)
    by_certificate: list[tuple[Reason, list[object], str]] = [
        (Reason.WRONG_CA, ["--certs", folders / "other/workers/worker-0"], "ca.pem"),
        (Reason.CERTIFICATE_EXPIRED, ["--certs", folders / "bad/expired-worker-0"], "certs init"),
        (Reason.WRONG_HOST, ["--certs", own / "worker-0"], "--host"),
        (Reason.NO_CERTIFICATE, ["--certs", folders], "certs init --worker NAME"),
        (Reason.IDENTITY_MISMATCH, ["--certs", own / "worker-0", "--name", "worker-1"], "leave --name away"),
        (Reason.TLS_SERVER, [], "--certs"),
    ]
    by_token: list[tuple[Reason, list[object], str]] = [
        (Reason.TOKEN_INVALID, ["--certs", folders, "--token", token + "x"], "ditherps certs token"),
        (Reason.UNAUTHENTICATED, ["--certs", folders], "--token"),
    ]
    (tmp_path / "tokens server").mkdir()
    async with (
        serving(tmp_path, server=mutual(folders, host="0.0.0.0")) as served,
        serving(tmp_path / "tokens server", server=mutual(folders, token_file=file)) as with_tokens,
    ):
        port = served.address.rpartition(":")[2]
        for rows, at in ((by_certificate, f"127.0.0.1:{port}"), (by_token, with_tokens.address)):
            for reason, flags, says in rows:
                address = f"127.0.0.2:{port}" if reason is Reason.WRONG_HOST else at
                run = await asyncio.to_thread(harness.run, ["worker", "--server", address, *flags])
                assert run.returncode == ExitCode.REFUSED, run.stderr
                assert run.stderr.startswith(f"error: {reason}: "), run.stderr
                assert run.stderr.count("\n") == 1
                assert says in run.stderr


@pytest.mark.slow
async def test_tls13_alone(tmp_path: Path, folders: Path) -> None:
    """By option; without it the server speaks TLS 1.2 too."""

    def version(address: str, newest: ssl.TLSVersion) -> str | None:
        context = ssl.create_default_context(cafile=str(folders / "ca.pem"))
        own = folders / "workers/worker-0"
        context.load_cert_chain(own / "cert.pem", own / "key.pem")
        context.set_alpn_protocols(["h2"])
        context.maximum_version = newest
        host, port = address.split(":")
        with (
            socket.create_connection((host, int(port)), 10) as plain,
            context.wrap_socket(plain, server_hostname=host) as tls,
        ):
            return tls.version()

    async with serving(tmp_path, server=mutual(folders)) as served:
        assert await asyncio.to_thread(version, served.address, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
    cluster = harness.Cluster(tmp_path)
    try:
        await asyncio.to_thread(cluster.server, "--workers", 2, "--certs", folders / "server", "--tls13")
        assert await asyncio.to_thread(version, cluster.address, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(OSError):  # noqa: PT011  # the server hangs up
            await asyncio.to_thread(version, cluster.address, ssl.TLSVersion.TLSv1_2)
    finally:
        cluster.close()
