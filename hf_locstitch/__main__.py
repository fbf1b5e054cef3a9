"""`python -m hf_locstitch` is the command hf-locstitch."""

import sys

from hf_locstitch.cli.main import main

sys.exit(main())
