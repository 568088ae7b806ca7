"""The run directory: begun, continued or begun again, but never overwritten."""

from __future__ import annotations

from pathlib import Path

from .config import Config
from .config_loop import Stop
from .stages import write_text

# What may change between the parts of one run, since it doesn't change what was done so far.
CHANGEABLE = (
    "run.directory",
    "run.threads",
    "run.device",
    "run.workers",
    "potential.evaluate",
    "cycle.iterations",
    *(f"stop.{key}" for key in Stop.model_fields),
)


class RunDirectoryError(ValueError):
    """The run directory is in use, or belongs to another configuration."""


def prepare_run(config: Config, *, resume: bool = False, fresh: bool = False) -> Path:
    """Make the run directory and write the configuration into it.

    Parameters
    ----------
    config
        The run.
    resume
        Continue a run that is there; its configuration must agree in all that matters.
    fresh
        Begin again: a run that is there is moved aside to NAME.1, NAME.2, ...

    Returns
    -------
    Path
        The run directory.

    Raises
    ------
    RunDirectoryError
        If the directory holds a run and neither was asked for, or another configuration.
    """
    directory = config.run.directory
    if resume and fresh:
        raise RunDirectoryError("--resume continues a run and --fresh begins again: give one")
    # A folder with nothing but a configuration is a run that failed before it began.
    if directory.exists() and any(path.name != "config.toml" for path in directory.iterdir()):
        if fresh:
            directory.rename(_free_name(directory))
        elif not resume:
            raise RunDirectoryError(
                f"{directory} exists: --resume continues it, --fresh moves it aside and begins "
                "again, another [run] directory keeps both"
            )
        elif (directory / "config.toml").is_file():
            before = Config.load(directory / "config.toml")
            changed = before.differences(config, ignore=CHANGEABLE)
            if changed:
                raise RunDirectoryError(
                    f"the configuration changed since {directory} began ({'; '.join(changed)}): "
                    "change it back, or begin again with --fresh"
                )
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "config.toml", config.to_toml())
    return directory


def _free_name(directory: Path) -> Path:
    number = 1
    while (candidate := directory.with_name(f"{directory.name}.{number}")).exists():
        number += 1
    return candidate
