"""`python -m vqserve.tokenizer`: read the settings, configure the logs, serve."""

from __future__ import annotations

import sys

from vqserve.common import lifecycle, logging
from vqserve.tokenizer.app import SERVICE_NAME, build_app
from vqserve.tokenizer.config import TokenizerSettings


def main() -> int:
    """Serve until told to stop; the exit status."""
    settings = TokenizerSettings.from_args()
    logging.configure(SERVICE_NAME, settings.log_level)
    return lifecycle.run(lambda: build_app(settings))


if __name__ == "__main__":
    sys.exit(main())
