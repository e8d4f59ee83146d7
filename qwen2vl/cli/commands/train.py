"""`qwen2vl train RECIPE [key=value ...]`: train with a recipe; resumes an interrupted run.

The same command again resumes from the last checkpoint. What is about to be trained is printed at
once (`qwen2vl.cli.training_summary`), then one line a report, and at the end where the results are;
the complete metrics are in metrics.jsonl of the run's folder. See `qwen2vl.train.loop`.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qwen2vl.cli import terminal
from qwen2vl.cli.progress import Heartbeat, ProgressFormatter
from qwen2vl.errors import ConfigError

if TYPE_CHECKING:
    from qwen2vl.data.lengths import ProgressCallback
    from qwen2vl.processor.processor import Processor
    from qwen2vl.train.config import TrainConfig
    from qwen2vl.train.loader.data_summary import DataSummary

__all__ = ["RunPrinter", "train"]


class _TrainCommand(click.Command):
    """Answers fields that are written as options, as other trainers have them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            ConfigError: an option is no option but a field, with or without another name here.
        """
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if not error.possibilities:
                _refuse_field_option(error.option_name, given)
            raise


def _refuse_field_option(option: str, args: Sequence[str]) -> None:
    """Raise the error of KEY=VALUE for `--KEY=VALUE` or `--KEY VALUE`; return for other options."""
    from qwen2vl.recipes import load_recipe
    from qwen2vl.train.config import override

    items = [arg for arg in args if arg.partition("=")[0] == option]
    recipe = next((arg for arg in args if not arg.startswith("-")), "")
    if not (option.startswith("--") and items and recipe):
        return
    key, value = option.removeprefix("--"), items[0].partition("=")[2]
    following = args[args.index(items[0]) + 1 :]
    if not value and following and not following[0].startswith("-"):
        value = following[0]
    if not value:
        return
    override(load_recipe(recipe), [f"{key}={value}"] if key != "epochs" else [])
    raise ConfigError(f"{option}: fields are given without dashes; write {key}={value}")


@click.command(cls=_TrainCommand)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--dry-run", is_flag=True, help="Validate configuration and data, and report what would run."
)
@terminal.debug_option
def train(recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train with RECIPE, a name or the path of a Python file.

    Names: full_finetune, lora, nano, qlora, stage1_vision, stage2_joint, stage3_instruct, tiny.

    Distributed training (FSDP): torchrun --nproc-per-node 8 -m qwen2vl train RECIPE. SIGTERM and
    Ctrl-C save a checkpoint before the run ends; before the first step they end it at once. The
    same command resumes from the last checkpoint.

    KEY=VALUE overrides fields of the configuration: optim.lr=1e-3, stages.0.steps=500,
    max_minutes=40, output_dir=FOLDER. Short keys: model=FOLDER (or a repo id, or nano), data=FILE
    (or FILE,FILE, or easy-vqa or fashion-mnist, training sets of fetch-data), epochs=3 (sets the
    steps by the size of the data), validation=0.05 (a share of the data, a number of its
    conversations, or a file of others).
    """
    # Imported here, so that usage errors do not wait for the import of torch.
    with terminal.spinner("starting"):
        from qwen2vl import recipes
        from qwen2vl.cli.evaluations import build_evaluation
        from qwen2vl.parallel.mesh import is_main_process
        from qwen2vl.train.config import override
        from qwen2vl.train.dry_run.preconditions import check_preconditions
        from qwen2vl.train.loop import train as run

    _check_given_once(overrides)
    epochs, fields = _split_epochs(overrides)
    unchanged = recipes.load_recipe(recipe)
    config = override(unchanged, fields)
    if epochs is not None:
        check_preconditions(config, unchanged)  # before the data are measured
        steps = _steps_of_epochs(config, epochs, fields)
        # All overrides again: what `validation=` sets follows from the number of steps.
        config = override(unchanged, [*fields, *steps])
    if dry_run:
        from qwen2vl.cli.dry_run import dry_run as print_dry_run

        print_dry_run(config, unchanged)
        return
    with RunPrinter(config) as printer:
        if is_main_process():  # of the processes that torchrun started
            printer.print_begin(unchanged)
        folder = run(
            config,
            report=printer.report,
            evaluate=build_evaluation(config),
            progress=printer.show_progress,
            on_data=printer.print_data,
        )
    if is_main_process():
        printer.print_end(folder)


def _check_given_once(overrides: Sequence[str]) -> None:
    """Refuse two values of a key that names files: only the last would be read.

    Of other keys the last one counts, so that scripts can override their own defaults.

    Raises:
        ConfigError: data or validation is given twice.
    """
    values: dict[str, str] = {}
    for item in overrides:
        key, _, value = item.partition("=")
        name = key.rpartition(".")[2]
        if key in values and name in ("data", "validation"):
            remedy = f"write several files as {key}={values[key]},{value}"
            if name == "validation":
                remedy = "give it once"
            raise ConfigError(f"{key} is given twice, as {values[key]} and {value}; {remedy}")
        values[key] = value


