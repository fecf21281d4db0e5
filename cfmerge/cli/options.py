"""The options of the commands. Those that say a part of a recipe stand in one table, by the recipe's keys."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from cfmerge.cli.messages import tell
from cfmerge.cli.runs import stages_of_run
from cfmerge.cli.texts import make_stages, values_of
from cfmerge.errors import CfmergeError
from cfmerge.recipe import Format, Recipe

WHAT, HOW, WHERE, RUN = "What is merged", "How it is merged", "Where it goes", "How it runs"  # panels of --help


def option(*names: str, help: str, metavar: str = "", panel: str = RUN, callback: Any = None) -> Any:
    """An option as `--help` shows it at 80 columns: one line, its type a short word."""
    how: dict[str, Any] = {"rich_help_panel": panel, "metavar": metavar, "help": help, "callback": callback}
    return typer.Option(*names, show_default=False, **how)


def argument(metavar: str, help: str) -> Any:
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def examples(*commands: str) -> str:
    """Commands as the end of a `--help`, a line each."""
    return "\b\n" + "\n".join(("[bold]Examples[/]", *(f"  {escape(command)}" for command in commands)))


def _compile_anew(wanted: bool) -> None:
    if wanted:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)


Parameters = Annotated[
    list[str] | None, option("--param", "-p", metavar="KEY=VALUE", panel=HOW, help="A parameter of the method; repeat.")
]
Download = Annotated[
    bool, option("--download", panel=WHAT, help="Fetch ORG/NAME[@REVISION] from the Hugging Face hub.")
]
CacheDir = Annotated[
    str | None, option("--cache-dir", metavar="PATH", panel=WHAT, help="The Hugging Face hub's cache.")
]

# The option of each key of a recipe, on every command that takes a recipe and does not leave the key out.
RECIPE: dict[str, Any] = {
    "base": Annotated[
        str | None, option("--base", metavar="PATH", panel=WHAT, help="A directory, a file of tensors, ORG/NAME.")
    ],
    "experts": Annotated[
        list[str] | None,
        option("--expert", "-e", metavar="EXPERT", panel=WHAT, help="PATH or NAME=PATH@WEIGHT; repeat for each."),
    ],
    "rename": Annotated[
        list[str] | None,
        option("--rename", metavar="RENAME", panel=WHAT, help="'REGEX => TEXT' for experts' names; repeat."),
    ],
    "components": Annotated[
        list[str] | None,
        option("--component", metavar="FOLDER", panel=WHAT, help="Of a pipeline: merge these alone; repeat."),
    ],
    "download": Download,
    "cache_dir": CacheDir,
    "layers": Annotated[
        list[str] | None,
        option("--layers", metavar="LAYERS", panel=WHAT, help="FIRST:END or PATH@FIRST:END; repeat to stack."),
    ],
    "statistics": Annotated[
        str | None,
        option("--statistics", metavar="PATH", panel=WHAT, help="Experts accumulated before, to begin from."),
    ],
    "method": Annotated[
        str | None,
        option("--method", "-m", metavar="METHOD", panel=HOW, help="A method or chain A >> B. Default: ace."),
    ],
    "parameters": Parameters,
    "align": Annotated[
        str | None,
        option("--align", metavar="METHOD", panel=HOW, help="Seeds differ: weights, spaces=FILE, ..."),
    ],
    "rules": Annotated[
        list[str] | None,
        option("--rule", "-r", metavar="RULE", panel=HOW, help="'match=GLOB, method=NAME'; repeat."),
    ],
    "heads": Annotated[
        Literal["keep-base", "drop", "export"] | None,
        option("--heads", metavar="CHOICE", panel=HOW, help="Unshared ones: keep-base, drop, export."),
    ],
    "vocabulary": Annotated[
        str | None,
        option("--vocabulary", metavar="CHOICE", panel=HOW, help="Tokens: base, union, an expert's."),
    ],
    "unmerged": Annotated[
        str | None,
        option("--unmerged", metavar="NAME", panel=HOW, help="Model of integers, buffers: NAME, PATH."),
    ],
    "allow": Annotated[
        list[str] | None,
        option("--allow", metavar="CASE", panel=HOW, help="one-expert, duplicate-experts, ..."),
    ],
    "on_nonfinite": Annotated[
        Literal["error", "skip-expert"] | None,
        option("--on-nonfinite", metavar="CHOICE", panel=HOW, help="At NaN: error (default), skip-expert."),
    ],
    "dequantize": Annotated[bool, option("--dequantize", panel=HOW, help="Read fp8 weights with scales as bfloat16.")],
    "precision": Annotated[
        Literal["auto", "float32", "float64"] | None,
        option("--precision", metavar="CHOICE", panel=HOW, help="auto (default), float32, float64."),
    ],
    "seed": Annotated[int | None, option("--seed", metavar="N", panel=HOW, help="For random methods. Default: 0.")],
    "plugins": Annotated[
        list[str] | None,
        option("--plugin", metavar="FILE", panel=HOW, help="Python code with methods; repeat."),
    ],
    "dtype": Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        option("--dtype", metavar="DTYPE", panel=WHERE, help="float32, float16, bfloat16 (else base's)."),
    ],
    "format": Annotated[
        Format | None, option("--format", metavar="NAME", panel=WHERE, help="torch, orbax, ... Default: base's.")
    ],
    "shard_size": Annotated[
        str | None, option("--shard-size", metavar="SIZE", panel=WHERE, help="Largest file. Default: 5GB.")
    ],
    "adapter_out": Annotated[
        str | None,
        option("--adapter-out", metavar="RANK", panel=WHERE, help="Write an adapter; a rank, or exact."),
    ],
    "side_files": Annotated[
        str | None, option("--side-files", metavar="PATH", panel=WHERE, help="Config, tokenizer. Default: base's.")
    ],
    "chat_template": Annotated[
        str | None, option("--chat-template", metavar="TEXT", panel=WHERE, help="auto, chatml, Jinja (else base's).")
    ],
}

# The options of a training run whose checkpoints are merged, in place of a base and experts.
OF_RUN: dict[str, Any] = {
    "run": Annotated[
        str | None, option("--run", metavar="DIR", panel=WHAT, help="A training run: merge its checkpoints.")
    ],
    "start": Annotated[
        int | None, option("--from", metavar="STEP", panel=WHAT, help="Of --run: the first step. Default: oldest.")
    ],
    "end": Annotated[
        int | None, option("--to", metavar="STEP", panel=WHAT, help="Of --run: the last step. Default: newest.")
    ],
    "last": Annotated[int | None, option("--last", metavar="K", panel=WHAT, help="Of --run: the K newest steps.")],
    "every": Annotated[
        int | None, option("--every", metavar="N", panel=WHAT, help="Of --run: each N-th step of these.")
    ],
    "decay": Annotated[
        str | None, option("--decay", metavar="SHAPE", panel=HOW, help="linear, cosine, inverse-sqrt, ema=D.")
    ],
    "weights": Annotated[
        str | None, option("--weights", metavar="C,C,..", panel=HOW, help="Of the steps, in place of --decay.")
    ],
    "extra_from": Annotated[
        int | None, option("--extra-from", metavar="STEP", panel=HOW, help="Integers, objects; default: newest.")
    ],
}


def option_of(key: str) -> str:
    """The option of a key of a recipe, such as `--on-nonfinite`; the key itself if it has none."""
    return RECIPE[key].__metadata__[0].default if key in RECIPE else key


RecipeFile = Annotated[Path | None, argument("RECIPE", "YAML, a card of cfmerge, a recipe's name.")]
Models = Annotated[list[str] | None, argument("MODELS", "A base, then its experts; or one recipe (YAML), or a card.")]
System = Annotated[str, argument("SYSTEM", "emr, tall, tsv_c or smile; or a text such as 'smile(rank=32)'.")]
StorePath = Annotated[Path, argument("STORE", "The store's directory.")]
Out = Annotated[Path | None, argument("OUT", "The output, in place of --output.")]
Output = Annotated[Path, option("--output", "-o", metavar="PATH", panel=WHERE, help="The directory to make.")]
Overwrite = Annotated[bool, option("--overwrite", panel=WHERE, help="Replace the output if it is there.")]
Fresh = Annotated[bool, option("--fresh", help="Start anew, not where a run has ended.")]
Memory = Annotated[str | None, option("--memory", metavar="SIZE", help="Such as 4GB. Default: 1/4 of free memory.")]
Devices = Annotated[str | None, option("--devices", metavar="N", help="all, N, or cpu. Default: all GPUs or TPUs.")]
Coordinator = Annotated[
    str | None, option("--coordinator", metavar="HOST", help="HOST:PORT, of process 0, for --processes.")
]
Processes = Annotated[str | None, option("--processes", metavar="N", help="How many share it; auto: as SLURM says.")]
Process = Annotated[int | None, option("--process", metavar="I", help="Which of them this is, from 0.")]
DeviceMemory = Annotated[
    str | None, option("--device-memory", metavar="SIZE", help="Plan for --devices N that are not here.")
]
NoCalibration = Annotated[bool, option("--no-calibration", help="Predict no seconds: measure nothing.")]
ModelOutput = Annotated[
    Path | None, option("--output", "-o", metavar="PATH", panel=WHERE, help="A directory, or one file.")
]
NoCompileCache = Annotated[
    bool, option("--no-compile-cache", help="Compile anew, keep nothing of it.", callback=_compile_anew)
]
Quiet = Annotated[bool, option("--quiet", "-q", help="No progress, no summary.")]
Json = Annotated[bool, option("--json", help="JSON on stdout.")]
Plugins = Annotated[list[str] | None, option("--plugin", metavar="FILE", help="Python code with methods; repeat.")]


class Command(typer.core.TyperCommand):
    """A command that shows `--help` among the options about running, in the last panel."""

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if found is not None:
            found.rich_help_panel = RUN  # type: ignore[attr-defined]
            found.metavar = ""
        return found


def takes_recipe(
    *without: str, chains: bool = False, system: bool = False, runs: bool = False, models: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command's first argument is the recipe that its file and its options make.

    The command gets an option for every key of a recipe, but for `without` and for those that it has itself. One that
    takes `chains` gets a list of stages instead. One that makes a `system` has its name, the recipe's method, as its
    first argument, in place of an option. With `runs` a training run may stand for the recipe, with `models` a base and
    its experts, as arguments; the command then has the recipe's file, if there is one, as its second argument.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[2 if models else 1 :]
        left_out = {*without, *(parameter.name for parameter in own), *(["method"] if system else [])}
        keys = [key for key in RECIPE if key in Recipe.__struct_fields__ and key not in left_out]

        @functools.wraps(command)
        def run(recipe: Any = None, **given: Any) -> None:
            named = _named(recipe) if models else {}
            recipe = named.pop("file", None) if models else recipe
            asked = {"method": given.pop("system")} if system else {}
            asked |= {key: given.pop(key) for key in keys}
            asked |= _only(named, asked)
            of_run = {key: given.pop(key) for key in OF_RUN if runs}
            stages = stages_of_run(recipe, asked, of_run) or make_stages(recipe, asked)
            if not chains and len(stages) > 1:
                raise CfmergeError(
                    f"{recipe}: {len(stages)} documents are a chain of merges, which `cfmerge merge` and `cfmerge "
                    "plan` take; split it into files"
                )
            for note in () if chains else stages[0].notes:
                tell(Console(stderr=True), "note", note, "yellow")
            command(stages if chains else stages[0].recipe, *([recipe] if models else []), **given)

        first = Models if models else RecipeFile
        file = inspect.Parameter("recipe", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=first)
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RECIPE[key]) for key in keys
        ]
        shared += [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=OF_RUN[key])
            for key in OF_RUN if runs
        ]  # fmt: skip
        named = inspect.Parameter("system", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=System)
        return _taking(run, [*([named] if system else []), file, *sorted([*own, *shared], key=_panel)])

    return decorate


def _named(arguments: list[str] | None) -> dict[str, Any]:
    """The base and the experts that the arguments name, or the recipe's file."""
    if not arguments:
        return {}
    first, *others = arguments
    return {"base": first, "experts": others} if others else {"file": Path(first)}


