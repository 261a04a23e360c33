"""Commands made from configurations: each option is a field of a frozen dataclass (see `knowledge_store.options`).

All three commands have the same habits: STORE is the first argument, `--version`, tab completion, errors of one line with exit
code 2, and an option that takes one value is refused when it is given twice.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from knowledge_store.options import flag_of, option_of
from knowledge_store.terminal.console import command_errors, output

StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="The store's folder.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        output.print(f"knowledge-store {version('knowledge-store')}", markup=False)
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
]


class Command(TyperCommand):
    """A command that refuses an option given twice, of which the first value would be lost in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            if count > 1 and not parameter.multiple and parameter.param_type_name == "option":
                ctx.fail(f"{parameter.opts[0]} is given {count} times, and takes one value")
        return super().parse_args(ctx, args)


def application(help: str) -> typer.Typer:
    """An application whose commands share those habits."""
    app = typer.Typer(help=help, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

    @app.callback(help=help)
    def options(version: VersionOption = False) -> None: ...

    return app


def command(
    app: typer.Typer,
    configuration: type | None = None,
    *,
    leave_out: Collection[str] = (),
    name: str | None = None,
    cls: type[Command] = Command,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function.

    Args:
        app: the application to add it to.
        configuration: a frozen dataclass; its options become the command's, and the function's first parameter is an instance.
        leave_out: fields that this command does not offer: they keep their defaults.
        name: the command's name; the function's when None.
        cls: how it reads its arguments.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function).parameters.values())[configuration is not None :]
        hints = get_type_hints(function, include_extras=True)
        parameters = [] if configuration is None else _parameters(configuration, leave_out)
        taken = [parameter.name for parameter in parameters]
        parameters += [parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY) for parameter in own]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            with command_errors():
                if configuration is None:
                    function(**given)
                    return
                values = {each: given.pop(each) for each in taken}
                lists = {each: tuple(value) for each, value in values.items() if isinstance(value, list)}
                function(configuration(**{**values, **lists}), **given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return app.command(name, cls=cls)(run)

    return decorate


def _parameters(configuration: type, leave_out: Collection[str]) -> list[inspect.Parameter]:
    """The parameters of a command that has a configuration's options."""
    hints = get_type_hints(configuration)
    parameters = []
    for each in fields(configuration):
        found = option_of(each)
        if found is None or each.name in leave_out:
            continue
        shared: dict[str, Any] = {"help": found.help, "metavar": found.metavar}
        declared = typer.Argument(**shared) if found.argument else typer.Option(flag_of(each), **shared)
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        annotation, default = _listed(hints[each.name], default)
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(each.name, kind, default=default, annotation=Annotated[annotation, declared]))
    return parameters


def _listed(annotation: Any, default: Any) -> tuple[Any, Any]:
    """A tuple of any length as the list that typer knows."""
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]], list(default) if isinstance(default, tuple) else default  # type: ignore[misc]
    return annotation, default
