"""The command line: thin, the same functions as the notebooks."""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import files
from .errors import InputError
from .profiles import PROFILES, Profile, changed, check_dims, get_profile

if TYPE_CHECKING:
    from datasets import DatasetDict

USUAL_DIMS = (1024, 768, 512, 384, 256, 128, 64, 32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 for success, 1 for a failed chapter or training, 2 for bad input, 130 if interrupted."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; train goes on with --resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bmf_matryoshka", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, command: object, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=description)
        added.set_defaults(command=command)
        return added

    run = add("run", _run, "execute the course's notebooks in order")
    run.add_argument("--profile", choices=PROFILES, default="laptop")
    chosen = run.add_mutually_exclusive_group()
    chosen.add_argument("--only", metavar="NN", help="run this chapter alone")
    chosen.add_argument("--from", dest="start", metavar="NN", help="run from this chapter on")
    run.add_argument("--exercises", action="store_true", help="run the exercises as a learner opens them")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")

    _add_train(add("train", _train, "fine-tune on your own pairs"))

    evaluate = add("evaluate", _evaluate, "measure a model on your own pairs at every dimension")
    evaluate.add_argument("--model", required=True, metavar="M", help="a folder or a hub id")
    evaluate.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="CSV, TSV, JSONL or Parquet")
    evaluate.add_argument("--split", choices=("test", "all"), default="test")
    evaluate.add_argument("--dims", nargs="+", type=int, metavar="D")
    evaluate.add_argument(
        "--protocol", choices=("passage", "text", "card"), nargs="+", default=["passage"], help="several: side by side"
    )
    evaluate.add_argument(
        "--ties", choices=("order", "random", "worst"), default="order", help="the order of copies of one text"
    )
    evaluate.add_argument("--cache", type=Path, metavar="DIR", help="keep embeddings in this folder")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="also write every measure to this file")

    dry_run = add("dry-run", _dry_run, "try a profile's training at full size with random weights")
    dry_run.add_argument("--profile", choices=PROFILES, default="card")
    dry_run.add_argument("--steps", type=int, default=2, metavar="N", help="optimizer steps, at least 2")
    dry_run.add_argument("--max-seq-length", type=int, default=256, metavar="N", help="tokens a text, default 256")
    dry_run.add_argument("--folder", type=Path, metavar="DIR", help="where the models go, and are removed again")
    dry_run.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")

    summary = add("summary", _summary, "print the result table of a run")
    summary.add_argument("--run-dir", type=Path, default=Path("runs/laptop"))

    bench = add("bench", _bench, "compare every way to search, at every dimension and in every style")
    bench.add_argument("--run-dir", type=Path, default=Path("runs/laptop"), help="a finished run of the course")

    experiments = add("experiments", _experiments, "measure what each choice in training does (half an hour or more)")
    experiments.add_argument("--run-dir", type=Path, default=Path("runs/laptop"), help="a finished run of the course")
    experiments.add_argument("--only", nargs="+", default=[], metavar="OPTION")

    pairs = add("pairs", _pairs, "check or count the course's data")
    pairs.add_argument("action", choices=("validate", "describe"))
    pairs.add_argument("files", type=Path, nargs=2, metavar="FILE", help="passages.jsonl, then questions.jsonl")
    pairs.add_argument("--into", type=Path, metavar="FILE", help="describe: also fill the blocks of this datasheet")

    add("derive", _derive, "write the exercises from the solutions")
    publish = add("publish", _publish, "take a run's notebooks and figures into the project")
    publish.add_argument("--run-dir", type=Path, default=Path("runs/laptop"))
    return parser


def _add_train(train: argparse.ArgumentParser) -> None:
    train.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="CSV, TSV, JSONL or Parquet")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the model")
    train.add_argument("--profile", choices=PROFILES, default="laptop")
    train.add_argument("--epochs", type=float, metavar="N")
    train.add_argument("--base-model", metavar="M", help="a hub id or a folder")
    train.add_argument("--dims", nargs="+", type=int, metavar="D", help="descending, for example 384 128 32")
    train.add_argument("--full-dimension", action="store_true", help="add the base model's full width to the dims")
    train.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change settings of the profile, such as batch_size=64",
    )
    train.add_argument("--report-to", choices=("none", "tensorboard", "trackio"), default="none")
    train.add_argument("--seed", type=int, default=42)
    train.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same command")


