"""powernap completion: completion of commands, options and recipes for a shell."""

import argparse
from collections.abc import Iterator

RECIPES = {  # shipped names, and files
    "bash": """_powernap_recipes() { compgen -W "%s" -- "$1"; compgen -f -- "$1"; }""",
    "zsh": """_powernap_recipes() { compadd -- %s; _files; }""",
}


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a shell's completion of commands and options",
        description="Print a script that completes commands, options and recipes in bash or zsh.",
        epilog='examples: eval "$(powernap completion bash)"; powernap completion zsh > ~/.zfunc/_powernap',
    )
    parser.add_argument("shell", choices=list(RECIPES))
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, _: list[str]) -> int:
    import shtab

    from powernap.launch.cli import command_parser
    from powernap.train.recipe_file import shipped_recipes

    parser = command_parser()
    for action in _actions(parser):
        if action.metavar == "RECIPE":
            action.complete = {shell: "_powernap_recipes" for shell in RECIPES}  # type: ignore[attr-defined]
        elif action.metavar in ("FOLDER", "FILE", "SHARDS"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    preamble = {shell: text % " ".join(shipped_recipes()) for shell, text in RECIPES.items()}
    print(shtab.complete(parser, options.shell, preamble=preamble))  # type: ignore[arg-type]  # its annotation is of one shell
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
