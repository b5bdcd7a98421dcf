"""Certificates and tokens as files, and what `certs check` says of servers at real sockets."""

from __future__ import annotations

import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from ditherps.cli import main
from ditherps.errors import ExitCode, HandshakeError, OptionError, Reason, RefusedError, UserError
from ditherps.security import certificates
from ditherps.security.certificates import Authority, read_certificate
from ditherps.security.credentials import Files, ServerFiles, identity_of
from ditherps.security.probe import probe
from ditherps.security.tokens import TokenFile, Tokens, hashed, is_identity, make_token
from tests import authorities


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authorities.make(tmp_path_factory.mktemp("certs"))


def extension(path: Path, kind: type[x509.ExtensionType]) -> object:
    return read_certificate(path).extensions.get_extension_for_class(kind).value


class TestCertificates:
    def test_what_they_say(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        server = authority.server(["server.example", "10.0.0.7", "[::1]"]).folder / "cert.pem"
        worker, pool = authority.worker("site/a").folder / "cert.pem", authority.pool("gpu").folder / "cert.pem"
        assert certificates.hosts_of(read_certificate(server)) == [
            "server.example", "10.0.0.7", "::1", "localhost", "127.0.0.1",
        ]  # fmt: skip
        for path, use, names in (
            (server, ExtendedKeyUsageOID.SERVER_AUTH, None),
            (worker, ExtendedKeyUsageOID.CLIENT_AUTH, ["ditherps:site/a"]),
            (pool, ExtendedKeyUsageOID.CLIENT_AUTH, ["ditherps:gpu/*"]),
        ):
            assert extension(path, x509.ExtendedKeyUsage) == x509.ExtendedKeyUsage([use])
            assert extension(path, x509.BasicConstraints) == x509.BasicConstraints(ca=False, path_length=None)
            certificate = read_certificate(path)
            key = certificate.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey)
            assert key.curve.name == "secp256r1"
            assert certificates.is_signed_by(certificate, authority.certificate)
            assert certificates.key_matches(path, path.with_name("key.pem"))
            lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
            assert timedelta(days=390) < lifetime < timedelta(days=400)
            assert certificate.not_valid_after_utc < authority.certificate.not_valid_after_utc
            if names:
                found = certificates.alternative_names(certificate)
                assert [name.value for name in found] == names

    def test_private_keys_are_private(self, folders: Path) -> None:
        keys = [*folders.rglob("key.pem"), *folders.rglob("ca.key")]
        assert len(keys) > 5
        assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}

    def test_what_is_there_stays(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        first = ["certs", "init", "--dir", str(tmp_path), "--host", "a.example", "--worker", "worker-0"]
        assert main(first) == ExitCode.OK
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        assert main([*first, "--worker", "worker-1", "--pool", "gpu"]) == ExitCode.OK
        assert f"kept {tmp_path}/workers/worker-0\n" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in before} == before
        for folder in ("workers/worker-1", "pools/gpu"):
            assert certificates.is_signed_by(
                read_certificate(tmp_path / folder / "cert.pem"), read_certificate(tmp_path / "ca.pem")
            )

        assert main([*first, "--renew"]) == ExitCode.OK
        changed = {path.relative_to(tmp_path) for path, data in before.items() if path.read_bytes() != data}
        assert changed == {
            Path(folder, name) for folder in ("server", "workers/worker-0") for name in ("cert.pem", "key.pem")
        }

    def test_another_host_needs_a_word(self, tmp_path: Path) -> None:
        Authority(tmp_path).server(["a.example"])
        with pytest.raises(UserError, match=r"is not for b\.example: say --renew"):
            Authority(tmp_path).server(["a.example", "b.example"])
        assert not Authority(tmp_path).server([]).new

    def test_half_an_authority(self, tmp_path: Path) -> None:
        Authority(tmp_path)
        (tmp_path / "ca.key").unlink()
        with pytest.raises(UserError, match=r"ca\.key is missing"):
            Authority(tmp_path)

    def test_values_that_are_not_allowed(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        for host in ("a.example:50051", "", "a b", "http://a"):
            with pytest.raises(OptionError):
                authority.server([host])
        for name in ("../x", "Worker", "gpu/*"):
            with pytest.raises(OptionError):
                authority.worker(name)
        with pytest.raises(OptionError):
            authority.pool("*")
        with pytest.raises(OptionError, match="days"):
            authority.worker("late", days=4000)
        assert {path.name for path in tmp_path.iterdir()} == {"ca.pem", "ca.key"}

    def test_names_never_share_a_folder(self) -> None:
        names = ["a/b", "a.b", "a_b", "a-b", "ab", "a/b/"]
        assert len({certificates.folder_name(name) for name in names}) == len(names)
        assert not any("/" in certificates.folder_name(name) for name in names)

    def test_a_key_that_is_not_the_certificates(self, folders: Path, tmp_path: Path) -> None:
        for name in ("ca.pem", "cert.pem"):
            (tmp_path / name).write_bytes((folders / "server" / name).read_bytes())
        with pytest.raises(UserError, match=r"key\.pem is missing"):
            ServerFiles(Files(tmp_path), mutual=True)
        (tmp_path / "key.pem").write_bytes((folders / "workers/worker-0/key.pem").read_bytes())
        with pytest.raises(UserError, match="is not the key of"):
            ServerFiles(Files(tmp_path), mutual=True)
        (tmp_path / "key.pem").write_text("nonsense")
        with pytest.raises(UserError, match="not an unencrypted private key"):
            ServerFiles(Files(tmp_path), mutual=True)


def test_the_identity_of_a_certificate() -> None:
    def found(**values: list[bytes]) -> str | None:
        return identity_of({"transport_security_type": [b"ssl"], **values})

    assert found(peer_uri=[b"ditherps:a/b"], x509_common_name=[b"c"]) == "a/b"
    assert found(peer_uri=[b"ditherps:gpu/*"]) == "gpu/*"
    assert found(peer_uri=[b"spiffe://x/y"], x509_common_name=[b"worker-3"]) == "worker-3"
    assert found(peer_uri=[b"ditherps:a", b"ditherps:b"]) is None
    assert found(x509_common_name=[b"ditherps server"]) is None
    assert found(peer_uri=[b"ditherps:*"], x509_common_name=[b"a"]) is None
    assert found() is None
    assert identity_of({"transport_security_type": [b"insecure"], "x509_common_name": [b"a"]}) is None


class TestTokens:
    def test_made_and_found(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "tokens"
        made = {}
        for name in ("worker-0", "gpu/*"):
            assert main(["certs", "token", name, "--file", str(file)]) == ExitCode.OK
            made[name] = capsys.readouterr().out.strip()
        tokens = Tokens.read(file)
        assert {name: tokens.identity(token) for name, token in made.items()} == {
            "worker-0": "worker-0",
            "gpu/*": "gpu/*",
        }
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not any(token.rpartition(":")[2] in file.read_text() for token in made.values())
        with pytest.raises(UserError, match="already has a token of worker-0"):
            make_token("worker-0", file)

    @pytest.mark.parametrize(
        "token",
        ["", "a", ":", "a:", "a:wrong", "b:right", ":right", "nobody:right", "a:right" + "x" * 1000, "a:right:"],
    )
    def test_wrong(self, token: str) -> None:
        tokens = Tokens({"a": hashed("a:right"), "b": hashed("b:other")})
        assert tokens.identity("a:right") == "a"
        with pytest.raises(RefusedError) as refused:
            tokens.identity(token)
        assert refused.value.reason is Reason.TOKEN_INVALID

    @pytest.mark.parametrize(
        "line", ["a", "a b", f"A {'0' * 64}", f"a {'0' * 64} x", f"a {'0' * 63}", f"ok {'0' * 64}"]
    )  # fmt: skip
    def test_a_file_with_a_wrong_line(self, tmp_path: Path, line: str) -> None:
        (tmp_path / "tokens").write_text(f"# names\n\nok {'0' * 64}  # one\n{line}\n")
        with pytest.raises(UserError, match=r"tokens:4: "):
            Tokens.read(tmp_path / "tokens")

    @given(st.one_of(st.binary(max_size=300), st.text("abz/*#:09af \n\t\x00\u2028", max_size=200).map(str.encode)))
    def test_a_file_that_holds_anything(self, content: bytes) -> None:
        """It is read, or refused in one line; what is read names only whom it may."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "tokens")
            path.write_bytes(content)
            tokens, said = Tokens({}), f"{path}:"
            try:
                tokens = Tokens.read(path)
            except UserError as error:
                said = str(error)
            assert said.startswith((f"{path}:", f"token file {path} "))
            assert "\n" not in said
            assert all(is_identity(name) and len(digest) == 64 for name, digest in tokens.hashes.items())
            with pytest.raises(RefusedError):
                tokens.identity("a:b")

    def test_a_file_that_is_too_large(self, tmp_path: Path) -> None:
        with (tmp_path / "tokens").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(UserError, match="more than"):
            Tokens.read(tmp_path / "tokens")

    def test_a_file_that_changes(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Looked at once a second at most; one that is broken, or gone, changes nothing, with one warning."""
        now, file = 0.0, tmp_path / "tokens"
        first, second = make_token("a", file), f"b:{'s' * 43}"
        tokens = TokenFile(file, lambda: now)
        assert tokens.identity(first) == "a"
        with file.open("a") as lines:
            lines.write(f"b {hashed(second)}\n")
        now = 0.9
        with pytest.raises(RefusedError):
            tokens.identity(second)
        now = 1.0
        assert (tokens.identity(first), tokens.identity(second)) == ("a", "b")
        with caplog.at_level("WARNING"):
            for content in (b"broken", b"\xff\xfe"):
                file.write_bytes(content)
                for _ in range(5):
                    now += 1
                    assert tokens.identity(second) == "b"
            file.unlink()
            for _ in range(5):
                now += 1
                assert tokens.identity(first) == "a"
        assert len(caplog.records) == 3
        assert "the old ones stay" in caplog.text
        file.write_text(f"b {hashed(second)}\n")
        now += 1
        assert tokens.identity(second) == "b"
        with pytest.raises(RefusedError):
            tokens.identity(first)


@contextmanager
def server(credentials: grpc.ServerCredentials | None, host: str = "127.0.0.1") -> Iterator[int]:
    """A gRPC server without a service; its port."""
    with ThreadPoolExecutor(1) as threads:
        made = grpc.server(threads)
        port = made.add_secure_port(f"{host}:0", credentials) if credentials else made.add_insecure_port(f"{host}:0")
        made.start()
        try:
            yield port
        finally:
            made.stop(None).wait(10)


def tls(folder: Path, *, mutual: bool = True) -> grpc.ServerCredentials:
    return ServerFiles(Files(folder), mutual=mutual).credentials()


class TestCheck:
    def check(self, capsys: pytest.CaptureFixture[str], address: str, folder: Path) -> tuple[int, str]:
        code = main(["certs", "check", address, "--dir", str(folder)])
        streams = capsys.readouterr()
        said = streams.out + streams.err
        assert said.count("\n") == 1, said
        return code, said

    def test_a_server_that_lets_us_in(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with server(tls(folders / "server")) as port:
            for host in ("127.0.0.1", "localhost"):
                code, said = self.check(capsys, f"{host}:{port}", folders / "workers/worker-0")
                assert (code, said.startswith(f"{host}:{port} takes ")) == (ExitCode.OK, True), said
                assert "TLSv1.3, certificate for localhost, 127.0.0.1, valid for 396 days" in said
        with server(tls(folders / "server", mutual=False)) as port:  # tokens: no certificate is asked for
            assert self.check(capsys, f"127.0.0.1:{port}", folders)[0] == ExitCode.OK

    @pytest.mark.parametrize(
        ("at", "folder", "host", "reason"),
        [
            ("server", "other/workers/worker-0", "127.0.0.1", Reason.WRONG_CA),
            ("server", "workers/worker-0", "127.0.0.2", Reason.WRONG_HOST),
            ("bad/expired-server", "workers/worker-0", "127.0.0.1", Reason.SERVER_EXPIRED),
            ("bad/early-server", "workers/worker-0", "127.0.0.1", Reason.SERVER_NOT_YET_VALID),
            ("server", ".", "127.0.0.1", Reason.NO_CERTIFICATE),
            ("server", "bad/expired-worker-0", "127.0.0.1", Reason.CERTIFICATE_EXPIRED),
            ("server", "bad/early-worker-0", "127.0.0.1", Reason.CERTIFICATE_NOT_YET_VALID),
            ("server", "bad/mixed", "127.0.0.1", Reason.CERTIFICATE_REFUSED),
            ("server", "server", "127.0.0.1", Reason.CERTIFICATE_REFUSED),
            (None, "workers/worker-0", "127.0.0.1", Reason.PLAINTEXT_SERVER),
        ],
    )
    def test_each_failure_has_its_own_line(
        self, folders: Path, capsys: pytest.CaptureFixture[str], at: str | None, folder: str, host: str, reason: Reason
    ) -> None:
        with server(tls(folders / at) if at else None, "0.0.0.0") as port:
            code, said = self.check(capsys, f"{host}:{port}", folders / folder)
        assert said.startswith(f"error: {reason}: "), said
        assert code == ExitCode.REFUSED
        assert f"{host}:{port}" in said or str(folders / folder) in said

    def test_nothing_listens(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and does not listen
            code, said = self.check(capsys, f"127.0.0.1:{taken.getsockname()[1]}", folders)
        assert code == ExitCode.UNREACHABLE
        assert said.startswith("error: nothing_listens: nothing listens at 127.0.0.1:")

    def test_a_port_that_says_nothing(self, folders: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(HandshakeError) as failed:
            probe(f"127.0.0.1:{silent.getsockname()[1]}", Files(folders), seconds=0.2)
        assert failed.value.reason is Reason.NOTHING_LISTENS

    def test_not_an_address(self, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for address in ("localhost", "localhost:", ":1", "localhost:x", "localhost:70000"):
            assert self.check(capsys, address, folders)[0] == ExitCode.USAGE
