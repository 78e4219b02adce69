"""`python -m dspy_prod.cli`."""

import sys

from dspy_prod.cli import main

sys.exit(main())
