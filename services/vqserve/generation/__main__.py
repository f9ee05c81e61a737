"""`python -m vqserve.generation --model FOLDER`: read the settings, configure the logs, serve."""

from __future__ import annotations

import sys
from collections.abc import Callable

from vqserve.common import lifecycle, logging
from vqserve.generation.app import SERVICE_NAME, build_app, engine_loader
from vqserve.generation.config import GenerationSettings
from vqserve.generation.models import Loader


def main(make_loader: Callable[[GenerationSettings], Loader] = engine_loader) -> int:
    """Serve until told to stop; the exit status."""
    settings = GenerationSettings.from_args()
    logging.configure(SERVICE_NAME, settings.log_level)
    return lifecycle.run(lambda: build_app(settings, make_loader(settings)))


if __name__ == "__main__":
    sys.exit(main())
