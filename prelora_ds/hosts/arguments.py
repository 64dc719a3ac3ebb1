"""The command line of launch/pretrain.py, which `prelora supervise` reads as well."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prelora_ds.errors import ConfigError

_SUPERVISED = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_SUPERVISED.add_argument("--supervised", type=Path, metavar="FOLDER", help="set by `prelora supervise`: its records")


class _Parser(argparse.ArgumentParser):
    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(self.words), message, "see launch/pretrain.py --help")


def parse_arguments(words: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """recipe, deepspeed_config, resume, local_rank, supervised and overrides. Raises ConfigError."""
    parser = _Parser(prog="launch/pretrain.py", description=description, allow_abbrev=False, parents=[_SUPERVISED],
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.words = words
    parser.add_argument("--recipe", required=True, help="a YAML file of launch/recipes/, or your own")
    parser.add_argument("--deepspeed_config", help="a JSON file of ds_configs/; without it ZeRO stage 0")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: go on with the run in run.output_dir, if there is one; PATH: a checkpoint or a run")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher; LOCAL_RANK is what counts")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="overrides of the recipe")
    return parser.parse_intermixed_args(words)


def supervised_folder(words: Sequence[str]) -> Path | None:
    """--supervised alone: whatever else is wrong with a command line, the supervisor has to hear of it."""
    folder: Path | None = _SUPERVISED.parse_known_args(words)[0].supervised
    return folder
