"""Generate the Python stubs under common/ditherps/v1 from proto/ditherps/v1.

`python proto/generate.py` writes them; `python proto/generate.py --check` says whether they are up to date (exit 1 if
not). Messages and their types only: the service is registered and called by name in `ditherps.wire`, where bytes are
counted, so no gRPC stub is generated.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
OUT = ROOT / "common"


def generate(out: Path) -> list[Path]:
    """Write the stubs below `out`, and return their paths relative to it."""
    sources = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))
    status = protoc.main(["protoc", f"-I{PROTO}", f"--python_out={out}", f"--mypy_out=quiet:{out}", *sources])
    if status != 0:
        raise SystemExit(f"protoc failed with status {status}")
    return [Path(source).with_suffix("").with_name(Path(source).stem + suffix)
            for source in sources for suffix in ("_pb2.py", "_pb2.pyi")]  # fmt: skip


def main() -> int:
    """Generate, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the stubs are out of date")
    if not parser.parse_args().check:
        generate(OUT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        stale = [
            path
            for path in generate(fresh)
            if not (OUT / path).exists() or not filecmp.cmp(OUT / path, fresh / path, shallow=False)
        ]
    for path in stale:
        print(f"out of date: common/{path} (run: poe proto)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
