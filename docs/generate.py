"""Pages of the site that are made from the code at build time: every recipe key, every flag, every error message.

mkdocs loads this as a hook (`hooks:` in mkdocs.yml). The pages exist in the build only.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

import hf_locstitch
from hf_locstitch import errors
from hf_locstitch.cli.arguments import build_parser
from hf_locstitch.cli.parser import Parser
from hf_locstitch.localize.localizers import LOCALIZERS
from hf_locstitch.localize.localizers.mask import PRESETS
from hf_locstitch.plan.recipe import Recipe
from hf_locstitch.stitch.methods import METHODS
from hf_locstitch.stitch.stitchers import STITCHERS
from hf_locstitch.tasks.objectives import OBJECTIVES
from hf_locstitch.training.request import FinetuneRequest

Schema = Mapping[str, Any]

# Recipe key -> the registry whose components it takes, and the key that names one of them.
CHOICES = {
    "localizer": (LOCALIZERS, "method", "Localizers"),
    "method": (METHODS, "name", "Methods"),
    "stitch": (STITCHERS, "method", "Stitchers"),
    "objective": (OBJECTIVES, "kind", "Objectives"),
}
# Class that a recipe is made of -> what the page calls it.
TITLES = {
    "Input": "Input",
    "Finetuned": "Finetune",
    "Localized": "Localized checkpoint",
    "LocalizationSet": "Localization set",
    "EvaluateOptions": "Evaluation",
    "CompareOptions": "Comparison",
    "EvaluationSet": "Evaluation set",
    "LmEvalOptions": "Options of lm-eval",
}
FLAG_OF = {"finetuned": "ft"}  # recipe key -> the flag's destination, where they differ
# What class docstrings leave to the reader's guess.
MORE = {
    ("LocalizationSet", "seed"): "of the draw.",
    ("", "chat_template"): "put prompts into the model's chat template.",
    ("", "parents"): "also score the base and the finetunes.",
    ("", "average"): "also score their plain average, made on the fly.",
    ("Mask", "epochs"): "steps: one an epoch.",
    ("Mask", "lr"): "how far a step goes.",
    ("Mask", "start_density"): "of the initial mask.",
    ("Refit", "judge"): "what decides between the lambdas.",
    ("", "tokens"): "of an input, at most.",
    ("", "max_length"): "tokens of an example, at most.",
    ("", "kind"): "names this objective.",
    ("", "name"): "names this method.",
    ("", "method"): "names this one.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """mkdocs asks which files there are."""
    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def pages() -> dict[str, str]:
    """Path under docs/ -> Markdown."""
    return {
        "reference/recipe.md": recipe_page(),
        "reference/commands.md": commands_page(),
        "reference/errors.md": errors_page(),
    }


# --- the recipe ---------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    parts: list[str] = [
        "# Recipe reference",
        "A recipe is a YAML file; [the guide](../guides/recipes.md) shows how to write one. These are all its keys, as "
        "the program itself checks them. An unknown key is an error.",
        "## Top level",
        _table(Recipe, _meanings(Recipe, "merge")),
    ]
    for part in _parts(Recipe):
        parts += [f"## {_title(part.__name__)} {{#{_anchor(part.__name__)}}}", *_component(part)]
    for key, (registry, field, title) in CHOICES.items():
        parts.append(f"## {title} {{#{key}}}")
        parts.append(f"`{key}: {{{field}: NAME, …}}` takes one of these{_default_of(key)}.")
        for name in registry.names():
            model: Any = registry.find(name)
            parts += [f"### `{name}` {{#{key}-{name}}}", *_component(model)]
    parts += [
        "## Finetune recipes {#finetunerequest}",
        "What [`finetune`](../guides/finetune.md) takes, in a file of its own. None follows from the objective.",
        _table(FinetuneRequest, _meanings(FinetuneRequest, "finetune")),
    ]
    return "\n\n".join(parts) + "\n"


def _parts(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The models that a model's fields hold, and theirs, without components."""
    registered = {one for registry, _, _ in CHOICES.values() for one in registry.all()}
    found: list[type[BaseModel]] = []

    def look(kind: Any) -> None:
        if inspect.isclass(kind) and issubclass(kind, BaseModel) and kind not in registered and kind not in found:
            found.append(kind)
            for field in kind.model_fields.values():
                look(field.annotation)
        for one in get_args(kind):
            look(one)

    look(model)
    return [one for one in found if one is not model]