def _run(arguments: argparse.Namespace) -> int:
    from . import workbook

    parameters = {}
    for text in arguments.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"-p {text}: write name=value")
        parameters[name] = value
    if arguments.profile != "laptop":
        parameters.setdefault("profile", arguments.profile)
    root = workbook.find_root()
    folder = root / "notebooks" if arguments.exercises else root / "notebooks" / "solutions"
    notebooks = workbook.select(workbook.chapters(folder), arguments.only, arguments.start)
    run_dir = root / parameters.get("run_dir", f"runs/{parameters.get('profile', 'laptop')}")
    timing = run_dir / "figures" / "seconds.json"
    timing.unlink(missing_ok=True)  # it tells of all chapters, run in one go
    try:
        seconds = workbook.run(notebooks, run_dir / "notebooks", parameters)
    except workbook.ChapterFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.only is None and arguments.start is None:
        rounded = {name: round(taken) for name, taken in seconds.items()}
        files.write_json(timing, {"cores": os.cpu_count(), "chapters": rounded})
    if arguments.only is None:
        print(f"\n{workbook.summary(run_dir / 'figures' / 'results.json')}\n")
    print(f"figures: {run_dir / 'figures'}\nnotebooks, executed, with HTML: {run_dir / 'notebooks'}")
    return 0


def _profile(arguments: argparse.Namespace) -> Profile:
    """The named profile, changed by the options of `train`."""
    profile = get_profile(arguments.profile)
    if arguments.epochs is not None:
        if arguments.epochs <= 0:
            raise InputError(f"--epochs {arguments.epochs}: a number above 0 is needed")
        profile = replace(profile, epochs=arguments.epochs, max_steps=-1, evaluations=None)
    if arguments.dims:
        profile = replace(profile, dims=check_dims(tuple(arguments.dims)), full_dimension=False)
    if arguments.full_dimension:
        profile = replace(profile, full_dimension=True)
    return changed(profile, arguments.set)