def _split_epochs(overrides: Sequence[str]) -> tuple[float | None, list[str]]:
    """Split off `epochs=N`, which is no field: it depends on the data.

    Raises:
        ConfigError: it is no number.
    """
    values = [item.partition("=")[2] for item in overrides if item.startswith("epochs=")]
    fields = [item for item in overrides if not item.startswith("epochs=")]
    if not values:
        return None, fields
    try:
        return float(values[-1]), fields
    except ValueError as error:
        raise ConfigError(f"epochs={values[-1]}: is not a number; write epochs=3") from error


def _steps_of_epochs(config: TrainConfig, epochs: float, fields: Sequence[str]) -> list[str]:
    """Return overrides that set the steps of each stage so that it reads its data `epochs` times.

    Raises:
        ConfigError: the steps of one of them are given, too; or as `set_epochs`.
    """
    from qwen2vl.parallel.mesh import is_main_process
    from qwen2vl.train.epochs import set_epochs

    for i, stage in enumerate(config.stages):
        given = [item for item in fields if item.startswith(f"stages.{i}.steps=")]
        if given and stage.data is not None and stage.steps:
            raise ConfigError(f"epochs={epochs:g} and {given[-1]} both set the steps; give one")
    if is_main_process():
        with terminal.progress_bar() as progress:
            config = set_epochs(config, epochs, progress=progress)
    else:
        config = set_epochs(config, epochs)
    return [f"stages.{i}.steps={stage.steps}" for i, stage in enumerate(config.stages)]


class RunPrinter:
    """Prints a run on rank 0, from what is about to be trained to where the results are."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.step = 0  # of the last report
        self._processor: Processor | None = None
        self._is_finished = False  # before it began
        self._start = time.monotonic()
        self._heartbeat = Heartbeat()
        # Only while samples are measured: the bar has a thread and redraws the last line.
        self._progress_bar = ExitStack()
        self._progress: ProgressCallback | None = None
        self._format_line = ProgressFormatter()

    def __enter__(self) -> RunPrinter:
        self._heartbeat.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._heartbeat.stop()
        self._progress_bar.close()

    def print_begin(self, recipe: TrainConfig) -> None:
        """Print what is about to be trained, before any weight is read.

        Args:
            recipe: the config before any override.
        """
        from qwen2vl.cli.training_summary import print_resume, print_run
        from qwen2vl.train.checkpoint import read_resume_step
        from qwen2vl.train.dry_run.preconditions import check_preconditions
        from qwen2vl.train.dry_run.report import check_config
        from qwen2vl.train.init import build_processor

        config = self.config
        step = read_resume_step(config)
        self._is_finished = step >= config.steps
        self._processor = build_processor(config)
        parameters = check_config(config, self._processor)
        check_preconditions(config, recipe)
        print_run(config, parameters)
        print_resume(config, step)
        self._format_line = ProgressFormatter(step)
        self._heartbeat.activity = "loading the model"

    def show_progress(self, what: str, done: int, total: int) -> None:
        """Show how many samples are measured: as a bar on a terminal, else in the heartbeat."""
        if not sys.stderr.isatty():
            self._heartbeat.activity = f"{what}, {done:,} of {total:,} samples"
            return
        if self._progress is None:
            self._progress = self._progress_bar.enter_context(terminal.progress_bar())
        self._progress(what, done, total)
        self._heartbeat.activity = ""

    def print_data(self, summaries: Sequence[DataSummary]) -> None:
        """Print what the stages read and are evaluated on, before the first step."""
        from qwen2vl.cli.training_summary import print_data, print_evaluation

        self._progress_bar.close()
        for summary in summaries:
            print_data(self.config, summary)
        if self._processor is not None and not self._is_finished:
            print_evaluation(self.config, self._processor)
        self._heartbeat.activity = "in the first steps"

    def report(self, metrics: dict[str, Any]) -> None:
        """Print one line of metrics."""
        self._heartbeat.stop()
        self.step = metrics["step"]
        terminal.echo(self._format_line(metrics, time.monotonic() - self._start))

    def print_end(self, folder: Path) -> None:
        """Print where the results are, and the command that uses them."""
        config = self.config
        if 0 < self.step < config.steps:
            terminal.echo(
                f"stopped at step {self.step} of {config.steps}; the same command resumes"
            )
        model = f"--model {shlex.quote(str(folder))}"
        if config.adapter is not None:
            adapter = folder.parent / folder.name.replace("model", "adapter", 1)
            model = f"--model {shlex.quote(config.init)} --adapter {shlex.quote(str(adapter))}"
            terminal.echo(f"adapter: {adapter}")
        terminal.echo(f"model: {folder}")
        terminal.echo(f"try:   qwen2vl ask {model} --image IMAGE QUESTION")