def _default_of(key: str) -> str:
    return {
        "localizer": " (`magnitude` unless named)",
        "method": " (`locstitch` unless named); a method without keys of its own may be named alone: `method: ties`",
        "stitch": "; `stitch: mean`, the default, is the mean of the finetuned values",
        "objective": ", inside a localization set; unless given it follows from the model's architecture",
    }[key]


def _component(model: type[BaseModel]) -> Iterator[str]:
    """What its documentation says, and its keys."""
    intro, meanings = _documented(model)
    if paper := getattr(model, "paper", None):
        yield f"[{getattr(model, 'title', model.__name__)}]({paper})"
    if summary := _summary(model):
        yield summary
    if intro:
        yield intro
    yield _table(model, meanings)
    if model is LOCALIZERS.find("mask"):
        yield _presets()


def _presets() -> str:
    """What each preset of `mask` stands for."""
    fields = list(PRESETS["default"])
    rows = [["preset", *(f"`{field}`" for field in fields)], [":---"] * (len(fields) + 1)]
    rows += [[f"`{name}`", *(_value(preset[field]) for field in fields)] for name, preset in PRESETS.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _summary(model: type[BaseModel]) -> str:
    """The first paragraph of the module that holds a component, which holds nothing else."""
    module = inspect.getmodule(model)
    if module is None or getattr(module, "COMPONENT", None) is not model:
        return ""
    return _markdown((module.__doc__ or "").split("\n\n")[0])


def _documented(model: type[BaseModel]) -> tuple[str, dict[str, str]]:
    """Class docstrings name their fields as `field: what it means.`, several as `one, other: …`."""
    intro, meanings = [], {}
    for cls in reversed([cls for cls in model.__mro__ if issubclass(cls, BaseModel) and cls is not BaseModel]):
        if not any(name in model.model_fields for name in inspect.get_annotations(cls)):
            continue
        if (doc := inspect.cleandoc(cls.__dict__.get("__doc__") or "")) == "":
            continue
        names = "|".join(sorted(map(re.escape, model.model_fields), key=len, reverse=True))
        cuts = list(re.finditer(rf"(?:(?<=\s)|^)((?:{names})(?:, (?:{names}))*): ", doc))
        before = doc[: cuts[0].start()] if cuts else doc
        if cls is model and before.strip():
            intro.append(_markdown(before))
        for cut, after in pairwise([*cuts, None]):
            assert cut is not None
            text = _markdown(doc[cut.end() : after.start() if after else None])
            meanings |= dict.fromkeys(cut.group(1).split(", "), text)
    return "\n\n".join(intro), {name: text for name, text in meanings.items() if not text.startswith("as in ")} | {
        name: _inherited(model, name) for name, text in meanings.items() if text.startswith("as in ")
    }


def _inherited(model: type[BaseModel], name: str) -> str:
    """A field that is documented `as in` another class, as a base class of both has it."""
    for cls in model.__mro__[1:]:
        if issubclass(cls, BaseModel) and name in cls.model_fields and cls is not BaseModel:
            found = _documented(cls)[1].get(name, "")
            if found:
                return found
    return ""


def _meanings(model: type[BaseModel], command: str) -> dict[str, str]:
    """From the strings below the fields, or else the help of the command's flag of that name."""
    body = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = _markdown(str(text.value.value))
    helps = {action.dest: action.help for action in _commands()[command]._actions if action.help}
    for name in model.model_fields:
        if name not in found and (text := helps.get(FLAG_OF.get(name, name))):
            found[name] = _markdown(text)
    return found


def _table(model: type[BaseModel], meanings: Mapping[str, str]) -> str:
    schema = model.model_json_schema()
    rows = ["| key | takes | default | meaning |", "| :--- | :--- | :--- | :--- |"]
    own = inspect.get_annotations(model)
    order = sorted(schema["properties"], key=lambda name: ("const" not in schema["properties"][name], name not in own))
    for name in order:
        kind = _kind(name, schema["properties"][name])
        meaning = meanings.get(name) or MORE.get((model.__name__, name)) or MORE.get(("", name), "")
        rows.append("| " + " | ".join([f"`{name}`", kind, _default(model, name), _cell(_sentence(meaning))]) + " |")
    return "\n".join(rows)


def _default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "**required**"
    if model is LOCALIZERS.find("mask") and name in PRESETS["default"]:
        return "by `preset`"
    return _value(field.get_default(call_default_factory=True))


def _kind(name: str, field: Schema) -> str:
    """What a key takes, in words; components and other parts of the page as links."""
    if name in CHOICES and ("$ref" in str(field)):
        return f"[one of these](#{name})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if "$ref" in field:
        return _linked(field["$ref"])
    if "anyOf" in field:
        kinds = [_kind("", one) for one in field["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = field.get("type")
    if kind == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])} numbers"
        return "list of " + _plural(_kind("", field.get("items", {})))
    if kind == "object":
        inner = field.get("additionalProperties")
        return "mapping of names to " + _kind("", inner) if isinstance(inner, dict) else "mapping"
    words = {"string": "text", "number": "number", "integer": "whole number", "boolean": "`true` or `false`"}
    return words.get(str(kind), "any value") + _bounds(field)


