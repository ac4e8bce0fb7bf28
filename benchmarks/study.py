r"""How near a study comes to what the machine can do, and what the same training costs otherwise.

    python benchmarks/study.py
    python benchmarks/study.py --models fusion --members 30 --ways pytorch study --repeats 5 --json rows.jsonl
    python benchmarks/study.py --models fusion --phases --json rows.jsonl
    python benchmarks/study.py --models fusion --members 300 --peaks --json rows.jsonl
    python benchmarks/study.py --models fusion --members 30 --profile 20
    python benchmarks/study.py --tables rows.jsonl --plot docs/performance.png

Ways: ``study`` (this software), ``single`` (its engine with one member a call, one after another), ``pytorch`` (an
idiomatic loop over members) and ``vmap`` (``torch.func`` over stacked members). They and all numbers of members take
turns in one process, so that whatever else the machine does meets all of them; a ratio is that of neighbours in time.
Members of a loop never meet, so a loop's turn trains at most ``--loop_members`` of them, and a stack at most
``--stack``; times are per member and update. ``--json`` appends what was measured, so that a table can be made in
pieces; ``--tables`` joins the pieces.
"""

import argparse
import functools
import itertools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks.jobs import (
    MODELS,
    Job,
    make_job,
    operations_of,
    own_peak_gib,
    peak_gib_of,
    single_way,
    study_way,
    take_turns,
)
from mer_jax.cli import open_door
from mer_jax.models.registry import CONVOLUTIONAL
from mer_jax.parallel import available_processors
from mer_jax.study.devices import worker_devices
from mer_jax.study.engine import MATMUL_PRECISIONS
from mer_jax.study.loops import merge_loops

COUNTS = (1, 10, 30, 100, 300)
WAYS = ("study", "single", "pytorch", "vmap")
NAMES = {
    "study": "study",
    "single": "our engine, one member a call",
    "pytorch": "PyTorch loop",
    "vmap": "torch.func vmap",
}
TITLES = {
    "fusion": "Fusion, one mask a clip",
    "fusion_frame": "Fusion, one mask a frame",
    "micro_attnet": "MicroAttNet 64 x 64",
    "micro_attnet_224": "MicroAttNet 224 x 224",
    "ststnet": "STSTNet 28 x 28",
}


def _job_of(given: argparse.Namespace, name: str, members: int, way: str) -> Job:
    """What a turn of a way trains of a study of so many members."""
    most = {"study": members, "vmap": given.stack}.get(way, given.loop_members)
    return make_job(name, members, given.epochs).first(min(members, most))


def _turn_of(way: str, job: Job, precision: str) -> Callable[[], None]:
    if way in ("study", "single"):
        return {"study": study_way, "single": single_way}[way](job)
    from benchmarks import peers  # a process that only measures this software's memory never loads PyTorch

    peers.round_factors(precision)
    return {"pytorch": peers.pytorch_way, "vmap": peers.vmap_way}[way](job)


def measure(given: argparse.Namespace, name: str) -> Iterator[dict]:
    """One model with all numbers of members, in turns with one another: a row of ``--json`` for each number."""
    jobs = {(members, way): _job_of(given, name, members, way) for members in given.members for way in given.ways}
    # A loop trains the same few members, however many others the study has.
    keys = {place: (place[1], len(job.plan.members)) for place, job in jobs.items()}
    different = {keys[place]: job for place, job in jobs.items()}
    first, times = take_turns(
        {key: _turn_of(key[0], job, given.precision) for key, job in different.items()}, given.repeats
    )
    told = {}
    for (way, members), job in different.items():
        milliseconds = [each / job.member_steps * 1e3 for each in times[way, members]]
        told[way, members] = {
            "members": members,
            "ms": milliseconds,
            "first_s": first[way, members],
            "turn_s": float(np.median(times[way, members])),
        }
        print(
            f"{name}, {members} members a turn, {way}: {_spread(np.array(milliseconds), 2)} ms a member-step, "
            f"first turn {first[way, members]:.1f} s",
            flush=True,
        )
    for few, many in itertools.pairwise(sorted(members for way, members in told if way == "study")):
        growth = np.array(told["study", many]["ms"]) / np.array(told["study", few]["ms"])
        print(f"{name}, study: {many} members take {_spread(growth, 2)} times as long a member-step as {few}")
    for members in given.members:
        ways = {way: told[keys[members, way]] for way in given.ways}
        yield {"kind": "times", "model": name, "members": members, "ways": ways}


def measure_peaks(given: argparse.Namespace, name: str) -> Iterator[dict]:
    """Peak memory of each way in a process of its own, in GiB."""
    for members in given.members:
        row = {"kind": "peaks", "model": name, "members": members, "gib": {}}
        for way in given.ways:
            shared = ["--members", str(members), "--epochs", str(given.epochs), "--stack", str(given.stack)]
            shared += ["--loop_members", str(given.loop_members), "--cache", given.cache]
            shared += ["--precision", given.precision]
            row["gib"][way] = peak_gib_of(__file__, ["--models", name, "--ways", way, "--only", *shared])
            print(f"{name}, {members} members, {way}: {row['gib'][way]:.2f} GiB at the peak", flush=True)
        yield row


