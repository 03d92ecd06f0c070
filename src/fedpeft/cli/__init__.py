"""The command line: `fedpeft VERB`. Everything heavy is imported inside the verbs, so that help comes at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fedpeft.cli.check import check
from fedpeft.cli.compare import compare
from fedpeft.cli.demo import demo
from fedpeft.cli.evaluate import evaluate
from fedpeft.cli.exits import exit_codes
from fedpeft.cli.export import export
from fedpeft.cli.generate import generate
from fedpeft.cli.listing import list_things
from fedpeft.cli.plan import plan
from fedpeft.cli.predict import predict
from fedpeft.cli.profile import profile
from fedpeft.cli.report import report
from fedpeft.cli.resume import resume
from fedpeft.cli.run import run
from fedpeft.cli.serve import serve
from fedpeft.core.errors import RequestError

LATER = {  # verbs of the planned interface that this version does not have, and what they will do
    "server": "run the server of a federation of real sites",
    "client": "run one site of a federation",
    "keys": "make and list the keys by which a federation's sites are known",
    "status": "tell the live state of a federation of real sites",
}


class Verbs(TyperGroup):
    """The verbs, with fedpeft's errors turned into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; see `exits.exit_codes`."""
        with exit_codes():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb's command. Raises RequestError for one that is planned and not there yet."""
        if args[0] in LATER:
            raise RequestError(
                f"fedpeft {args[0]} will {LATER[args[0]]} and is not in this version; use fedpeft run, which runs all "
                "clients in one process"
            )
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs in the order in which they are met."""
        return list(self.commands)


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    suggest_commands=False,  # click names the nearest verbs itself, and twice is once too often
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Federated parameter-efficient fine-tuning of language models.",
    epilog="Exit codes: 0 done; 2 the request is wrong or cannot be met; 1 the run failed; 130 interrupted.",
)
for _verb in (demo, run, resume, compare, evaluate, predict, report, export, check, profile, plan, generate, serve):
    app.command(_verb.__name__)(_verb)
app.command("list")(list_things)


def _version(wanted: bool) -> None:
    if wanted:
        from fedpeft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Federated parameter-efficient fine-tuning of language models."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an orderly stop, as from the keyboard
    app(args=sys.argv[1:] if arguments is None else list(arguments), prog_name="fedpeft")
