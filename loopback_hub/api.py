"""The Hub's endpoints for models and datasets, over a Store. Raises Refusal for what the Hub refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import cast
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from loopback_hub import card
from loopback_hub.git import (
    REPO_TYPES,
    Commit,
    Entry,
    Refusal,
    Repo,
    check_ref,
    folders,
    folders_of,
)
from loopback_hub.oauth import OAuth
from loopback_hub.rights import CAS, Rights
from loopback_hub.store import Store
from loopback_hub.upload import Uploads
from loopback_hub.wire import Answer, Call, content, is_true, json_object
from loopback_hub.xet import Xet

_TYPES = {f"{name}s": name for name in REPO_TYPES}
_GATES = (False, "auto", "manual")


class Api:
    """Answers calls. origin: base of all addresses. The settings are explained at LoopbackHub."""

    def __init__(self, store: Store, rights: Rights, origin: Callable[[], str]) -> None:
        self._store, self._rights, self._origin = store, rights, origin
        self.uploads = Uploads(store, rights, origin, self._url)
        self.xet = Xet(store, rights, origin, self.uploads)
        self._oauth = OAuth(rights, origin)
        self.page_size = 1000
        self.redirect_lfs = False
        self._actions: dict[tuple[str, str], Callable[[Call, Repo, list[str]], Answer]] = {
            ("GET", ""): self._info,
            ("GET", "revision"): self._info,
            ("GET", "tree"): self._tree,
            ("POST", "paths-info"): self._paths_info,
            ("GET", "refs"): self._refs,
            ("GET", "commits"): self._commits,
            ("POST", "preupload"): self.uploads.preupload,
            ("POST", "commit"): self.uploads.commit,
            ("PUT", "settings"): self._settings,
            ("POST", "branch"): self._create_branch,
            ("DELETE", "branch"): self._delete_branch,
            ("POST", "tag"): self._create_tag,
            ("DELETE", "tag"): self._delete_tag,
            ("GET", "auth-check"): self._auth_check,
            ("GET", "xet-read-token"): self.xet.read_token,
            ("GET", "xet-write-token"): self.xet.write_token,
        }

    def respond(self, call: Call) -> Answer:
        """The answer to a call. Raises Refusal."""
        method = "GET" if call.method == "HEAD" else call.method
        parts = [unquote(part) for part in urlsplit(call.target).path.strip("/").split("/")]
        fixed = {
            ("GET", "api/whoami-v2"): self._whoami,
            ("POST", "api/repos/create"): self._create,
            ("DELETE", "api/repos/delete"): self._delete,
            ("POST", "api/validate-yaml"): self._validate_yaml,
            ("GET", "api/models"): self._search,
            ("GET", ".well-known/openid-configuration"): self._oauth.configuration,
            ("GET", "oauth/authorize"): self._oauth.authorize,
            ("POST", "oauth/token"): self._oauth.token,
            ("GET", "oauth/userinfo"): self._oauth.userinfo,
        }.get((method, "/".join(parts)))
        if fixed:
            return fixed(call)
        if parts[0] == "_lfs":
            return self.uploads.object(call, method, parts[1:])
        if parts[0] == CAS:
            return self.xet.cas(call, method, parts[1:])
        if parts[0] == "api" and len(parts) >= 3 and parts[1] in _TYPES:
            repo = self._rights.readable(call, _TYPES[parts[1]], "/".join(parts[2:4]))
            action = self._actions.get((method, "".join(parts[4:5])))
            if action:
                return action(call, repo, parts[5:])
        return self._file_call(call, method, parts)

    def _whoami(self, call: Call) -> Answer:
        user = self._rights.signed_in(call)
        role = "read" if self._rights.only_reads(call) else "write"
        return Answer(
            {
                "type": "user",
                "id": _id(user),
                "name": user,
                "fullname": user,
                "isPro": False,
                "orgs": [
                    {"type": "org", "id": _id(name), "name": name, "fullname": name, "roleInOrg": "admin"}
                    for name in self._rights.orgs.get(user, ())
                ],
                "auth": {
                    "type": "access_token",
                    "accessToken": {"displayName": "loopback", "role": role},
                },
            }
        )

    # Repositories

    def _create(self, call: Call) -> Answer:
        wish = call.body.json()
        repo_type, repo_id = self._named(call, wish)
        user = self._rights.writer(call, repo_id.split("/")[0])
        private = _private(wish)
        url = self._url(repo_type, repo_id)
        try:
            self._store.create(repo_type, repo_id, user, bool(private))
        except Refusal as error:
            if error.status == 409:
                return Answer({"error": error.message, "url": url}, 409)
            raise
        return Answer({"url": url, "name": repo_id, "id": _id(repo_id)})

    def _delete(self, call: Call) -> Answer:
        repo_type, repo_id = self._named(call, call.body.json())
        self._rights.writer(call, self._rights.readable(call, repo_type, repo_id).owner)
        self._store.delete(repo_type, repo_id)
        return Answer(b"OK", headers={"Content-Type": "text/plain"})

    def _settings(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        self._rights.writer(call, repo.owner)
        wish = call.body.json()
        private, gated = _private(wish), wish.get("gated", repo.gated)
        if gated not in _GATES:
            raise Refusal(400, f"gated must be one of {_GATES}, not {gated!r}")
        with self._store.lock:
            current = self._store.get(repo.type, repo.id)
            changed = replace(current, private=current.private if private is None else private, gated=gated)
            self._store.update(changed)
        return Answer({"private": changed.private, "gated": changed.gated})

    def _auth_check(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        if rest == ["write"]:
            self._rights.writer(call, repo.owner)
        self._rights.open_gate(call, repo)
        return Answer({})

    def _named(self, call: Call, wish: Mapping[str, object]) -> tuple[str, str]:
        owner = wish.get("organization") or self._rights.signed_in(call)
        return str(wish.get("type") or "model"), f"{owner}/{wish.get('name')}"

    def _url(self, repo_type: str, repo_id: str) -> str:
        return f"{self._origin()}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"

    # What is in a repository

    def _search(self, call: Call) -> Answer:
        """Models that the caller may read, by a part of their names and by tags."""
        query = call.query
        text, tags = query.get("search", [""])[0].casefold(), {*query.get("filter", ())}
        found = []
        for repo in self._store.all("model"):
            if text in repo.id.casefold() and self._rights.may_read(call, repo):
                facts = self._facts(repo, self._store.commit_at(repo, "main"), blobs=False)
                if tags <= {*cast("list[str]", facts["tags"])}:
                    found.append(facts)
        limit = query.get("limit", [""])[0]
        page, headers = self._page(call, found[: int(limit)] if limit.isdigit() else found)
        return Answer(page, headers=headers)

    def _info(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        commit = self._store.commit_at(repo, "/".join(rest) or "main")
        facts = self._facts(repo, commit, call.flag("blobs"))
        expand = {name for key in ("expand", "expand[]") for name in call.query.get(key, [])}
        if expand:
            facts = {key: value for key, value in facts.items() if key in expand | {"_id", "id"}}
        return Answer(facts)

    def _facts(self, repo: Repo, commit: Commit, blobs: bool) -> dict[str, object]:
        about = self._card(commit)
        facts: dict[str, object] = {
            "_id": _id(repo.id),
            "id": repo.id,
            "author": repo.owner,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.tags(about),
            "usedStorage": sum(entry.size for entry in commit.files.values()),
            "siblings": [_sibling(path, entry, blobs) for path, entry in commit.files.items()],
            **({"cardData": about} if about else {}),
        }
        if repo.type == "model":
            known = ("library_name", "pipeline_tag", "mask_token")
            facts |= {"modelId": repo.id, **{key: about[key] for key in known if key in about}}
        return facts

    def _card(self, commit: Commit) -> dict[str, object]:
        entry = commit.files.get("README.md")
        if entry is None or entry.lfs:
            return {}
        with suppress(card.CardError):
            return card.metadata(self._store.content(entry).read_text("utf-8", "replace")) or {}
        return {}

    def _tree(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        commit = self._store.commit_at(repo, "".join(rest[:1]))
        folder = "/".join(rest[1:]).strip("/")
        prefix = folder + "/" if folder else ""
        if folder and folder not in folders_of(commit.files):
            missing = f"{folder} does not exist on {rest[0]}"
            raise Refusal(404, missing, "EntryNotFound", {"X-Repo-Commit": commit.sha})
        recursive, expand = call.flag("recursive"), call.flag("expand")
        paths = [
            path
            for path in sorted(folders_of(commit.files) | commit.files.keys())
            if path.startswith(prefix) and (recursive or "/" not in path[len(prefix) :])
        ]
        page, headers = self._page(call, paths)
        return Answer(self._entries(repo, commit, page, expand), headers=headers)

    def _paths_info(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        commit = self._store.commit_at(repo, "/".join(rest))
        data = call.body.read()
        if (call.headers.get("Content-Type") or "").startswith("application/json"):
            asked = json_object(data)
            paths, expand = asked.get("paths", []), bool(asked.get("expand"))
        else:
            form = parse_qs(data.decode("utf-8", "replace"))
            paths, expand = form.get("paths", []), is_true(form.get("expand"))
        paths = [path.strip("/") for path in paths if isinstance(path, str)]
        known = folders_of(commit.files) | commit.files.keys()
        return Answer(self._entries(repo, commit, [path for path in paths if path in known], expand))

    def _entries(self, repo: Repo, commit: Commit, paths: list[str], expand: bool) -> list[dict]:
        trees = folders(commit.files)
        changes = self._store.last_changes(repo, commit) if expand else {}
        found = []
        for path in paths:
            entry = commit.files.get(path)
            line = (
                {"type": "directory", "oid": trees[path], "size": 0, "path": path}
                if entry is None
                else _tree_line(path, entry) | self.xet.listed(entry)
            )
            if expand:
                last = changes[path]
                line["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
            found.append(line)
        return found

    def _page(self, call: Call, items: list) -> tuple[list, dict[str, str]]:
        query = call.query
        start = int(query.get("cursor", ["0"])[0]) if query.get("cursor", ["0"])[0].isdigit() else 0
        end = start + self.page_size
        headers = {}
        if end < len(items):
            following = urlencode({**query, "cursor": [str(end)]}, doseq=True)
            headers["Link"] = f'<{self._origin()}{urlsplit(call.target).path}?{following}>; rel="next"'
        return items[start:end], headers

    def _refs(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        def lines(names: Mapping[str, str], prefix: str) -> list[dict]:
            return [{"name": n, "ref": prefix + n, "targetCommit": sha} for n, sha in names.items()]

        answer = {"branches": lines(repo.branches, "refs/heads/"), "converts": []}
        answer["tags"] = lines(repo.tags, "refs/tags/")
        if "include_prs" in call.query:
            answer["pullRequests"] = lines(repo.pulls, "refs/pr/")
        return Answer(answer)

    def _commits(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        lines = [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in self._store.history(repo, "/".join(rest))
        ]
        page, headers = self._page(call, lines)
        return Answer(page, headers=headers)

    # References

    def _create_branch(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        self._rights.writer(call, repo.owner)
        start = str(call.body.json().get("startingPoint") or "main")
        return self._add_reference(repo, "branches", "/".join(rest), start)

    def _delete_branch(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        self._rights.writer(call, repo.owner)
        if rest == ["main"]:
            raise Refusal(403, "The branch main cannot be deleted")
        return self._drop_reference(repo, "branches", "/".join(rest))

    def _create_tag(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        self._rights.writer(call, repo.owner)
        return self._add_reference(repo, "tags", call.body.json().get("tag"), "/".join(rest))

    def _delete_tag(self, call: Call, repo: Repo, rest: list[str]) -> Answer:
        self._rights.writer(call, repo.owner)
        return self._drop_reference(repo, "tags", "/".join(rest))

    def _add_reference(self, repo: Repo, names: str, name: object, start: str) -> Answer:
        with self._store.lock:
            repo = self._store.get(repo.type, repo.id)
            if check_ref(name) in getattr(repo, names):
                raise Refusal(409, f"Reference {name} exists already")
            sha = self._store.resolve(repo, start)
            self._store.update(replace(repo, **{names: {**getattr(repo, names), str(name): sha}}))
        return Answer({})

    def _drop_reference(self, repo: Repo, names: str, name: str) -> Answer:
        with self._store.lock:
            repo = self._store.get(repo.type, repo.id)
            left = dict(getattr(repo, names))
            if left.pop(name, None) is None:
                raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
            self._store.update(replace(repo, **{names: left}))
        return Answer({})

    # Download

    def _file_call(self, call: Call, method: str, parts: list[str]) -> Answer:
        repo_type, inner = ("dataset", parts[1:]) if parts[0] == "datasets" else ("model", parts)
        if method == "GET" and "resolve" in inner[1:3]:
            at = inner.index("resolve", 1)
            repo = self._rights.readable(call, repo_type, "/".join(inner[:at]))
            return self._download(call, repo, "".join(inner[at + 1 : at + 2]), "/".join(inner[at + 2 :]))
        if method == "POST" and len(inner) == 6 and inner[2:5] == ["info", "lfs", "objects"]:
            repo = self._rights.readable(call, repo_type, "/".join(inner[:2]).removesuffix(".git"))
            if inner[5] == "batch":
                return self.uploads.lfs_batch(call, repo)
            if inner[5] == "verify":
                return self.uploads.lfs_verify(call, repo)
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def _download(self, call: Call, repo: Repo, revision: str, path: str) -> Answer:
        self._rights.open_gate(call, repo)
        commit, entry = self._store.entry(repo, revision, path)
        headers = {
            "X-Repo-Commit": commit.sha,
            "ETag": f'"{entry.etag}"',
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        }
        if entry.lfs:
            headers |= {"X-Linked-ETag": f'"{entry.lfs}"', "X-Linked-Size": str(entry.size)}
            headers |= self.xet.headers(repo, commit, entry)
        if entry.lfs and self.redirect_lfs:
            link = self.uploads.signed("download", repo, entry.lfs, entry.size)
            headers["Location"] = link.replace("//127.0.0.1:", "//localhost:", 1)
            return Answer(f"Found. Redirecting to {headers['Location']}".encode(), 302, headers)
        return content(call, self._store.content(entry), headers)

    def _validate_yaml(self, call: Call) -> Answer:
        wish = call.body.json()
        errors, warnings = card.problems(str(wish.get("content", "")), str(wish.get("repoType", "model")))
        lists = {
            "errors": [{"message": text} for text in errors],
            "warnings": [{"message": text} for text in warnings],
        }
        return Answer(lists, 400 if errors else 200)


def _tree_line(path: str, entry: Entry) -> dict:
    line: dict = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        line["lfs"] = {"oid": entry.lfs, "size": entry.size, "pointerSize": entry.pointer_size}
    return line


def _sibling(path: str, entry: Entry, blobs: bool) -> dict:
    line: dict = {"rfilename": path}
    if blobs:
        line |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            line["lfs"] = {"sha256": entry.lfs, "size": entry.size, "pointerSize": entry.pointer_size}
    return line


def _private(wish: Mapping[str, object]) -> bool | None:
    visibility, private = wish.get("visibility"), wish.get("private")
    if visibility not in (None, "public", "private"):
        raise Refusal(400, f"visibility must be public or private, not {visibility!r}")
    if private is not None and not isinstance(private, bool):
        raise Refusal(400, f"private must be true or false, not {private!r}")
    return private if visibility is None else visibility == "private"


def _id(name: str) -> str:
    """A stable 24-digit id, of the form the Hub's database ids have."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]
