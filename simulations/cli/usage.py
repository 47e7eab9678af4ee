"""A command line that cannot be read, in one line that says what to type instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click
from click.exceptions import MissingParameter, NoArgsIsHelpError, NoSuchOption
from click.shell_completion import shell_complete

from fedkd.io.text import nearest

COMPLETE = "_FEDKD_COMPLETE"


def run_app(command: click.Command, words: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    Raises:
        click.UsageError: the words cannot be read; `explain` says why.
    """
    if wanted := os.environ.get(COMPLETE):  # the shell asks what may follow
        return shell_complete(command, {}, "fedkd", COMPLETE, wanted)
    try:
        with command.make_context("fedkd", list(words)) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.Abort:  # Ctrl-C, or no more input, at a question
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def explain(error: click.ClickException, words: Sequence[str]) -> str:
    """The line for a command line that cannot be read."""
    context = getattr(error, "ctx", None)
    text = _problem(error, context, list(words))
    text = text.rstrip(".")
    if text[1:2].islower():  # not where a sentence starts with an argument's name
        text = text[0].lower() + text[1:]
    return f"{text} (see {context.command_path} --help)" if context is not None else text


def _problem(error: click.ClickException, context: click.Context | None, words: list[str]) -> str:
    command = None if context is None else context.command
    if isinstance(error, NoSuchOption):
        return _no_option(error, command, words)
    if isinstance(error, MissingParameter):
        return _missing(error)
    if isinstance(command, click.Group) and (name := _unknown_command(error)):
        known = sorted(command.commands)
        return f"there is no command {name!r}{nearest(name, known)} (commands: {', '.join(known)})"
    return " ".join(error.format_message().split())


def _no_option(error: NoSuchOption, command: click.Command | None, words: list[str]) -> str:
    name = error.option_name
    options = [] if command is None else [o for p in command.params for o in p.opts if o[0] == "-"]
    takes_overrides = command is not None and any(p.name == "overrides" for p in command.params)
    hint = nearest(name, options)
    key = name.lstrip("-").replace("-", "_")
    # Options are few and keys are many: a word that is close to no option, or is a key, is a key.
    if takes_overrides and (not hint or key.split(".")[0] in _KEYS):
        hint = f"; keys of the config are written without dashes: {key}={_value(name, words)}"
    return f"there is no option {name}{hint}" + (
        "" if hint else f" (options: {', '.join(options)})"
    )


# Keys of the configs, of all commands, that are not close to an option's name by accident.
_KEYS = {"rounds", "seed", "seeds", "clients", "output", "epsilon", "epsilons", "only", "name"}


def _value(name: str, words: list[str]) -> str:
    for number, word in enumerate(words):
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
        if word == name and number + 1 < len(words):
            return words[number + 1]
    return "VALUE"


def _missing(error: MissingParameter) -> str:
    parameter = error.param
    if parameter is None:
        return error.format_message()
    name = parameter.opts[0] if parameter.opts[0][0] == "-" else (parameter.name or "").upper()
    about = getattr(parameter, "help", None)
    return f"{name} is missing" + (f": {about}" if about else "")


def _unknown_command(error: click.ClickException) -> str | None:
    """The word that is no command; click says so in words only."""
    parts = error.message.split("'")
    return parts[1] if error.message.startswith("No such command") and len(parts) > 2 else None