def measure_phases(given: argparse.Namespace, name: str) -> Iterator[dict]:
    """What each phase needs, what this machine could do it in, and what the study took."""
    from benchmarks import roofline

    machine = roofline.measure_machine(worker_devices(""))
    job = make_job(name, max(given.members), given.epochs)
    works = roofline.phase_works(job)
    spent = roofline.phase_times(job, given.repeats)
    row = {
        "kind": "phases",
        "model": name,
        "machine": {"arithmetic": machine.arithmetic, "bandwidth": machine.bandwidth, "told": machine.told},
        "phases": {
            phase: {
                "arithmetic": work.arithmetic,
                "needed": work.needed,
                "layered": work.layered,
                "floor_ms": work.floor(machine) * 1e3,
                "layered_ms": work.floor(machine, layered=True) * 1e3,
                "ms": spent[phase],
            }
            for phase, work in works.items()
        },
    }
    print(phase_table(row), flush=True)
    yield row


def measure_profile(given: argparse.Namespace, name: str) -> Iterator[dict]:
    """The compiled operations that a study spends most time in."""
    job = make_job(name, max(given.members), given.epochs)
    turn = study_way(job)
    turn()  # compiles
    operations = [
        {"operation": operation, "ms": seconds / job.member_steps * 1e3, "calls": calls / job.member_steps}
        for operation, seconds, calls in operations_of(turn)
    ]
    row = {"kind": "profile", "model": name, "members": max(given.members), "operations": operations}
    print(f"{TITLES[name]}: {len(operations)} operations, ms a member-step of all threads together")
    for each in operations[: given.profile]:
        print(f"{each['ms']:8.3f} in {each['calls']:6.2f} calls  {each['operation']}")
    yield row


