"""The command line of launch/pretrain.py, which `prelora supervise` parses too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prelora_ds.errors import ConfigError

_SUPERVISED = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_SUPERVISED.add_argument("--supervised", type=Path, metavar="FOLDER",
                         help="set by `prelora supervise`: the folder of its records")


class _Parser(argparse.ArgumentParser):
    words: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        raise ConfigError("command line", " ".join(self.words), message,
                          "see launch/pretrain.py --help")


def parse_arguments(words: Sequence[str], description: str | None = None) -> argparse.Namespace:
    """Return recipe, deepspeed_config, resume, local_rank, supervised and overrides.

    Raises ConfigError.
    """
    parser = _Parser(prog="launch/pretrain.py", description=description, allow_abbrev=False,
                     parents=[_SUPERVISED], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.words = words
    parser.add_argument("--recipe", required=True, help="YAML file, e.g. from launch/recipes/")
    parser.add_argument("--deepspeed_config", "--deepspeed-config",
                        help="DeepSpeed JSON, e.g. from ds_configs/ (default: ZeRO stage 0)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH",
                        help="auto: resume the run in run.output_dir if there is one; never: "
                             "refuse a folder in which a run has started; PATH: resume from this "
                             "checkpoint or run")
    parser.add_argument("--local_rank", type=int, help="passed by some launchers; LOCAL_RANK is used instead")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c",
                        help="overrides of the recipe")
    return parser.parse_intermixed_args(words)


def supervised_folder(words: Sequence[str]) -> Path | None:
    """Return --supervised, whatever else is wrong with the command line.

    The supervisor must learn of every failure, also of an invalid command line.
    """
    folder: Path | None = _SUPERVISED.parse_known_args(words)[0].supervised
    return folder
