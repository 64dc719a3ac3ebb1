"""How a rank ends: one message for all, and an exit code that says why."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

from prelora_ds.core.errors import ExpectedError
from prelora_ds.launching.ranks import Ranks

# Long enough for rank 0 to speak and for the launcher to end the others; every rank finds the same mistake.
GRACE_S = 20.0


INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, as shells report it


def interrupted(ranks: Ranks) -> NoReturn:
    """End after Ctrl-C, which reaches every rank."""
    if ranks.rank == 0:
        print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED_EXIT_CODE)


def fail(error: ExpectedError, ranks: Ranks) -> NoReturn:
    """Say ``error`` once and end with its exit code.

    The launcher ends all ranks at the first one that exits, so the others keep still and let rank 0 speak. A host that
    is still there after the grace had a mistake of its own, and its first rank says it. What one rank
    alone has met it says at once.
    """
    if ranks.rank != 0 and not error.of_one_rank:
        time.sleep(GRACE_S)
    if ranks.rank == 0 or ranks.local_rank == 0 or error.of_one_rank:
        where = "" if ranks.rank == 0 else f" (rank {ranks.rank})"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
