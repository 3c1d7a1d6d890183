"""Where the store is, and how it is opened.

In: the configuration, the environment.  Out: a `Store` with its thread, or `ConfigError`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gateway.config import Config
from gateway.errors import ConfigError
from gateway.store.database import Database, StoreError
from gateway.store.store import Store
from gateway.store.writer import Writer


def store_directory(config: Config, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Say where the store is: the configured place, or the directory `store` in that of the service's state.

    None if there is neither (STATE_DIRECTORY, systemd.exec(5)).
    """
    if config.store.directory is not None:
        return config.store.directory
    state = environment.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(state) / "store" if state else None


def store_is_wanted(config: Config) -> bool:
    """Whether any rule says `store`."""
    return any(device.store for device in config.device)


def stores_all(config: Config) -> bool:
    """Whether every device that is let in has a rule that says `store`."""
    is_closed = config.devices.unknown == "refuse" or any(device.is_for_everybody for device in config.device)
    return is_closed and all(device.store for device in config.device)


def open_store(
    config: Config,
    post: Callable[[Callable[[], None]], None],
    seconds: Callable[[], float],
    is_plausible: Callable[[], bool] = lambda: True,
    environment: Mapping[str, str] = os.environ,
) -> Store | None:
    """Open the store if a rule wants one, or messages of another configuration wait in it.  Raises `ConfigError`.

    `post` calls a function in the reactor's thread.
    """
    is_wanted = store_is_wanted(config)
    directory = store_directory(config, environment)
    if directory is None:
        if is_wanted:
            raise ConfigError(
                ["store.directory: it is missing, and there is no STATE_DIRECTORY: name where messages are kept"]
            )
        return None
    if not is_wanted and not (directory / "store.db").exists():
        return None
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([f"store.directory: {directory} cannot be made: {error.strerror}"]) from None
    stores: list[Store] = []
    # The writer speaks to a store that is made of what the writer finds.
    writer = Writer(
        Database(directory),
        post,
        lambda seconds, used, error: stores[0].committed(seconds, used, error),
        lambda rows: stores[0].scanned(rows),
        lambda words: stores[0].noted(words),
    )
    try:
        opened = writer.open()
    except StoreError as error:
        raise ConfigError([f"store.directory: {error}"]) from None
    stores.append(Store(config.store, opened, writer, seconds, time.time, is_plausible))
    return stores[0]
