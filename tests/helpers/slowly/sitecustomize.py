"""On PYTHONPATH of a subprocess: every chunk takes a while, so that a test can kill the process in the middle."""

import sys
import time
from importlib.abc import MetaPathFinder


class _Slowly(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name == "hf_locstitch.engine.model_run":
            from hf_locstitch.engine.shard_writer import ShardWriter
            from hf_locstitch.localize import scan

            for owner, method in ((scan.Scan, "_offer"), (ShardWriter, "_merge")):
                setattr(owner, method, _slow(getattr(owner, method)))
        return None


def _slow(function):  # type: ignore[no-untyped-def]
    def call(*args):  # type: ignore[no-untyped-def]
        time.sleep(0.2)
        return function(*args)

    return call


sys.meta_path.insert(0, _Slowly())
