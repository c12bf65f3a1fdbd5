"""Copies Python sources of this installation (standard library and packages) into a directory, up to a total size.

    python scripts/python_sources.py OUT [--megabytes 15]

The shipped models were trained on a licensed corpus and such a directory. Files are sorted by a hash of their content,
so a smaller size is a sample of a larger one. Tests and very long files are left out.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from hashlib import blake2b
from pathlib import Path


def gather(out: Path, limit_bytes: int) -> tuple[int, int]:
    """Copies distinct files of 500 to 200,000 bytes, `limit_bytes` in total; returns their number and bytes."""
    found: dict[bytes, bytes] = {}
    for root in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}:
        for path in Path(root).rglob("*.py"):
            inside = path.relative_to(root).parts
            if not {"test", "tests"} & set(inside) and (
                "site-packages" not in inside or root == sysconfig.get_path("purelib")
            ):
                content = path.read_bytes()
                if 500 < len(content) < 200_000:
                    found[blake2b(content, digest_size=8).digest()] = content
    out.mkdir(parents=True, exist_ok=True)
    files = total = 0
    for _, content in sorted(found.items()):
        if total + len(content) > limit_bytes:
            break
        (out / f"{files:05d}.py").write_bytes(content)
        files, total = files + 1, total + len(content)
    return files, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--megabytes", type=float, default=15.0, help="total size")
    args = parser.parse_args()
    files, total = gather(args.out, int(args.megabytes * 1e6))
    print(f"{files:,} files, {total / 1e6:.1f} MB in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
