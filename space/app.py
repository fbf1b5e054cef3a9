"""The Space: visitors sign in with the Hub, and merge to their own accounts. All of it is `hf_locstitch.ui`."""

import os

from hf_locstitch.ui.config import space_config
from hf_locstitch.ui.serve import Server

if __name__ == "__main__":
    Server(space_config(os.environ)).run()
