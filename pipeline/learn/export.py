"""A trained model as a bundle: graphs checked against torch, calibration, card, lineage; proven on a session through
the live path before anybody can load it."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import yaml

from pipeline.bundle import Bundle, load_bundle
from pipeline.confidence import fit_calibration
from pipeline.errors import BundleError, RecordingError, taken
from pipeline.inference import FuseOptions, Fuser
from pipeline.learn.begin import CONFIG, WEIGHTS
from pipeline.learn.card import Score, card, score
from pipeline.learn.config import Config, check_config, stream_entry
from pipeline.learn.dataset import Labelled
from pipeline.learn.graphs import TOLERANCE, check_encoder, check_fusion, encoder_graph, fusion_graph
from pipeline.learn.loop import Silent, Watch, deterministic
from pipeline.learn.model import Said, say, subsets_of, windows
from pipeline.learn.sessions import Recorded
from pipeline.learn.train import Trained, train
from pipeline.modelfile import MODEL_FILE, Calibration, Lineage, ModelFile
from pipeline.outside import naming

Array = np.ndarray[Any, Any]
SAMPLES = 16
"""Real steps of each stream on which the graphs are compared."""
PROVEN = 50
"""Steps of a session that are run through the live path."""
FUSION, CURVES, CARD = "fusion.onnx", "training.json", "README.md"


class Exported(msgspec.Struct, frozen=True):
    """A bundle that was written, and how good it is on the sessions tested on."""

    bundle: Bundle
    scores: list[Score]


def train_bundle(
    config: Config,
    out: Path,
    *,
    device: str = "auto",
    resume: bool = False,
    watch: Watch | None = None,
    jobs: int = 1,
) -> tuple[Trained, Exported]:
    """Trains what ``config`` says on the recordings that it names, and writes the bundle ``out``. Prepared steps are
    kept in its ``cache`` (default: a folder ``.prepared`` beside the training file), the state of an unfinished
    training beside ``out``. ``jobs``: see ``train``. Raises ConfigError, RecordingError, BundleError."""
    file, watch = config.file, watch or Silent()
    paths = config.sessions(file.sessions, "sessions")
    more = config.sessions(file.pretrain.sessions, "pretrain") if file.pretrain is not None else []
    work = out.with_name(f"{out.name}.unfinished")
    with ExitStack() as stack:
        cache = file.cache or _default_cache(config.document.folder, stack, watch)
        trained = train(
            config, [Recorded(path) for path in paths], cache=cache, work=work, device=device, resume=resume,
            watch=watch, unlabelled=[Recorded(path) for path in more], jobs=jobs,
        )  # fmt: skip
        made = export(trained, out, watch)
    shutil.rmtree(work, ignore_errors=True)
    return trained, made


def _default_cache(folder: Path, stack: ExitStack, watch: Watch) -> Path:
    """Nobody asked for this folder, so it keeps itself out of who looks after the training file's, as git does; and
    where it cannot be written, another does until ``stack`` is left."""
    cache = folder / ".prepared"
    try:
        if not cache.exists():
            cache.mkdir(exist_ok=True)
            (cache / ".gitignore").write_text("*\n")
        tempfile.TemporaryFile(dir=cache).close()  # permissions alone do not tell
    except OSError as error:
        watch.note(
            f"{cache} cannot be written ({error.strerror}), so that prepared sessions are kept in a temporary folder, "
            "and the next training prepares them again. `cache: FOLDER` in the training file keeps them elsewhere"
        )
        return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sensorium-prepared-")))
    return cache


def export(trained: Trained, out: Path, watch: Watch | None = None) -> Exported:
    """Writes the bundle ``out``, which must not exist (ConfigError). Nothing is left there if anything does not hold:
    BundleError where torch and ONNX Runtime, or the live path and the trained model, do not agree."""
    watch = watch or Silent()
    if out.exists():
        raise taken(out, "folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with deterministic(), naming(out):
            scores = _write(trained, part, watch)
        part.chmod(0o755)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Exported(load_bundle(out), scores)


def _write(trained: Trained, folder: Path, watch: Watch) -> list[Score]:
    watch.begin("writing the bundle", len(trained.streams) + 4)
    torch.manual_seed(trained.config.file.seed)
    agreement: dict[str, float] = {}
    for name, stream in trained.streams.items():
        samples = _samples(trained, name)
        data = encoder_graph(trained.model.encoder(name), stream, samples[0])
        agreement[name] = check_encoder(data, trained.model.encoder(name), samples, f"encoder.{name}.onnx")
        (folder / f"encoder.{name}.onnx").write_bytes(data)
        watch.advance()
    data = fusion_graph(trained.model.fusion)
    agreement["fusion"] = check_fusion(data, trained.model.fusion, _windows(trained), FUSION)
    (folder / FUSION).write_bytes(data)
    watch.advance()
    calibration = _calibrate(trained, say_all(trained, trained.split.held_out))
    watch.advance()
    tested = say_all(trained, trained.split.test)
    scores = [] if tested is None else score(tested, calibration, trained.labels)
    watch.advance()
    _write_rest(trained, folder)
    _write_model(trained, folder, calibration)
    bundle = load_bundle(folder)
    assert bundle.calibration == calibration, "what was written is not what was fitted"
    proven = prove(trained, bundle)
    text = card(trained, calibration, scores, tested, agreement, proven)
    (folder / CARD).write_text(text, encoding="utf-8")
    watch.advance()
    return scores


def _samples(trained: Trained, name: str) -> list[dict[str, Array]]:
    """Raw inputs of real steps, from as many sessions as there are."""
    sessions = [s.session for s in (*trained.split.held_out, *trained.split.train) if s.session.samples[name]]
    if not sessions:
        raise RecordingError(f"the stream `{name}` has content in no session, so nothing could be learnt from it")
    found = [session.samples[name][0] for session in sessions] + [session.samples[name][-1] for session in sessions]
    return found[:SAMPLES]


@torch.no_grad()
def _windows(trained: Trained) -> dict[str, Array]:
    """Inputs of the fusion graph: real windows, then the same with streams and steps masked at random."""
    data = trained.dataset(trained.split.held_out or trained.split.train)
    batch, _ = next(data.batches(64))
    tokens = trained.model.tokens(batch.prepared, batch.present)
    draws = torch.Generator().manual_seed(0)
    given = {}
    for name, token in tokens.items():
        cut, mask = windows(token, data.steps)[:64], windows(batch.present[name], data.steps)[:64]
        some = (torch.rand(mask.shape, generator=draws) < 0.6).float() * (
            torch.rand(len(mask), 1, generator=draws) < 0.7
        )
        masks = torch.cat([mask, mask * some])
        given[name] = (torch.cat([cut, cut]) * masks[..., None]).numpy()
        given[f"mask.{name}"] = masks.numpy()
    return given


def say_all(trained: Trained, sessions: Sequence[Labelled]) -> Said | None:
    """What the model says of these sessions' labelled windows for every subset of its streams; None if there are
    none."""
    said = say(trained.model, trained.dataset(sessions), subsets_of(trained.streams), torch.device("cpu"))
    return said if len(said.truth) else None


def _calibrate(trained: Trained, said: Said | None) -> Calibration:
    if said is None:
        return Calibration()
    entry = trained.config.file.calibration
    logits = {}
    for subset, found in said.logits.items():
        whole = np.all([said.there[name] for name in subset], axis=0)
        logits[subset] = np.where(whole[:, None], found, np.nan)
    try:
        return fit_calibration(
            logits, said.truth, trained.labels, coverage=entry.coverage, sets=entry.sets, wrong=entry.wrong,
            mistaken=entry.mistaken, mix=entry.mix, straighten=entry.straighten,
        )  # fmt: skip
    except ValueError as error:
        raise RecordingError(f"the sessions held out cannot calibrate the model: {error}; hold out others") from None


# -- files ---------------------------------------------------------------------------------------------------------


def _write_rest(trained: Trained, folder: Path) -> None:
    """Weights (plain arrays, no pickle), curves, and the training file as it was read, after what replaced parts."""
    state = {key: value.numpy() for key, value in trained.model.state_dict().items()}
    np.savez(folder / WEIGHTS, **state)
    (folder / CURVES).write_bytes(msgspec.json.format(msgspec.json.encode(trained.curves), indent=1) + b"\n")
    (folder / CONFIG).write_text(_overrides(trained.config) + trained.config.document.text, encoding="utf-8")


def _overrides(config: Config) -> str:
    """A comment that says what the command line stated otherwise than the training file; "" if it did not."""
    told, done = (
        msgspec.to_builtins(file, enc_hook=lambda path: path.name)
        for file in (check_config(config.document).file, config.file)
    )
    changed = {}
    for key, value in done.items():
        before = told[key]
        if isinstance(value, dict) and isinstance(before, dict):
            value = {name: one for name, one in value.items() if one != before.get(name)} or before
        if value != before:
            changed[key] = value
    if not changed:
        return ""
    lines = ["Trained with this from the command line instead:", *yaml.safe_dump(changed, sort_keys=False).splitlines()]
    return "".join(f"# {line}\n" for line in lines)


def _write_model(trained: Trained, folder: Path, calibration: Calibration) -> None:
    file = trained.config.file
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}
    streams = {name: stream_entry(trained.config, name, trained.layouts.get(trained.config.names()[name]))
               for name in trained.streams}  # fmt: skip
    model = ModelFile(
        name=file.name, window=file.window, streams=streams, labels=trained.labels, fusion=FUSION,
        strategy=file.strategy, calibration=calibration,
        lineage=Lineage(
            files=files, recordings=dict(sorted(trained.sha256.items())), card=CARD,
            held_out=_names(trained.split.held_out), tested=_names(trained.split.test),
        ),
    )  # fmt: skip
    head = f"# Made by `sensorium train`; {CARD} says of what, and how good it is.\n"
    text = yaml.safe_dump(_plain(model), sort_keys=False, allow_unicode=True, width=120)
    (folder / MODEL_FILE).write_text(head + text, encoding="utf-8")


def _names(sessions: Sequence[Labelled]) -> tuple[str, ...]:
    return tuple(sorted(session.session.name for session in sessions))


def _plain(value: Any) -> Any:
    """A struct as plain values, without what is as by default."""
    if isinstance(value, msgspec.Struct):
        config = value.__struct_config__
        tag = {config.tag_field: config.tag} if config.tag_field else {}
        fields = {f.name: getattr(value, f.name) for f in msgspec.structs.fields(value)}
        return tag | {f.name: _plain(fields[f.name]) for f in msgspec.structs.fields(value)
                      if fields[f.name] != _default(f)}  # fmt: skip
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _default(field: msgspec.structs.FieldInfo) -> Any:
    """What a field is where nothing is stated. (An empty mapping may be a statement: a set of streams without limits,
    where all together have some.)"""
    factory: Any = field.default_factory
    return field.default if factory is msgspec.NODEFAULT else factory()


# -- proof ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def prove(trained: Trained, bundle: Bundle) -> str:
    """Runs the first steps of a session through the live path and compares its tokens with those that the trained model
    makes of what was prepared: the same windows, masked alike. BundleError if they are not; says what was compared."""
    labelled = (trained.split.held_out or trained.split.train)[0]
    session = next(s for s in trained.sources if s.name == labelled.session.name)
    data = trained.dataset([labelled])
    batches = [batch for batch, _ in data.batches(1 << 20)]
    model = copy.deepcopy(trained.model).eval()
    expected, masks = _rows(model, batches, data.steps)
    fuser = Fuser(bundle, FuseOptions(contributions=False), streams=trained.config.names())
    rows = {int(step): row for row, step in enumerate(labelled.session.step.tolist()) if step >= 0}
    worst, count = 0.0, 0
    for count, given in enumerate(session.steps(trained.spec, trained.config.file.windows), 1):
        fuser.step(given.manifest, given.content, given.masked)
        row = rows[given.manifest.step]
        if given.manifest.digest != labelled.session.digests[row]:
            raise BundleError(f"{session.name}: step {given.manifest.step} is not the one that was learnt from")
        for name, (tokens, mask) in fuser.window().items():
            first = max(0, row + 1 - data.steps)
            own = slice(data.steps - (row + 1 - first), None)
            if not np.array_equal(mask[own] > 0, masks[name][first : row + 1] > 0) or mask[: own.start].any():
                raise BundleError(f"{session.name}: the window at step {given.manifest.step} masks `{name}` otherwise")
            distance = float(np.abs(tokens[own] - expected[name][first : row + 1]).max(initial=0.0))
            worst = max(worst, distance / max(1.0, float(np.abs(tokens).max(initial=0.0))))
        if count == PROVEN:
            break
    if worst > TOLERANCE:
        raise BundleError(
            f"{session.name}: the live path makes tokens that are {worst:.2g} off those of the trained model, where "
            f"{TOLERANCE:g} is allowed. No bundle is written; please report the training file"
        )
    return f"The first {count} windows of {session.name} through the live path are the windows that were learnt from."


def _rows(model: Any, batches: Sequence[Any], steps: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Tokens and masks of a session's steps, one row a step, from its chunks."""
    tokens: dict[str, list[Array]] = {}
    masks: dict[str, list[Array]] = {}
    for batch in batches:
        for name, found in model.tokens(batch.prepared, batch.present).items():
            tokens.setdefault(name, []).append(found[:, steps - 1 :].flatten(0, 1).numpy())
            masks.setdefault(name, []).append(batch.present[name][:, steps - 1 :].flatten().numpy())
    return ({name: np.concatenate(rows) for name, rows in tokens.items()},
            {name: np.concatenate(rows) for name, rows in masks.items()})  # fmt: skip
