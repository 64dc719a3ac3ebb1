r"""Pre-train one recipe on the ranks that a launcher started.

    deepspeed --num_accelerators 2 launch/pretrain.py --recipe launch/recipes/digits_demo.yaml \
        --deepspeed_config ds_configs/zero2.json [a.b=c ...]
"""

import os
import sys

from prelora_ds.errors import ExpectedError, Stopped
from prelora_ds.hosts.ancestors import Ancestors
from prelora_ds.hosts.arguments import parse_arguments, supervised_folder
from prelora_ds.hosts.discovery import Ranks
from prelora_ds.hosts.exits import (
    crash,
    crash_code,
    fail,
    ignore_output_errors,
    interrupted,
    stopped,
)
from prelora_ds.hosts.heartbeat import AttemptRecord
from prelora_ds.hosts.mpi import discover_ranks
from prelora_ds.run.guard import Guard
from prelora_ds.run.stop import StopRequest


def main(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        parse_arguments(argv, __doc__)  # prints the help and exits, also without a launcher
    ancestors = Ancestors()  # first: a launcher may be killed while the rank starts
    ignore_output_errors()
    ranks = Ranks(rank=0, local_rank=0, world_size=1)
    stop = StopRequest().install()
    record = AttemptRecord(None)
    try:
        record = AttemptRecord(supervised_folder(argv))
        ranks = discover_ranks(os.environ)
        record = AttemptRecord(record.folder, ranks.rank)
        record.record_fatal_signals()
        guard = Guard(rank=ranks.rank, stop=stop)
        guard.watch(ancestors.check, every_s=1.0)
        guard.watch(record.check)
        guard.before_exit = record.record_exit
        guard.start()
        args = parse_arguments(argv, __doc__)
        from prelora_ds.start import start  # heavy imports only after the launch was validated

        start(ranks, args.recipe, args.overrides, args.deepspeed_config, args.resume, record, stop,
              guard)
    except Stopped as why:
        stopped(why, ranks)
    except ExpectedError as error:
        record.record_error(error)
        fail(error, ranks)
    except KeyboardInterrupt:
        interrupted(ranks)
    except Exception as error:
        record.record_exit(crash_code(error), f"{type(error).__name__}: {error}")
        crash(ranks, error, ending=stop.reason is not None)


if __name__ == "__main__":
    main(sys.argv[1:])
