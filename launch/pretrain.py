"""Pre-train one recipe on the ranks that a launcher started.

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
    interrupted,
    outlive_streams,
    stopped,
)
from prelora_ds.hosts.heartbeat import Supervision
from prelora_ds.hosts.mpi import find_ranks
from prelora_ds.run.guard import Guard
from prelora_ds.run.stop import StopRequest


def main(argv: list[str]) -> None:
    ancestors = Ancestors()  # first: a launcher may be killed while the rank begins
    outlive_streams()
    ranks, stop = Ranks(rank=0, local_rank=0, world_size=1), StopRequest().install()
    watch = Supervision(None)
    try:
        watch = Supervision(supervised_folder(argv))
        ranks = find_ranks(os.environ)
        watch = Supervision(watch.folder, ranks.rank)
        guard = Guard(rank=ranks.rank, stop=stop)
        guard.watch(ancestors.check, every_s=1.0)
        guard.watch(watch.check)
        guard.before_exit = watch.ended
        guard.start()
        args = parse_arguments(argv, __doc__)
        from prelora_ds.start import start  # heavy imports only once the launch itself is sound

        start(ranks, args.recipe, args.overrides, args.deepspeed_config, args.resume, watch, stop,
              guard)
    except Stopped as why:
        stopped(why, ranks)
    except ExpectedError as error:
        watch.failed(error)
        fail(error, ranks)
    except KeyboardInterrupt:
        interrupted(ranks)
    except Exception as error:
        watch.ended(crash_code(error), f"{type(error).__name__}: {error}")
        crash(ranks, error, ending=stop.reason is not None)


if __name__ == "__main__":
    main(sys.argv[1:])
