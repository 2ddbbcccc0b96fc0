"""Run, derive and publish the notebooks; where a chapter finds what the one before it left."""

import ast
import copy
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from . import bench, dry_run, files, memory
from .errors import InputError
from .evaluation import Results
from .hidden_states import HiddenStates
from .metrics import Interval
from .profiles import Profile, get_profile

BEGIN, END = "# solution", "# end"
WIDGET = "application/vnd.jupyter.widget-view+json"
STUB = 'raise NotImplementedError("your turn")'


# Where the kernel can encrypt its connection, let it: otherwise it warns about each start.
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})


class ChapterFailedError(Exception):
    """A notebook's cell raised; the message holds the chapter, the cell and the traceback."""


@dataclass(frozen=True)
class Course:
    """One run of the course: its profile and where its files are."""

    profile: Profile
    seed: int
    base_model: str
    pairs: Path
    run_dir: Path

    def read_results(self, name: str) -> Results:
        """The results that an earlier chapter saved under this name."""
        return Results.load(self.run_dir / "results" / name)

    def hidden_states(self) -> HiddenStates:
        """What the layers that the profile freezes made of texts in this run, as far as a chapter saved it."""
        return HiddenStates(self.profile.frozen_layers, file=self.run_dir / "hidden_states.safetensors")

    def figure(self, name: str) -> Path:
        """Where a figure of this run belongs, without its ending."""
        return self.run_dir / "figures" / name

    def record(self, chapter: str, values: Mapping[str, Any]) -> None:
        """Write what a chapter measured to `results/chapter_NN.json`: proof that it ran, and what tests look at."""
        path = self.run_dir / "results" / f"chapter_{chapter}.json"
        files.write_json(path, dict(values))


def find_root(start: Path | None = None) -> Path:
    """The project's folder: the nearest one at or above `start` that holds `data/passages.jsonl`.

    Raises:
        InputError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "data" / "passages.jsonl").is_file():
            return folder
    raise InputError(f"no data/passages.jsonl at or above {start}: start in a clone of the project")


def open_course(profile: str, seed: int, pairs: str = "", base_model: str = "", run_dir: str = "") -> Course:
    """What a notebook's parameters mean; an empty one takes the profile's default.

    Args:
        profile: name of a profile.
        seed: for training.
        pairs: folder with `passages.jsonl` and `questions.jsonl`, or a file of pairs; default `data`.
        base_model: a hub id or folder; default the profile's.
        run_dir: where this run's products go; default `runs/<profile>`.

    Raises:
        InputError: an unknown profile, or no project around.
    """
    chosen = get_profile(profile)
    root = find_root()
    return Course(
        chosen,
        seed,
        base_model or chosen.base_model,
        root / (pairs or "data"),
        root / (run_dir or f"runs/{profile}"),
    )


def chapters(folder: Path) -> list[Path]:
    """The notebooks of a folder in course order."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def select(notebooks: Iterable[Path], only: str | None = None, start: str | None = None) -> list[Path]:
    """The chapter numbered `only`, or those from number `start` on, or all.

    Raises:
        InputError: there is no such chapter.
    """
    notebooks = list(notebooks)
    numbers = [path.name[:2] for path in notebooks]
    for number in (only, start):
        if number is not None and number not in numbers:
            raise InputError(f"there is no chapter {number!r}: choose one of {', '.join(numbers)}")
    if only is not None:
        return [path for path, number in zip(notebooks, numbers, strict=True) if number == only]
    return [path for path, number in zip(notebooks, numbers, strict=True) if start is None or number >= start]


