"""Pre-train one recipe on the ranks that a launcher started.

    deepspeed --num_accelerators 2 launch/pretrain.py --recipe launch/recipes/digits_demo.yaml \
        --deepspeed_config ds_configs/zero2.json [a.b=c ...]
"""

import argparse
import os
import sys
from typing import NoReturn

from prelora_ds.core.errors import ConfigError, ExpectedError
from prelora_ds.launching.exits import crash, fail, interrupted
from prelora_ds.launching.mpi import find_ranks
from prelora_ds.launching.ranks import Ranks


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(sys.argv[1:]), message, "see launch/pretrain.py --help")


def main(argv: list[str]) -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a YAML file of launch/recipes/, or your own")
    parser.add_argument("--deepspeed_config", help="a JSON file of ds_configs/; without it ZeRO stage 0")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of the recipe")
    ranks = Ranks(rank=0, local_rank=0, world_size=1)
    try:
        ranks = find_ranks(os.environ)
        args = parser.parse_intermixed_args(argv)
        from prelora_ds.launching.start import start  # heavy imports only once the launch itself is sound

        start(ranks, args.recipe, args.overrides, args.deepspeed_config)
    except ExpectedError as error:
        fail(error, ranks)
    except KeyboardInterrupt:
        interrupted(ranks)
    except Exception:
        crash(ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
