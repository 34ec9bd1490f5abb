"""`python -m nflows_iresnet.experiments` is `nflows-iresnet`."""

from __future__ import annotations

import sys

from nflows_iresnet.experiments.cli import main

if __name__ == "__main__":
    sys.exit(main())