def check_parameters(notebook: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """The given parameters in the types of the notebook's defaults.

    Raises:
        InputError: the notebook has no such parameter, or the value has another type.
    """
    known = {name: ast.literal_eval(entry["default"]) for name, entry in papermill.inspect_notebook(notebook).items()}
    checked = {}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{notebook.name} has no parameter {name!r}: choose one of {', '.join(known)}")
        try:
            checked[name] = type(known[name])(value)
        except ValueError:
            raise InputError(f"parameter {name}={value!r}: {type(known[name]).__name__} wanted") from None
    return checked


def run(
    notebooks: Iterable[Path], output: Path, parameters: Mapping[str, str], tell: Callable[[str], None] = print
) -> dict[str, float]:
    """Execute notebooks in order with papermill; executed copies and HTML go to `output`.

    Args:
        notebooks: what to run.
        output: folder for the executed copies.
        parameters: passed to each; names and types are checked first.
        tell: called with a line per chapter.

    Returns:
        seconds by notebook name.

    Raises:
        InputError: an unknown parameter.
        ChapterFailedError: a cell raised.
    """
    notebooks = list(notebooks)
    checked = {path: check_parameters(path, parameters) for path in notebooks}
    output.mkdir(parents=True, exist_ok=True)
    # Bars would be stored as a heap of control characters. Only the kernels see this: tqdm has read it here already.
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    seconds = {}
    for number, path in enumerate(notebooks, start=1):
        start = time.perf_counter()
        bar = {"desc": f"{number}/{len(notebooks)} {path.stem}", "unit": "cell"}
        try:
            papermill.execute_notebook(
                path,
                output / path.name,
                checked[path],
                cwd=path.parent,
                kernel_name="python3",
                progress_bar=bar,
                config=ENCRYPTED,
            )
        except PapermillExecutionError as error:
            raise ChapterFailedError(_failure(path, error, output / path.name)) from None
        finally:
            if (output / path.name).is_file():
                _finish(output / path.name)
        seconds[path.stem] = time.perf_counter() - start
        tell(f"{path.stem}: {seconds[path.stem]:.0f} s")
    return seconds


def summary(results_file: Path) -> str:
    """The course's result as a table: dimension x {untuned, fine-tuned} ndcg@10 with 95 % intervals.

    Args:
        results_file: the `results.json` that chapter 05 wrote.

    Raises:
        InputError: the file is missing.
    """
    if not results_file.is_file():
        raise InputError(f"{results_file} is missing: run the chapters up to 05 first")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    untuned, tuned = results["untuned"], results["fine_tuned"]
    lines = [f"ndcg@10 on {tuned['queries']} test questions, {tuned['passages']} passages, 95 % intervals"]
    lines.append(f"{'dim':>5}  {'untuned':<22} {'fine-tuned':<22} difference (paired)")
    for dim, difference in results["difference_ndcg@10"].items():
        before, after = (Interval(**model["dims"][dim]["ndcg@10"]) for model in (untuned, tuned))
        lines.append(f"{dim:>5}  {before!s:<22} {after!s:<22} {Interval(**difference)}")
    return "\n".join(lines)


def derive_exercises(solutions: Path, exercises: Path) -> list[Path]:
    """Write the notebooks a learner opens: the solutions without their solved lines, outputs and run metadata."""
    exercises.mkdir(parents=True, exist_ok=True)
    written = []
    for path in chapters(solutions):
        notebook = nbformat.read(path, as_version=4)
        _write(as_exercise(notebook), exercises / path.name)
        written.append(exercises / path.name)
    return written


def as_exercise(notebook: NotebookNode) -> NotebookNode:
    """A copy in which each cell tagged `solution` is a stub and nothing has been run.

    In such a cell, the lines from `# solution` to `# end` (or the cell's end) become one that raises
    NotImplementedError.

    Raises:
        InputError: a cell tagged `solution` has no line `# solution`.
    """
    notebook = _without_run(notebook)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        cell.outputs, cell.execution_count = [], None
        if "solution" in cell.metadata.get("tags", []):
            cell.source = _stub(cell.source, number)
    return notebook


def publish(run_dir: Path, root: Path) -> None:
    """Take a run's executed notebooks, figures and numbers into the project, and derive the exercises anew.

    The blocks of README and the block `difficulty` of the datasheet are written from the numbers.

    Raises:
        InputError: not all chapters were run in one go.
    """
    if not (run_dir / "figures" / "seconds.json").is_file():
        raise InputError(f"{run_dir} was not run in one go: python -m bmf_matryoshka run, then publish")
    for path in chapters(run_dir / "notebooks"):
        _write(_without_run(nbformat.read(path, as_version=4)), root / "notebooks" / "solutions" / path.name)
    for path in sorted((run_dir / "figures").iterdir()):
        shutil.copyfile(path, root / "figures" / path.name)
    experiments = run_dir / "results" / "experiments.json"
    if experiments.is_file():
        shutil.copyfile(experiments, root / "figures" / experiments.name)
    derive_exercises(root / "notebooks" / "solutions", root / "notebooks")
    readme = root / "README.md"
    files.write_text(readme, with_results(readme.read_text(encoding="utf-8"), root / "figures"))
    datasheet = root / "data" / "README.md"
    files.write_text(datasheet, with_difficulty(datasheet.read_text(encoding="utf-8"), root / "figures"))


def with_results(readme: str, figures: Path) -> str:
    """The README with the blocks of results that belong to the figures."""
    readme = fill(readme, "results", f"```\n{summary(figures / 'results.json')}\n```")
    readme = fill(readme, "comparison", bench.as_markdown(_comparison(figures)))
    readme = fill(readme, "memory", memory.as_markdown())
    readme = fill(readme, "seconds", _seconds(figures))
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(figures.glob("dry_run_*.json"))]
    return fill(readme, "dry-run", dry_run.as_markdown(reports) if reports else "(No dry run is published yet.)")