def _only(named: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """The models that the arguments name, unless options name some too."""
    if named and any(asked.get(key) for key in named):
        raise CfmergeError("base and experts are named twice: as arguments, or by --base and --expert")
    return named


def takes_options(*keys: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator: the command's first argument is a mapping of some keys of a recipe, which get their options."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]

        @functools.wraps(command)
        def run(*arguments: Any, **given: Any) -> None:
            command(values_of({key: given.pop(key) for key in keys}), *arguments, **given)

        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RECIPE[key]) for key in keys
        ]
        return _taking(run, sorted([*own, *shared], key=_panel))

    return decorate


def _taking(run: Any, parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """The command with these parameters, for typer."""
    run.__signature__ = inspect.Signature(parameters)
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    del run.__wrapped__
    return run  # type: ignore[no-any-return]


def _panel(parameter: inspect.Parameter) -> int:
    """The place of an option's panel in `--help`; arguments come first."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return -1 if panel is None else (WHAT, HOW, WHERE, RUN).index(panel)


def one_output(argument: Path | None, option: Path | None) -> Path:
    """The output that is named, as an argument or by the option."""
    if (argument is None) == (option is None):
        wrong = "no output is named" if option is None else "two outputs are named"
        raise typer.BadParameter(f"{wrong}: cfmerge merge RECIPE OUT, or --output OUT")
    return Path(argument or option or "")