def _train(arguments: argparse.Namespace) -> int:
    profile = _profile(arguments)
    # Beside the output, so that it is on the same disk; it stays when the run is interrupted.
    work = arguments.out.parent / f".{arguments.out.name}-checkpoints"
    if arguments.resume and arguments.out.exists() and work.exists():
        shutil.rmtree(work)
        print(f"the run was finished already; the model is in {arguments.out}")
        return 0
    if arguments.out.exists():
        raise InputError(f"--out {arguments.out} exists: name a new folder or remove it")
    if any(work.glob("checkpoint-*")) and not arguments.resume:
        raise InputError(f"{work} holds an interrupted run: add --resume to go on with it, or remove the folder")
    dataset = _read(arguments.pairs, profile)
    settings = json.dumps([asdict(profile), arguments.seed, arguments.base_model, dataset["train"]["question_id"][:]])
    saved = work / "settings.json"
    if arguments.resume and saved.is_file() and saved.read_text(encoding="utf-8") != settings:
        raise InputError(f"{work} holds a run with other settings or pairs: repeat its command, or remove the folder")

    from . import base_models, hardware, memory, training
    from .callbacks import LossError
    from .hidden_states import HiddenStates

    device = hardware.device()
    base_model = arguments.base_model or profile.base_model
    shape = memory.shape_of(base_model)
    if shape is not None:
        profile.dims_for(shape.hidden)
        memory.check_fits(shape, profile, device, hardware.precision(device))
    with hardware.first_process_first():
        loaded = base_models.load(base_model, profile.max_seq_length, device)
    profile.dims_for(base_models.width(loaded.model))
    HiddenStates(profile.frozen_layers).attach(loaded.model)
    first = hardware.is_first_process()
    if first:
        print(f"base model: {loaded.source}")
        files.write_text(saved, settings)
    try:
        run = training.train(
            loaded.model, dataset, profile, work, arguments.seed, arguments.resume, report_to=arguments.report_to
        )
    except (LossError, training.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if first:
        training.save(loaded.model, run, arguments.out, work)
        print(f"trained {run.info['steps']} steps in {run.info['seconds']} s; the model is in {arguments.out}")
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from . import dry_run, memory, workbook

    profile = get_profile(arguments.profile)
    shape = memory.SHAPES[profile.base_model]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report = dry_run.run(
            profile, shape, workbook.find_root() / "data", Path(folder), arguments.steps, arguments.max_seq_length
        )
    print(dry_run.as_text(report))
    if arguments.json is not None:
        files.write_json(arguments.json, report)
    return 0


def _experiments(arguments: argparse.Namespace) -> int:
    from . import course_data, experiments, workbook

    root = workbook.find_root()
    run_dir = root / arguments.run_dir
    course_pairs = course_data.read_folder(root / "data").pairs()
    table = experiments.run(get_profile("laptop"), course_pairs, run_dir / "experiments", arguments.only)
    experiments.save(table, run_dir / "results" / "experiments.json")
    print(experiments.as_markdown(table))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    dims = check_dims(tuple(arguments.dims)) if arguments.dims else None
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    dataset = _read(arguments.pairs, get_profile("laptop"))

    from . import base_models, evaluation, hardware

    loaded = base_models.load(arguments.model, device=hardware.device())
    width = base_models.width(loaded.model)
    dims = check_dims(dims or tuple(dim for dim in USUAL_DIMS if dim <= width), width)
    tasks = {
        str(protocol): evaluation.build_task(dataset, arguments.split, protocol, ties=arguments.ties)
        for protocol in arguments.protocol
    }
    precision = hardware.precision(loaded.model.device.type)
    results = evaluation.evaluate_tasks(loaded.model, tasks, dims, precision, show_progress=True, cache=arguments.cache)
    for protocol, result in results.items():
        info = result.info
        print(f"{info['queries']} questions, {info['passages']} passages, protocol {protocol}, {precision}")
        for dim in dims:
            ndcg, recall = (result.interval(dim, name) for name in ("ndcg@10", "recall@10"))
            print(f"dim {dim:>4}  ndcg@10 {ndcg}  recall@10 {recall}")
    if arguments.json is not None:
        summaries = {protocol: result.summary() for protocol, result in results.items()}
        content = summaries if len(summaries) > 1 else summaries[arguments.protocol[0]]
        files.write_json(arguments.json, content)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    folders = {"untuned": "base_model", "plain": "plain_model", "fine_tuned": "model"}
    missing = [folder for folder in ("pairs", *folders.values()) if not (arguments.run_dir / folder).is_dir()]
    if missing:
        raise InputError(f"{arguments.run_dir} lacks {', '.join(missing)}: run the chapters up to 04 first")

    from . import base_models, bench, evaluation, hardware, pairs, training

    dataset = pairs.load(arguments.run_dir / "pairs")
    task = evaluation.build_task(dataset, "test")
    device = hardware.device()
    models = {
        name: base_models.load(str(arguments.run_dir / folder), device=device).model for name, folder in folders.items()
    }
    log = training.TrainingRun.load(arguments.run_dir / "model" / "training.json").info
    precision, cache = hardware.precision(device), arguments.run_dir / "embeddings"
    results = bench.measure(
        models,
        dataset,
        task,
        log["dims"],
        log["profile"]["scale"],
        log["seed"],
        precision,
        show_progress=True,
        cache=cache,
    )
    comparison = bench.compare(results, evaluation.labels(dataset, "test"))
    bench.save(comparison, arguments.run_dir / "results" / "bench.json")
    print(f"ndcg@10, 95 % intervals, {len(task.queries)} questions, {len(task.corpus)} passages, {precision}\n")
    print(bench.as_markdown(comparison))
    return 0


def _read(path: Path, profile: Profile) -> "DatasetDict":
    from . import hardware, pairs

    table, columns = pairs.read_file(path)
    renamed = {role: name for role, name in columns.items() if role != name}
    if renamed and hardware.is_first_process():
        print("columns taken: " + ", ".join(f"{name} as {role}" for role, name in renamed.items()))
    dataset = pairs.split(table, profile.split, profile.shares)
    if hardware.is_first_process():
        print(f"{path}: {len(table)} pairs: " + ", ".join(f"{len(part)} {name}" for name, part in dataset.items()))
    return dataset


def _summary(arguments: argparse.Namespace) -> int:
    from . import workbook

    print(workbook.summary(arguments.run_dir / "figures" / "results.json"))
    return 0


def _pairs(arguments: argparse.Namespace) -> int:
    from . import base_models, course_data, datasheet, workbook
    from .profiles import E5_SMALL

    data = course_data.read(*arguments.files)
    count_tokens = partial(base_models.count_tokens, base_models.load(E5_SMALL).model)
    if arguments.action == "describe":
        blocks = {"statistics": datasheet.statistics(data, count_tokens)}
        folder = arguments.files[0].parent
        if (folder / "readings.jsonl").is_file():
            blocks["readings"] = datasheet.readings(data, folder)
        print("\n\n".join(blocks.values()))
        if arguments.into is not None:
            text = arguments.into.read_text(encoding="utf-8")
            for name, content in blocks.items():
                text = workbook.fill(text, name, content)
            files.write_text(arguments.into, text)
        return 0
    breaches = course_data.breaches(data, count_tokens)
    if breaches:
        raise InputError(f"{len(breaches)} promise(s) broken: " + "; ".join(breaches))
    print(f"valid: {len(data.passages)} passages, {len(data.questions)} questions")
    return 0


def _derive(_: argparse.Namespace) -> int:
    from . import workbook

    root = workbook.find_root()
    for path in workbook.derive_exercises(root / "notebooks" / "solutions", root / "notebooks"):
        print(path.relative_to(root))
    return 0


def _publish(arguments: argparse.Namespace) -> int:
    from . import workbook

    workbook.publish(arguments.run_dir, workbook.find_root())
    return 0


if __name__ == "__main__":
    sys.exit(main())
