"""Turn an exception into one message: what is wrong, what was given, what is valid, what to type."""

from __future__ import annotations

import difflib
import errno
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from rich.markup import escape


def explain(error: BaseException) -> str:
    """One message for a person, with rich markup escaped."""
    return escape(_text(error))


def _text(error: BaseException) -> str:
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, HydraException):
        cause = error.__cause__ or error.__context__
        head = str(error).splitlines()[0]
        return f"{head}. {_key_help(cause)}".strip() if isinstance(cause, OmegaConfBaseException) else str(error)
    if isinstance(error, OmegaConfBaseException):
        return _key_help(error)
    if isinstance(error, MemoryError):
        return "out of memory. Set data.batch_size=8 trainer.accumulate_grad_batches=4, say"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = error.filename or "while writing"
        return f"the disk is full ({where}). Free some space, or set run_dir=/another/disk/run. Nothing half-written was kept"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        if Path(str(error.filename)).is_file():
            return f"{error.filename} cannot be read ({error.strerror}). Give a file that this user may read"
        return f"{error.filename or 'a folder'} cannot be written ({error.strerror}). Set run_dir=/a/writable/folder"
    if isinstance(error, (ValueError, FileNotFoundError)) or (isinstance(error, OSError) and error.errno is None):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _missing_option(error: MissingConfigException) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, name = wanted.rpartition("/")
    options = [str(o) for o in error.options or []]
    if group == "recipe":
        from qtrain.config import recipe_files, recipe_summary

        options = options or list(recipe_files())
        known = "\n".join(f"  {n}  {recipe_summary(p)}" for n, p in recipe_files().items())
        return f"there is no recipe {name!r}.{_nearest(name, options)} The recipes are:\n{known}"
    if not wanted:
        return str(error)
    valid = f"Valid: {', '.join(options)}. Type {group}={options[0]}, say." if options else ""
    return f"{group} has no option {name!r}.{_nearest(name, options)} {valid}"


def _key_help(error: OmegaConfBaseException) -> str:
    text = str(error).splitlines()[0]
    parent = error.parent_node
    if isinstance(error, ValidationError):
        return f"{error.full_key or error.key}: {text}"
    if not isinstance(error, (ConfigKeyError, AttributeError)) or parent is None or not hasattr(parent, "keys"):
        return text
    valid = [str(k) for k in parent.keys()]  # noqa: SIM118
    prefix = str(error.full_key or error.key).rpartition(".")[0]
    return f"{error.full_key} is not a key.{_nearest(str(error.key), valid)} Valid under {prefix or 'the root'}: {', '.join(valid)}"


def _nearest(given: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""
