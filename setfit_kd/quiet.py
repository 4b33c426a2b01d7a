"""Keeping the libraries below from talking over us, without hiding their warnings."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_warnings(library: str) -> Iterator[None]:
    """Within this block, a library logs errors only: what it would warn of is checked by us."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within this block, the libraries below draw no progress bars of their own and SetFit logs warnings only.

    Importing SetFit raises its log level to INFO in five modules; where this block is the first to import it, the
    level stays at WARNING afterwards too.
    """
    was_imported = "setfit" in sys.modules
    import datasets
    import setfit
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    transformers_logging: Any = transformers.utils.logging
    level = setfit.logging.get_verbosity()
    undo = []
    if transformers_logging.is_progress_bar_enabled():
        transformers_logging.disable_progress_bar()
        undo.append(transformers_logging.enable_progress_bar)
    if datasets.is_progress_bar_enabled():
        datasets.disable_progress_bars()
        undo.append(datasets.enable_progress_bars)
    if not are_progress_bars_disabled():
        disable_progress_bars()
        undo.append(enable_progress_bars)
    setfit.logging.set_verbosity_warning()
    try:
        yield
    finally:
        if was_imported:
            setfit.logging.set_verbosity(level)
        for enable in undo:
            enable()
