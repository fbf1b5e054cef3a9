"""`python -m hf_locstitch` is the command hf-locstitch."""

import sys

from hf_locstitch.cli import main

sys.exit(main())
