"""Commands made from configurations: each option is a field of a frozen dataclass (see `knowledge_store.options`).

All three commands have the same habits: STORE is the first argument, `--endpoint` where it is in a bucket, `--token-file` where
it is served, `--version`, tab completion, errors of one line with exit code 2, and an option that takes one value is refused
when it is given twice.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from knowledge_store.errors import InputError, KnowledgeStoreError
from knowledge_store.options import Option, check_options, flag_of, option_of
from knowledge_store.storage import Storage, at_endpoint
from knowledge_store.storage.bucket_address import is_bucket_address
from knowledge_store.storage.served.address import TLS, is_served
from knowledge_store.storage.served.tokens import ENVIRONMENT, read_tokens
from knowledge_store.terminal.configuration_file import file_text, option_values
from knowledge_store.terminal.console import BAD_INPUT, command_errors, note, output, output_errors, show_in_any_encoding

ENDPOINT, TOKEN_FILE = "endpoint", "token_file"
_UsageError: Any = typer.BadParameter.__bases__[0]  # of the command-line library that typer brings with it


def _show_version(wanted: bool) -> None:
    if wanted:
        output.print(f"knowledge-store {version('knowledge-store')}", markup=False)
        raise typer.Exit


_VersionOption = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
]


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the first value would be lost in silence."""

    def parsed(self, ctx: Any, args: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """The values that some words stand for, and in order the parameters that they belong to."""
        try:
            values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        except _UsageError as error:
            error.ctx = error.ctx or ctx  # some are raised without
            raise
        return values, order

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing and args and args[-1].startswith("-"):
            args = args[:-1]  # a shell completes the value of this option: without one nothing would be parsed, STORE included
        _, order = self.parsed(ctx, args)
        for parameter, count in Counter(order).items():
            if count > 1 and not parameter.multiple and parameter.param_type_name == "option":
                several = ": write all that it takes in one, with commas" if (parameter.metavar or "").endswith(",...") else ""
                ctx.fail(f"{parameter.opts[0]} is given {count} times, and takes one value{several}")
        return super().parse_args(ctx, args)


class _Program(TyperGroup):
    """Commands whose usage errors are one line, as all other errors are."""

    def main(self, *args: Any, **options: Any) -> Any:
        alone = options.get("standalone_mode", True)
        options["standalone_mode"] = False
        if not alone:
            return super().main(*args, **options)
        show_in_any_encoding()
        try:
            with output_errors():
                result = super().main(*args, **options)
        except _UsageError as error:
            result = _show_usage_error(error)
        except typer.Abort:  # the input ended at a question
            note("Aborted: the question was not answered")
            result = 1
        sys.exit(result if isinstance(result, int) else 0)


def _show_usage_error(error: Any) -> int:
    """Say in one line what is wrong with the words of a command; its exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # no command was named: its message is the help
        error.show()
        return BAD_INPUT
    sentence = " ".join(error.format_message().split()).replace("Value error, ", "").rstrip(".")
    path = error.ctx.command_path if error.ctx else ""
    note(f"Error: {sentence[:1].lower()}{sentence[1:]}" + (f"; `{path} --help` lists what it takes" if path else ""))
    return BAD_INPUT


def dump_names(context: typer.Context, incomplete: str) -> list[str]:
    """The dumps of the STORE that was named, for a shell that completes a word."""
    from knowledge_store.store import KnowledgeStore

    store, endpoint = context.params.get("store") or context.params.get("source"), context.params.get(ENDPOINT)
    try:
        place = store if store is None or endpoint is None else at_endpoint(store, endpoint)
        names = [] if place is None else list(KnowledgeStore.open(place).dumps)
    except (KnowledgeStoreError, OSError):
        names = []
    return [name for name in names if name.startswith(incomplete)]


def application(help: str) -> typer.Typer:
    """An application whose commands share those habits."""
    habits: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": "markdown"}
    app = typer.Typer(help=help, cls=_Program, **habits)

    @app.callback(help=help)
    def options(version: _VersionOption = False) -> None: ...

    return app


def command(
    app: typer.Typer,
    configuration: type,
    *,
    name: str | None = None,
    cls: type[Command] = Command,
    configuration_file: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function.

    Args:
        app: the application to add it to.
        configuration: a frozen dataclass; its options become the command's, and the function gets an instance, whose values lie
            within the limits of its fields. Where it has `PANELS`, the help shows the options that these name, by the title of
            their panel, beneath those that are in none.
        name: the command's name; the function's when None.
        cls: how it reads its arguments.
        configuration_file: whether it takes its options from a file too (`configuration_file`).
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        stores = [name for name, hint in get_type_hints(configuration).items() if _as_text(hint) != hint]
        parameters = [*_parameters(configuration), *(_file_parameters(configuration) if configuration_file else ())]
        if stores:
            parameters.append(_endpoint_parameter())
        token_for_all = bool(stores) and TOKEN_FILE not in (parameter.name for parameter in parameters)
        if token_for_all:
            parameters.append(_token_parameter())

        @functools.wraps(function)
        def run(*, config: Path | None = None, print_config: bool = False, endpoint: str | None = None, **values: Any) -> None:
            with command_errors():
                if token_for_all and (token_file := values.pop(TOKEN_FILE)) is not None:
                    _take_token([values[name] for name in stores], token_file)
                if endpoint is not None:
                    values |= _at_endpoint({name: values[name] for name in stores}, endpoint)
                lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
                chosen = configuration(**{**values, **lists})
                check_options(chosen)
                if print_config:
                    output.print(file_text(chosen), markup=False, highlight=False, soft_wrap=True, end="")
                else:
                    function(chosen)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(name, cls=cls)(run)

    return decorate


def _endpoint_parameter() -> inspect.Parameter:
    """The option of every command that has a store: where the service of its bucket is."""
    declared = typer.Option(
        "--endpoint",
        metavar="URL",
        help="Of a store in a bucket (s3://, gs://, az://): the URL of the service, where it is not the provider's own."
        " AWS_ENDPOINT_URL says the same of s3://.",
    )
    annotation = Annotated[str | None, declared]
    return inspect.Parameter(ENDPOINT, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _at_endpoint(stores: dict[str, Any], endpoint: str) -> dict[str, Any]:
    """The addresses of a command's stores, with an endpoint (InputError: none of them is in a bucket)."""

    def placed(value: Any) -> Any:
        """A store, several, or none, there."""
        if isinstance(value, list | tuple):
            return [placed(store) for store in value]
        return None if value is None else at_endpoint(value, endpoint)

    found = {name: placed(value) for name, value in stores.items()}
    places = [store for value in found.values() for store in (value if isinstance(value, list) else [value])]
    if not any(isinstance(store, str) and is_bucket_address(store) for store in places):
        raise InputError("--endpoint is for stores in buckets, such as s3://bucket/store: leave it out")
    return found


def _token_parameter() -> inspect.Parameter:
    """The option of every command that has a store: where the token of a served one is."""
    declared = typer.Option(
        "--token-file",
        metavar="<path>",
        help=f"Of a store that is served ({TLS}://): file of the token. {ENVIRONMENT} in the environment has the token itself.",
    )
    annotation = Annotated[Path | None, declared]
    return inspect.Parameter(TOKEN_FILE, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _take_token(stores: list[Any], token_file: Path) -> None:
    """Put the token of a file where this process and those that it starts look for one (InputError: it is for none of the
    stores, or cannot be read)."""
    if not any(map(is_served, stores)):
        raise InputError(f"--token-file is for stores that are served, such as {TLS}://host:8815: leave it out")
    os.environ[ENVIRONMENT] = read_tokens(token_file)[0].secret


def _parameters(configuration: type) -> list[inspect.Parameter]:
    """The parameters of a command that has a configuration's options: those that are required come first."""
    hints = get_type_hints(configuration)
    titles = {name: title for title, names in getattr(configuration, "PANELS", {}).items() for name in names}
    order = [None, *dict.fromkeys(titles.values())]
    parameters = []
    for field in fields(configuration):
        declared = option_of(field)
        if declared is None:
            continue
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        annotation, default = _listed(_as_text(hints[field.name]), default)
        annotation = Annotated[annotation, _declaration(declared, flag_of(field), titles.get(field.name), default)]
        parameters.append(inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return sorted(
        parameters,
        key=lambda parameter: (
            parameter.default is not inspect.Parameter.empty,
            order.index(titles.get(parameter.name)),
        ),
    )


def _file_parameters(configuration: type) -> list[inspect.Parameter]:
    """The parameters of a command that takes its options from a file too."""

    def use(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            with command_errors():
                # The library takes from here what a command line leaves out.
                context.default_map = option_values(path, configuration)
        return path

    config = typer.Option(
        "--config",
        metavar="<path>",
        is_eager=True,
        callback=use,
        help="YAML file of options by their names. An option given here too wins; a repeated one takes the place of all of its"
        " values there.",
    )
    shown = typer.Option("--print-config", help="Print all options as such a file, and exit.")
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, default, annotation in (
            ("config", None, Annotated[Path | None, config]),
            ("print_config", False, Annotated[bool, shown]),
        )
    ]


def _declaration(declared: Option, flag: str, panel: str | None, default: Any) -> Any:
    """An option as typer has it."""
    shared: dict[str, Any] = {
        "help": declared.help,
        "rich_help_panel": panel,
        "metavar": declared.metavar or " | ".join(map(str, declared.choices)) or None,  # spaces, at which lines end
    }
    if declared.names_dump:
        shared["autocompletion"] = dump_names
    if default is True:  # a switch that is on is there to be put off
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    return typer.Argument(**shared) if declared.argument else typer.Option(flag, **shared)


def _as_text(annotation: Any) -> Any:
    """What a store, or several, is opened by, as the text that it is on a command line."""
    members = get_args(annotation)
    if get_origin(annotation) is tuple and Storage in get_args(members[0]):
        return tuple[str, ...]
    if Storage not in members:
        return annotation
    return str | None if type(None) in members else str


def _listed(annotation: Any, default: Any) -> tuple[Any, Any]:
    """A tuple of any length as the list that typer knows."""
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]], list(default) if isinstance(default, tuple) else default  # type: ignore[misc]
    return annotation, default