def phase_table(row: Mapping) -> str:
    """A row of ``kind`` phases as Markdown."""
    machine = row["machine"]
    lines = [
        f"{TITLES[row['model']]}; {machine['arithmetic'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.1f} GB/s",
        "",
        "| phase | MFLOP | MB needed | MB layer by layer | floor, ms | layer by layer, ms | study, ms | over floor |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    total = {field: 0.0 for field in ("arithmetic", "needed", "layered", "floor_ms", "layered_ms", "ms")}
    for phase, values in row["phases"].items():
        lines.append(_phase_line(phase, values))
        total = {field: total[field] + values[field] for field in total}
    return "\n".join([*lines, _phase_line("**step**", total)])


def _phase_line(phase: str, values: Mapping) -> str:
    over = f"{values['ms'] / values['floor_ms']:.1f}" if values["floor_ms"] > 0.005 else "–"
    return (
        f"| {phase} | {values['arithmetic'] / 1e6:.1f} | {values['needed'] / 1e6:.1f} | {values['layered'] / 1e6:.1f} "
        f"| {values['floor_ms']:.2f} | {values['layered_ms']:.2f} | {values['ms']:.2f} | {over} |"
    )


def joined(rows: Sequence[Mapping], model: str) -> dict[int, dict]:
    """The pieces of one model: members to ``{"ms": {way: [...]}, "members": {way: n}, "gib": {way: x}}``.

    Times of one row are in pairs; rows with equal ways follow one another.
    """
    found: dict[int, dict] = {}
    for row in rows:
        if row["model"] != model or row["kind"] not in ("times", "peaks"):
            continue
        entry = found.setdefault(row["members"], {"pieces": [], "gib": {}})
        if row["kind"] == "times":
            entry["pieces"].append(row["ways"])
        else:
            entry["gib"].update(row["gib"])
    return dict(sorted(found.items()))


def times_of(entry: Mapping, way: str) -> np.ndarray:
    """All times of a way, ms a member-step."""
    return np.array([value for piece in entry["pieces"] if way in piece for value in piece[way]["ms"]])


def ratios_of(entry: Mapping, way: str) -> np.ndarray:
    """How many times as long as the study a way took, turn by turn of the rows that have both."""
    pairs = [
        (other, ours)
        for piece in entry["pieces"]
        if way in piece and "study" in piece
        for other, ours in zip(piece[way]["ms"], piece["study"]["ms"], strict=True)
    ]
    return np.array([other / ours for other, ours in pairs])


def time_table(rows: Sequence[Mapping], model: str) -> str:
    """Times, ratios and peaks of one model as Markdown."""
    lines = [
        "| members | study, ms | " + " | ".join(f"{NAMES[way]}, ms | ratio" for way in WAYS[1:]) + " | peak, GiB |",
        "|---:|---:|" + "---:|---:|" * 3 + "---|",
    ]
    for members, entry in joined(rows, model).items():
        cells = [str(members), _spread(times_of(entry, "study"), 2)]
        for way in WAYS[1:]:
            cells += [_spread(times_of(entry, way), 1), _spread(ratios_of(entry, way), 1)]
        cells.append(", ".join(f"{NAMES[way]} {entry['gib'][way]:.1f}" for way in WAYS if way in entry["gib"]) or "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: np.ndarray, digits: int) -> str:
    if not len(values):
        return "–"
    return f"{np.median(values):.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def draw(rows: Sequence[Mapping], path: Path) -> None:
    """Time a member-step and times as fast as the PyTorch loop against the number of members, with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [model for model in MODELS if any(times_of(e, "study").size for e in joined(rows, model).values())]
    colours = dict(zip(WAYS, ("#0072b2", "#56b4e9", "#c65100", "#9a4f86"), strict=True))
    figure, axes = pyplot.subplots(2, len(models), figsize=(1 + 3 * len(models), 6), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        entries = joined(rows, model)
        for way in WAYS:
            for axis, value in ((axes[0, column], times_of), (axes[1, column], ratios_of)):
                points = [(members, value(entry, way)) for members, entry in entries.items()]
                points = [(members, values) for members, values in points if values.size]
                if not points or (value is ratios_of and way == "study"):
                    continue
                middle = np.array([np.median(values) for _, values in points])
                spread = [
                    middle - [values.min() for _, values in points],
                    [values.max() for _, values in points] - middle,
                ]
                counts = [members for members, _ in points]
                axis.errorbar(counts, middle, spread, color=colours[way], marker="o", ms=4, capsize=2, label=NAMES[way])
        axes[0, column].set(title=TITLES[model], yscale="log")
        axes[1, column].axhline(1, color="0.6", lw=1)
        axes[1, column].set(xlabel="members", xscale="log", ylim=(0, None))
        axes[1, column].set_xticks(COUNTS, [str(count) for count in COUNTS])
        axes[1, column].minorticks_off()
        for axis in axes[:, column]:
            axis.grid(color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("ms a member-step")
    axes[1, 0].set_ylabel("time over the study's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=150)


def _machine_line() -> str:
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return (
        f"{available_processors()} processors ({cpu[1] if cpu else platform.machine()}), JAX {jax.__version__} on "
        f"{worker_devices('')[0].device_kind}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for.

    Args:
        arguments: The command line without the program's name; the process's own unless given.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    usual = [name for name in MODELS if name != "micro_attnet_224"]  # which is for accelerators
    parser.add_argument("--models", nargs="+", default=usual, choices=MODELS)
    parser.add_argument("--members", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a member in a turn (default: %(default)s)")
    parser.add_argument("--loop_members", type=int, default=5, help="most members of a loop's turn")
    parser.add_argument("--stack", type=int, default=30, help="most members of torch.func's stack")
    parser.add_argument("--phases", action="store_true", help="the machine and each phase's floor instead")
    parser.add_argument("--peaks", action="store_true", help="peak memory of each way in its own process instead")
    parser.add_argument("--profile", type=int, default=0, help="so many of the longest operations instead")
    parser.add_argument(
        "--precision",
        default="float32",
        choices=list(MATMUL_PRECISIONS),
        help="what factors of matrix products are rounded to on a GPU, ours and PyTorch's (default: %(default)s)",
    )
    parser.add_argument("--cache", default="", help="folder that keeps compiled programs between runs")
    parser.add_argument("--json", type=Path, help="append what was measured to this file")
    parser.add_argument("--tables", type=Path, help="measure nothing; print the tables of such a file")
    parser.add_argument("--plot", type=Path, help="with --tables, also draw them")
    parser.add_argument("--only", action="store_true", help="train the first way once and print the peak as JSON")
    given = parser.parse_args(arguments)
    if given.tables:
        rows = [json.loads(line) for line in given.tables.read_text().splitlines()]
        for model in filter(functools.partial(joined, rows), MODELS):
            print(f"\n{TITLES[model]}\n\n{time_table(rows, model)}")
        print("\n" + "\n\n".join(phase_table(row) for row in rows if row["kind"] == "phases"))
        if given.plot:
            draw(rows, given.plot)
        return
    if len(given.models) > 1:  # a study trains one model a process, too, and chooses XLA's options for it
        for name in given.models:
            subprocess.run([sys.executable, __file__, *(arguments or sys.argv[1:]), "--models", name], check=True)
        return
    jax.config.update("jax_default_matmul_precision", MATMUL_PRECISIONS[given.precision])
    if given.models[0] not in CONVOLUTIONAL:
        merge_loops()
    if given.cache:
        jax.config.update("jax_compilation_cache_dir", given.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if given.only:
        _turn_of(given.ways[0], _job_of(given, given.models[0], given.members[0], given.ways[0]), given.precision)()
        print(json.dumps({"peak_gib": own_peak_gib()}))
        return
    print(_machine_line())
    asked = ((given.phases, measure_phases), (given.peaks, measure_peaks), (given.profile, measure_profile))
    measurement = next((function for wanted, function in asked if wanted), measure)
    for row in measurement(given, given.models[0]):
        if given.json:
            with given.json.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    open_door(main)
