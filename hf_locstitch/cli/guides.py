"""Where a page of the documentation is read: on the site that the installed package names."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, metadata

NO_OWNER = "OWNER"  # in place of the account that will publish the project


def address(page: str, project_urls: Iterable[str]) -> str:
    """Where to read a page.

    Args:
        page: Its path under docs/: `guides/export.md`.
        project_urls: `Label, URL` lines of a package's metadata.

    Returns:
        The page's URL on the site, or its path in a checkout while there is no site.
    """
    site = dict(line.split(", ", 1) for line in project_urls).get("Documentation", "")
    if not site or NO_OWNER in site:
        return f"docs/{page}"
    return f"{site.rstrip('/')}/{page.removesuffix('.md')}/"


@cache
def project_urls() -> tuple[str, ...]:
    """Of the installed package; none where it only lies in a folder, as in a Space."""
    try:
        return tuple(metadata("hf-locstitch").get_all("Project-URL") or ())
    except PackageNotFoundError:
        return ()
