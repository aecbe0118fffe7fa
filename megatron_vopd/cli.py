"""The `vopd` command. A mistake of the user ends in one line per problem and exit status 2.

Each command imports what it needs when it runs: `vopd doctor` must work where a package is broken.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vopd import __version__
from megatron_vopd.errors import MISTAKE, OK, ConfigError, Problem, UserError, shown
from megatron_vopd.preflight.doctor.examine import add_doctor
from megatron_vopd.run.tool_options import positive_number, whole_number

if TYPE_CHECKING:
    from megatron_vopd.config.schema import Config

_SETTINGS = "settings are section.key=value"

_CHECK_HELP = """\
Check a configuration without starting anything and without a GPU: every setting, the conditions
between settings, the parallel layouts, the model folders (shape, context, tokenizer,
end-of-sequence ids), and the problems of the evaluation. Models and data given as hub ids are not
downloaded, only listed.

Prints the resolved configuration, the place of every rank in both layouts, what memory a rank will
need, part by part, and each problem on one line of standard error: `key: what was got, what is
expected; what to do`.
Exit status: 0 nothing wrong, 2 problems."""

_CHECK_EXAMPLES = """\
examples:
  vopd check examples/math_qwen3_1.7b/config.yaml
  vopd check config.yaml --world-size 8
  vopd check config.yaml objective.baseline=topk objective.topk=100
  vopd check config.yaml 'objective.prefix={student: 0.5, dataset: 0.5}' data.responses=./r.jsonl"""


_EXIT_HELP = """\
Read status.json of the run and exit with 0 (done), 75 (stopped and saved: start it again),
93 (do not start it again) or 1 (crashed, killed, or did not begin). Takes the configuration and
the settings that were given to the training command, and ignores that command's options."""

_SERVERS_HELP = """\
Print the command that starts each vLLM server of a run with rollout.engine=server: those of
rollout.urls at one host, one command on a line. Model, type, context length, tensor parallelism,
ports and GPUs are those of the configuration, so that servers and run cannot differ. The commands
are for a shell; examples/servers/start.sh runs them. parallel.device=cpu gives servers without a
GPU, any other value servers on GPUs.
Exit status: 0, or 2 for a mistake."""