def _plural(kind: str) -> str:
    """text -> texts, [finetune](#…) -> [finetunes](#…)."""
    return re.sub(r"^(\[?)(text|number|whole number|finetune|input|localization set)\b", r"\1\2s", kind)


def _bounds(field: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return f", {', '.join(said)}" if said else ""


def _linked(ref: str) -> str:
    name = ref.rsplit("/", 1)[-1]
    return f"[{_title(name).lower()}](#{_anchor(name)})"


def _value(value: Any) -> str:
    """As YAML has it."""
    if value is None or value in ([], {}, ()):
        return "–"
    if isinstance(value, BaseModel):
        value = getattr(value, "name", "–")
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, tuple | list):
        value = "[" + ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value) + "]"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _anchor(name: str) -> str:
    return _slug(_title(name))


# --- the commands -------------------------------------------------------------------------------------------------


def commands_page() -> str:
    parts = [
        "# Command reference",
        "`python -m hf_locstitch` is the same program. `REF` is a folder, `org/name`, "
        "`org/name/subfolder`, or one of these with `@revision`; several "
        "values follow one flag (`--ft a b c`). Exit status: 0 done; 2 the request is wrong and nothing was written; 1 "
        "the work failed, and the same command may be given again (of `verify`: a check failed).",
    ]
    for name, parser in _commands().items():
        parts += [f"## `{name}` {{#{name}}}", str(parser.description), f"```text\n{_usage(parser)}\n```"]
        parts += _examples(parser)
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
            if actions:
                title = {"positional arguments": "Arguments", "options": "Options"}.get(str(group.title), group.title)
                parts += [f"### {str(title).capitalize()} {{#{name}-{_slug(str(title))}}}", _flags(actions)]
    return "\n\n".join(parts) + "\n"


