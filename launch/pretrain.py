"""Pre-train one recipe on the ranks that a launcher started.

    deepspeed --num_accelerators 2 launch/pretrain.py --recipe launch/recipes/digits_demo.yaml \
        --deepspeed_config ds_configs/zero2.json [a.b=c ...]
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from prelora_ds.core.errors import ConfigError, ExpectedError, Stopped
from prelora_ds.launching.exits import crash, fail, interrupted, outlive_pipes, stopped
from prelora_ds.launching.mpi import find_ranks
from prelora_ds.launching.ranks import Ranks
from prelora_ds.launching.stop import StopRequest
from prelora_ds.launching.supervised import Supervision


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(sys.argv[1:]), message, "see launch/pretrain.py --help")


def main(argv: list[str]) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a YAML file of launch/recipes/, or your own")
    parser.add_argument("--deepspeed_config", help="a JSON file of ds_configs/; without it ZeRO stage 0")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on with the run in run.output_dir, if there is one; PATH: a checkpoint or a run")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("--supervised", type=Path, metavar="FOLDER", help="set by `prelora supervise`: its records")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of the recipe")
    outlive_pipes()
    ranks, watch, stop = Ranks(rank=0, local_rank=0, world_size=1), Supervision(None, 0), StopRequest().install()
    try:
        ranks = find_ranks(os.environ)
        args = parser.parse_intermixed_args(argv)
        watch = Supervision(args.supervised, ranks.rank)
        from prelora_ds.launching.start import start  # heavy imports only once the launch itself is sound

        start(ranks, args.recipe, args.overrides, args.deepspeed_config, args.resume, watch, stop)
    except Stopped as why:
        stopped(why, ranks)
    except ExpectedError as error:
        watch.ended(error.exit_code, str(error))
        fail(error, ranks)
    except KeyboardInterrupt:
        interrupted(ranks)
    except Exception as error:
        watch.ended(1, f"{type(error).__name__}: {error}")
        crash(ranks, error, ending=stop.reason is not None)


if __name__ == "__main__":
    main(sys.argv[1:])