_DEMO_HELP = """\
From nothing to a distilled student in one command, on real parts and two cores without a GPU: makes
worked-out additions, trains a small Qwen3 on them as the teacher, gives a smaller student a short
start, and distils it on its own samples (four ranks, student tp 2 x pp 2, teacher tp 2 x dp 2,
vLLM, a push of the weights after every step). The student is exported and answers once more in a
vLLM that is started afresh on the export.

Every part is the training command with a file of examples/arithmetic. Started again, the demo
resumes where it was.
Exit status: 0 every bar was met, 1 one was not or a run failed, 2 a mistake, 130 interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: words after `vopd`; None: those of this process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser, commands = _parsers()
    if given and given[0] in commands:
        options, unknown = commands[given[0]].parse_known_intermixed_args(given[1:])
        if unknown:
            commands[given[0]].error(f"unknown argument {shown(unknown[0])}; {options.takes}")
        return options.run(options)
    parser.parse_args(given)
    parser.print_help(sys.stderr)
    return MISTAKE


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser of the command, and those of its subcommands by name.

    Each subcommand sets `run`, which takes its options and returns the exit status, and `takes`,
    the text that follows an unknown argument in its error message.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="vopd",
        description="On-policy distillation on megatron-core and vLLM.",
        epilog="examples:\n  vopd check CONFIG      is this configuration sound?\n"
        "  vopd check --help      more about it\n"
        "  vopd report RUN_DIR    curves of a run, as report.html\n"
        "  vopd exit-code CONFIG  how the run ended, for launch scripts\n"
        "  vopd server-commands CONFIG  how to start the vLLM servers of a run\n"
        "  vopd doctor            does the installation work, and how to mend it\n"
        "  vopd demo              see it all work, in about ten minutes",
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"vopd {__version__}")
    commands = parser.add_subparsers(metavar="command")
    _add_check(commands)
    reporting = commands.add_parser(
        "report",
        help="write report.html of a run: curves of its metrics",
        description="Write RUN_DIR/report.html from RUN_DIR/metrics.jsonl: curves of accuracy, KL, "
        "entropy, variance ratio, lengths, gradient norm and times in one file that needs no "
        "network. Works while the run is in progress.",
    )
    reporting.set_defaults(
        run=lambda given: report(given.run_dir), takes="vopd report takes one RUN_DIR"
    )
    reporting.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    _add_exit_code(commands)
    _add_servers(commands)
    add_doctor(commands)
    _add_demo(commands)
    table = commands.add_parser(
        "config-table",
        help="print all settings with values, defaults and meaning (Markdown)",
        description="Print all settings as a Markdown table: values, defaults and meaning.",
    )
    table.set_defaults(run=lambda _: config_table(), takes="vopd config-table takes none")
    return parser, commands.choices


def _add_exit_code(commands: Any) -> None:
    ending = commands.add_parser(
        "exit-code",
        help="how a run ended, as an exit status, for launch scripts",
        description=_EXIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ending.set_defaults(
        run=lambda given: end_of_run(given.config, given.overrides, given.clear), takes=_SETTINGS
    )
    _take_config(ending, "as given to the training command")
    ending.add_argument(
        "--clear", action="store_true", help="before a start: forget how the last one ended"
    )
    # An option of the training command, which gets the same arguments.
    ending.add_argument("--dry-run", action="store_true", help=argparse.SUPPRESS)


def _take_config(parser: argparse.ArgumentParser, meaning: str) -> None:
    parser.add_argument("config", metavar="CONFIG", help=meaning)
    what = "settings that replace the file's"
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=what)


def _add_servers(commands: Any) -> None:
    serving = commands.add_parser(
        "server-commands",
        help="print the commands that start a run's vLLM servers",
        description=_SERVERS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serving.set_defaults(
        run=lambda given: commands_of_servers(given.config, given.overrides, given.host),
        takes=_SETTINGS,
    )
    _take_config(serving, "as given to the training command")
    serving.add_argument(
        "--host", default="127.0.0.1", help="servers of which host (default: %(default)s)"
    )


def _add_check(commands: Any) -> None:
    checking = commands.add_parser(
        "check",
        help="check a configuration and show where every rank goes",
        description=_CHECK_HELP,
        epilog=_CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checking.set_defaults(
        run=lambda given: check(given.config, given.overrides, given.world_size, given.gpu_memory),
        takes=_SETTINGS,
    )
    _take_config(checking, "YAML file; see examples/")
    checking.add_argument(
        "--world-size",
        type=whole_number(),
        metavar="N",
        help="number of ranks (default: $WORLD_SIZE, else the fewest that the layouts need)",
    )
    checking.add_argument(
        "--gpu-memory",
        type=positive_number,
        default=80.0,
        metavar="GB",
        help="memory of one GPU in 10^9 bytes (default 80)",
    )


def _add_demo(commands: Any) -> None:
    trying = commands.add_parser(
        "demo",
        help="train, distil and check small models from nothing, in one command",
        description=_DEMO_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    trying.set_defaults(run=demo, takes="vopd demo takes options only (--help)")
    add = trying.add_argument
    add("--out", metavar="DIR", default="runs/demo", help="folder (default: %(default)s)")
    seed = whole_number(0, 2**32 - 1)
    add(
        "--seed", type=seed, default=0, metavar="N", help="of data, models and samples (default: 0)"
    )
    add("--compare", action="store_true", help="distil without the baseline (OPD) too")
    some = whole_number(1)
    add("--digits", type=some, default=3, metavar="N", help="of the numbers added (default: 3)")
    add("--teacher-steps", type=some, metavar="N", help="of the teacher (default: as configured)")
    add("--steps", type=some, metavar="N", help="of each distillation (default: as configured)")
    add("--models-only", action="store_true", help="end with teacher and start; distil nothing")
    add("--fresh", action="store_true", help="remove what an earlier demo left in the folder")


def demo(options: argparse.Namespace) -> int:
    """Run the demo and return the exit status; SIGTERM and SIGHUP interrupt it as Ctrl-C does."""
    from megatron_vopd.demo.demo import DemoSettings, run_demo
    from megatron_vopd.run.launch import interrupt_on_signals

    interrupt_on_signals()
    settings = DemoSettings(
        Path(options.out),
        seed=options.seed,
        digits=options.digits,
        teacher_steps=options.teacher_steps,
        steps=options.steps,
        compare=options.compare,
        models_only=options.models_only,
    )
    return run_demo(settings, options.fresh)


def config_table() -> int:
    """Print all settings as a Markdown table; returns the exit status."""
    from megatron_vopd.config.table import config_table_markdown

    print(config_table_markdown(), end="")
    return OK


def check(path: str, overrides: list[str], world_size: int | None, gpu_memory: float = 80.0) -> int:
    """Print what a configuration resolves to and every problem; return the exit status.

    Args:
        path: YAML file.
        overrides: `section.key=value` each.
        world_size: number of ranks; None: $WORLD_SIZE, else the fewest that the layouts need.
        gpu_memory: memory of one GPU, 10^9 bytes.
    """
    from rich.text import Text

    from megatron_vopd.config import load_config
    from megatron_vopd.data.prompts import evaluation_problems, training_problems
    from megatron_vopd.preflight.checks import preflight
    from megatron_vopd.preflight.servers import server_line
    from megatron_vopd.preflight.show import plain_console, print_config, print_memory, print_ranks

    console = plain_console()
    try:
        config = load_config(path, overrides)
        num_ranks, reason = _world_size(config, world_size)
    except ConfigError as error:
        return _report(error.problems)
    print_config(console, config)
    findings = preflight(config, num_ranks)
    if config.evaluates:
        findings.problems += evaluation_problems(config.data)
    if config.has_rollouts:
        needs_answer, teachers = config.objective.task_reward_weight > 0, list(config.teachers)
        keys = [f"teachers.{name}" for name in teachers]
        findings.problems += training_problems(config.data, keys, needs_answer)
    if findings.cuts:
        print_ranks(console, findings.cuts, num_ranks, reason)
    if not findings.problems and findings.cuts.keys() == findings.facts.keys():
        print_memory(console, config, findings, gpu_memory)
    for notice in findings.notices:
        console.print(Text(f"note: {notice}"), soft_wrap=True)
    if config.has_engines and config.rollout.engine == "server":
        line = server_line(config.rollout, config.max_engine_tokens)
        console.print(Text(line), soft_wrap=True)
    if findings.problems:
        return _report(findings.problems)
    console.print(Text("no problems found", style="green"))
    return OK


def commands_of_servers(path: str, overrides: list[str], host: str) -> int:
    """Print the commands that start the servers of a run at `host`; return the exit status.

    Args:
        path: YAML file.
        overrides: `section.key=value` each.
        host: host of URLs in `rollout.urls`, at which the servers will listen.
    """
    from megatron_vopd.config import load_config
    from megatron_vopd.preflight.servers import server_commands

    try:
        config = load_config(path, overrides)
        on_gpu, visible = config.parallel.device != "cpu", os.environ.get("CUDA_VISIBLE_DEVICES")
        known = (config.max_engine_tokens, on_gpu, host, visible)
        print("\n".join(server_commands(config.rollout, config.student.path, *known)))
    except ConfigError as error:
        return _report(error.problems)
    return OK


def end_of_run(path: str, overrides: list[str], is_clearing: bool) -> int:
    """Return the exit status for a launch script, and print why on standard error.

    Args:
        path: YAML file.
        overrides: `section.key=value` each.
        is_clearing: remove the status of an earlier start instead; OK if that worked.
    """
    from megatron_vopd.run.status import FINAL, clear, exit_code, run_dir_of

    try:
        run_dir = run_dir_of(path, overrides)
        if is_clearing:
            clear(run_dir)
            return OK
    except UserError as error:
        print(error, file=sys.stderr)
        return FINAL
    code, line = exit_code(run_dir)
    print(line, file=sys.stderr)
    return code


def report(run_dir: str) -> int:
    """Write the report of a run, print its path and return the exit status."""
    from megatron_vopd.run.report import described, write_report

    try:
        path, recorded = write_report(Path(run_dir))
    except UserError as error:
        print(error, file=sys.stderr)
        return MISTAKE
    if recorded.is_torn:
        print(f"{run_dir}: the last metrics line is torn and left out", file=sys.stderr)
    print(f"{path}: {described(recorded)}")
    return OK


def _report(problems: Sequence[Problem]) -> int:
    """Print one line per problem and their number on standard error; return MISTAKE."""
    sys.stdout.flush()
    for problem in problems:
        print(problem, file=sys.stderr)
    count = len(problems)
    print(f"{count} problem{'s' if count > 1 else ''} found", file=sys.stderr)
    return MISTAKE


def _world_size(config: Config, given: int | None) -> tuple[int, str]:
    """Return the number of ranks and where it comes from; raises ConfigError."""
    from megatron_vopd.config.world import smallest_world

    if given is not None:
        return given, "--world-size"
    text = os.environ.get("WORLD_SIZE", "").strip()
    if not text:
        return smallest_world(config), "the fewest that the layouts need"
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        remedy = "set it to the number of ranks, unset it, or give --world-size"
        raise ConfigError([Problem("WORLD_SIZE", shown(text), "an integer >= 1", remedy)])
    return int(text), "WORLD_SIZE"


if __name__ == "__main__":
    sys.exit(main())