def _commands() -> dict[str, Parser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the program has no sub-commands")


def _examples(parser: Parser) -> list[str]:
    """What ends a help text: command lines, and the page that tells more."""
    commands = [line.strip() for line in str(parser.epilog).splitlines() if line.startswith("  ")]
    return ["```bash\n" + "\n".join(commands) + "\n```", f"[The guide](../{parser.guide})"]


def _usage(parser: argparse.ArgumentParser) -> str:
    formatter = argparse.HelpFormatter(parser.prog, width=76)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    return formatter.format_help().strip()


def _flags(actions: Sequence[argparse.Action]) -> str:
    rows = ["| flag | meaning |", "| :--- | :--- |"]
    for action in actions:
        value = f" {_metavar(action)}" if action.nargs != 0 else ""
        flag = f"`{', '.join(action.option_strings)}{value}`" if action.option_strings else f"`{_metavar(action)}`"
        listed = action.choices if action.choices and action.metavar is None else ()  # else the help lists them
        choices = f" One of {', '.join(f'`{one}`' for one in listed)}." if listed else ""
        rows.append(f"| {_cell(flag)} | {_cell(_sentence(_markdown(action.help or '')) + choices)} |")
    return "\n".join(rows)


def _metavar(action: argparse.Action) -> str:
    name = str(action.metavar or ("CHOICE" if action.choices else action.dest.upper()))
    return f"{name}…" if action.nargs == "+" else name


# --- the errors ---------------------------------------------------------------------------------------------------


def errors_page() -> str:
    """Every message that the code raises on purpose, by its class. What changes from case to case is `…`."""
    of_class: dict[str, set[str]] = {}
    root = Path(str(hf_locstitch.__file__)).parent
    for path in sorted(root.rglob("*.py")):
        for name, message in _raised(ast.parse(path.read_text(encoding="utf-8"))):
            of_class.setdefault(name, set()).add(message)
    tree = (errors.__doc__ or "").split("\n\n")[1]
    parts = [
        "# Errors",
        "Every error that hf-locstitch raises on purpose is a `LocstitchError`, and its message is one short "
        "paragraph: what is wrong, where, both values, the next step. The command line prints it after "
        "`hf-locstitch: error:` and returns the exit status of its class; `--debug` adds the traceback. "
        "[Troubleshooting](../guides/troubleshooting.md) says what lies behind them.",
        _error_tree(tree),
    ]
    for name in ERROR_CLASSES:
        messages = sorted(of_class.get(name, ()), key=str.lower)
        status = getattr(errors, name).exit_status
        parts += [f"## {name} {{#{name.lower()}}}", f"Exit status {status}."]
        if messages:
            parts.append("\n".join(f"- {message}" for message in messages))
    return "\n\n".join(parts) + "\n"


def _error_tree(tree: str) -> str:
    """The drawing in the module's docstring, as a table."""
    rows = ["| class | when |", "| :--- | :--- |"]
    for line in tree.splitlines():
        name, _, when = line.strip("│├└─ ").partition(" ")
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 4
        rows.append(f"| {'&emsp;' * depth}[`{name}`](#{name.lower()}) | {_cell(_sentence(_markdown(when)))} |")
    return "\n".join(rows)


ERROR_CLASSES = [
    name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.LocstitchError)
]


def _raised(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERROR_CLASSES:
            for argument in node.args[:1]:
                if message := _template(argument).strip():
                    yield node.func.id, _escaped(message)


def _template(node: ast.expr) -> str:
    """The text of a message, with `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(_template(part) for part in node.values))
    if isinstance(node, ast.FormattedValue):
        match node.value:
            case ast.Call(ast.Name("counted"), [_, ast.Constant(noun)]):
                return f"… {noun}s"
        return "…"
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    if isinstance(node, ast.IfExp):
        return _template(node.body) or _template(node.orelse)
    if isinstance(node, ast.List):
        return "; ".join(_template(one) for one in node.elts)
    return ""


# --- text ---------------------------------------------------------------------------------------------------------


def _markdown(text: str) -> str:
    """The words of the code, as Markdown and as a reader of YAML knows them."""
    text = text.replace("`mean` (None)", "`mean`")
    return " ".join(re.sub(r"\bNone\b", "`null`", _escaped(text)).split())


def _escaped(text: str) -> str:
    """What Markdown would read as something else, but not inside backticks."""
    parts = text.split("`")
    return "`".join(
        part if place % 2 and place < len(parts) - 1 else re.sub(r"([<>*_\[\]])", r"\\\1", part)
        for place, part in enumerate(parts)
    )


def _sentence(text: str) -> str:
    text = text.replace("%%", "%").strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".") if text else ""


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", text).replace("\n", " ")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z]+", "-", text.lower()).strip("-")
