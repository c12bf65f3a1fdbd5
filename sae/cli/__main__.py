import os
import sys
from collections.abc import Sequence

from sae.cli import main
from sae.jobs.ranks import rank_and_world


def run(argv: Sequence[str] | None = None) -> None:
    """Runs one verb and ends the process; a rank that failed ends at once.

    The other ranks notice its end, and taking an interrupted exchange apart may take long.
    """
    status = main(argv)
    if status and rank_and_world()[1] > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
