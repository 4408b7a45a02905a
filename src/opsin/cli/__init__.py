"""The command line: one file per verb, loaded when it is called."""

import sys
from importlib import import_module

from opsin.errors import OpsinError, UnknownName

VERBS = (
    "list", "show", "create", "fit", "compare", "pretrain", "compress", "adapt", "explain", "restore", "predict",
    "generate", "attack", "measure", "export", "claim", "app",
)  # fmt: skip


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code; an error of the user's is one sentence and code 2."""
    if arguments[:1] == ["--version"]:
        from opsin import __version__

        print(f"opsin {__version__}")
        return 0
    try:
        return _dispatch(arguments)
    except OpsinError as error:
        print(f"opsin: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("opsin: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    import typer

    usage_error = typer.BadParameter.__mro__[1]  # click's UsageError, wherever this version of typer keeps it

    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UnknownName("command", verb, VERBS)
    app = typer.Typer(
        help="Computer vision's ideas as interchangeable, measured parts.", add_completion=False,
        pretty_exceptions_enable=False,
    )  # fmt: skip

    @app.callback()
    def main() -> None: ...

    for name in VERBS if verb is None else (verb,):
        app.command(name)(import_module(f"opsin.cli.{name}").command)
    try:
        return app(arguments or ["--help"], standalone_mode=False, prog_name="opsin") or 0
    except usage_error as error:
        print(f"opsin: {error.format_message()}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
