"""What a release must have, the notes of one, and its README.

python .github/release.py [--tag vX.Y.Z] [--repository OWNER/NAME]    checks; exit status 1 names what is wrong
python .github/release.py --notes                                     the version's part of CHANGELOG.md
python .github/release.py --readme REF --repository OWNER/NAME        README.md as PyPI can show it
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version() -> str:
    """Of the code; read, for nothing is installed where this runs."""
    text = (ROOT / "hf_locstitch/runtime/version.py").read_text()
    return re.findall(r'__version__ = "(.+)"', text)[0]


def notes(changelog: str, version: str) -> tuple[str, str] | None:
    """A version's date and changes, None if the changelog does not tell of it."""
    found = re.search(rf"^## {re.escape(version)} - (\d{{4}}-\d\d-\d\d)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    return (found[1], found[2].strip()) if found else None


def absolute(readme: str, repository: str, ref: str) -> str:
    """A README whose links and images lead to a repository's files: PyPI knows no relative ones. ref: a tag, a branch
    or a commit."""
    relative = r"(?![a-z]+:|#)"
    pictures = rf'(!\[[^]]*\]\(|<img\b[^>]*\bsrc="){relative}'
    links = rf'(\]\(|<a\b[^>]*\bhref="){relative}'
    readme = re.sub(pictures, rf"\1https://raw.githubusercontent.com/{repository}/{ref}/", readme)
    return re.sub(links, rf"\1https://github.com/{repository}/blob/{ref}/", readme)


def problems(version: str, files: dict[str, str], tag: str | None, repository: str | None) -> Iterator[str]:
    """files: texts by name, of CHANGELOG.md, CITATION.cff and pyproject.toml. tag: that is to be released. repository:
    that it is released from."""
    told = notes(files["CHANGELOG.md"], version)
    if told is None:
        yield f"CHANGELOG.md has no part '## {version} - YYYY-MM-DD'"
    elif f'date-released: "{told[0]}"' not in files["CITATION.cff"]:
        yield f"CITATION.cff has another date-released than CHANGELOG.md, which says {told[0]}"
    if f'version: "{version}"' not in files["CITATION.cff"]:
        yield f"CITATION.cff is not of version {version}"
    if tag is not None and tag != f"v{version}":
        yield f"the tag is {tag}, the version {version}"
    if repository is not None:
        for name in ("pyproject.toml", "CITATION.cff"):
            if f"https://github.com/{repository}" not in files[name]:
                yield f"{name} does not name https://github.com/{repository}: put its owner in place of OWNER"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", help="that is to be released")
    parser.add_argument("--repository", metavar="OWNER/NAME", help="that it is released from")
    parser.add_argument("--notes", action="store_true", help="print the version's part of the changelog")
    parser.add_argument(
        "--readme", metavar="REF", help="print the README with links to the repository at a tag or branch"
    )
    args = parser.parse_args()
    if args.readme:
        if args.repository is None:
            parser.error("--readme needs --repository, which the links lead to")
        print(absolute((ROOT / "README.md").read_text(encoding="utf-8"), args.repository, args.readme), end="")
        return 0
    files = {name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CITATION.cff", "pyproject.toml")}
    found = list(problems(version(), files, args.tag, args.repository))
    if args.notes and (told := notes(files["CHANGELOG.md"], version())):
        print(told[1])
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