def _seconds(figures: Path) -> str:
    timing = json.loads((figures / "seconds.json").read_text(encoding="utf-8"))
    info = json.loads((figures / "results.json").read_text(encoding="utf-8"))["training"]
    seconds = timing["chapters"].values()
    each = ", ".join(map(str, seconds))
    return (
        f"In the run published here ({info['device']}, {info['precision']}, {timing['cores']} cores), the chapters "
        f"took {each} seconds, {sum(seconds) / 60:.0f} minutes in all; installing comes on top."
    )


def with_difficulty(datasheet: str, figures: Path) -> str:
    """The datasheet with the block that says how hard the questions are, in each style."""
    comparison = _comparison(figures, ("bm25", "untuned", "fine_tuned"))
    return fill(datasheet, "difficulty", f"{bench.as_markdown(comparison)}\n\n{bench.apart(comparison)}")


def _comparison(figures: Path, systems: Iterable[str] = tuple(bench.NAMES)) -> list[dict[str, Any]]:
    everything = json.loads((figures / "results.json").read_text(encoding="utf-8"))
    return [row for row in everything["comparison"] if row["system"] in systems]


def fill(text: str, name: str, content: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- /name -->` replaced by the content.

    Raises:
        InputError: the text has no such block.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise InputError(f"no block {begin} … {end} to fill")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _without_run(notebook: NotebookNode) -> NotebookNode:
    """A copy without what papermill, the kernel and widgets leave behind."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    _drop_bars(notebook)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    return notebook


def _drop_bars(notebook: NotebookNode) -> None:
    """Remove progress bars: their state is not kept, so each would stand at 0 % for ever."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]


def _stub(source: str, number: int) -> str:
    kept, inside, stubs = [], False, 0
    for line in source.splitlines():
        if line.strip() == BEGIN:
            inside, stubs = True, stubs + 1
            kept.append(line.replace(BEGIN, STUB))
        elif line.strip() == END:
            inside = False
        elif not inside:
            kept.append(line)
    if not stubs:
        raise InputError(f"cell {number} is tagged solution but has no line {BEGIN!r}")
    return "\n".join(kept)


def _write(notebook: NotebookNode, path: Path) -> None:
    files.write_text(path, nbformat.writes(notebook) + "\n")


def _failure(path: Path, error: PapermillExecutionError, copy_path: Path) -> str:
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    return (
        f"{path.name}, cell {error.cell_index}: {error.ename}: {error.evalue}\n"
        f"--- the cell ---\n{error.source}\n--- the traceback ---\n{trace}\n"
        f"--- executed up to there: {copy_path}"
    )


def _finish(path: Path) -> None:
    """Tidy an executed notebook, and render it beside itself."""
    notebook = nbformat.read(path, as_version=4)
    _drop_bars(notebook)
    _write(notebook, path)
    body, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
    files.write_text(path.with_suffix(".html"), body)
