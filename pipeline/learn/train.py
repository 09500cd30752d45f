"""From sessions to a trained model: prepare, split, fit the normalisation, pretrain and train teachers if asked, train,
and weigh the streams on what was held out if asked.

Reads like the list of its steps; what each of them is stands in its own file. ``export`` makes a bundle of the result.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.align import AlignSpec
from pipeline.bundle import Bundle
from pipeline.errors import RecordingError
from pipeline.labels import look_alike
from pipeline.learn.begin import begin_from, check_beginning, not_taken
from pipeline.learn.config import Config, PretrainEntry, TeachersEntry, streams_of
from pipeline.learn.dataset import (
    Batch,
    Dataset,
    Labelled,
    Split,
    absent,
    check_split,
    hold_if_small,
    label_sessions,
    labels_of,
    split,
)
from pipeline.learn.fusion import FusionOut
from pipeline.learn.loop import Checkpoints, Draws, Phase, Silent, Watch, deterministic, pick_device
from pipeline.learn.model import Model, build_encoders, build_model, cut_windows, say
from pipeline.learn.preparing import Recipe, prepare
from pipeline.learn.pretrain import Contrast
from pipeline.learn.robust import Balance, disagreement, distilled, distort, views
from pipeline.learn.sessions import Session
from pipeline.learn.teaching import Teachers, blended, missed
from pipeline.learn.weighing import LEAST, weigh
from pipeline.messages import Layout
from pipeline.modelfile import BundleStream, to_ns
from pipeline.recording import Label
from pipeline.scoring import accuracy, confusion, macro_f1
from pipeline.strict import listed

Array = np.ndarray[Any, Any]
FITTED_ON = 4096
"""Steps of each stream from which its normalisation is taken."""
JUDGED_ON, FEWEST = 8192, 16
"""Steps, and sessions, held out that an epoch is judged on, for the curves. What is calibrated is calibrated on all."""


class Trained(NamedTuple):
    """A model and all that it came from. ``curves`` are the rows of all epochs."""

    model: Model
    config: Config
    streams: dict[str, BundleStream]
    labels: tuple[str, ...]
    layouts: dict[str, Layout]
    split: Split
    curves: list[dict[str, Any]]
    sources: Sequence[Session]
    spec: AlignSpec
    begun_from: dict[str, str]

    @property
    def sha256(self) -> dict[str, str]:
        """Of all that it was made from, by file."""
        return {name: digest for session in self.sources for name, digest in session.sha256.items()}

    def dataset(self, sessions: Sequence[Labelled]) -> Dataset:
        """``sessions``, to be looked at."""
        return _dataset(self.config, sessions, self.labels)


class Prepared(NamedTuple):
    """Sessions, ready to be learnt from."""

    recipe: Recipe
    layouts: dict[str, Layout]
    sessions: list[Labelled]
    labels: tuple[str, ...]
    unlabelled: list[Labelled]
    """For pretraining alone."""


def prepare_all(
    config: Config,
    sessions: Sequence[Session],
    cache: Path,
    watch: Watch | None = None,
    unlabelled: Sequence[Session] = (),
    jobs: int = 1,
) -> Prepared:
    """The sessions, prepared by ``jobs`` processes and labelled. Raises RecordingError, ConfigError, BundleError."""
    watch, file = watch or Silent(), config.file
    _check_names(sessions)
    layouts = _layouts(config, sessions)
    streams = streams_of(config, layouts)
    settings = {name: entry.encoder for name, entry in file.streams.items()}
    recipe = Recipe(
        streams, build_encoders(streams, settings), config.names(), settings, to_ns(file.window.hop_ms),
        file.window.steps, file.windows, file.missing_streams == "allow",
    )  # fmt: skip
    begin = None if file.init is None else check_beginning(config, file.init, streams, recipe.encoders)
    known = None if file.labels is None else (*file.labels, *file.ignore_labels)
    watch.begin("preparing sessions", len(sessions) + len(unlabelled))
    stated = [session.labels(known) for session in sessions]
    if file.labels is None:
        _note_slips(sessions, stated, watch)
    if begin is not None:
        _note_not_taken(config, begin, recipe, stated, watch)
    made = []
    for one in prepare([*sessions, *unlabelled], recipe, cache, jobs):
        made.append(one)
        watch.advance()
    found, more = made[: len(sessions)], made[len(sessions) :]
    labelled, labels = label_sessions([*zip(found, stated, strict=True)], file.labels, file.ignore_labels)
    _note_unreached(labelled, stated, labels, watch)
    return Prepared(recipe, layouts, labelled, labels, [Labelled(one, np.full(len(one), -1, np.int64)) for one in more])


def _note_not_taken(
    config: Config, begin: Bundle, recipe: Recipe, stated: Sequence[Sequence[Label]], watch: Watch
) -> None:
    labels = labels_of(stated, config.file.labels, config.file.ignore_labels)
    said = not_taken(config, begin, recipe.encoders, labels) if len(labels) > 1 else ""  # else it is refused soon
    if said:
        watch.note(said)


def _note_slips(sessions: Sequence[Session], stated: Sequence[Sequence[Label]], watch: Watch) -> None:
    names = [session.name for session in sessions]
    for label, usual, name in look_alike(dict(zip(names, stated, strict=True))):
        watch.note(
            f"the label `{label}`, which only {name} has, is nearly `{usual}`, and becomes a class of its own. If it "
            "is a slip correct it; `labels` in the training file says which there are"
        )


def _note_unreached(
    sessions: Sequence[Labelled], stated: Sequence[Sequence[Label]], labels: tuple[str, ...], watch: Watch
) -> None:
    """Says which sessions have labels to learn, and no window that has one of them."""
    for one, own in zip(sessions, stated, strict=True):
        if (one.truth < 0).all() and any(label.label in labels for label in own):
            first_s, last_s = one.session.end_ns[0] / 1e9, one.session.end_ns[-1] / 1e9
            watch.note(
                f"no window of {one.session.name} ends within one of its labels, so nothing is learnt from it: "
                f"windows end once a hop, from {first_s:.3f} to {last_s:.3f} s. Correct its labels, or leave it out"
            )


def _check_names(sessions: Sequence[Session]) -> None:
    names = [session.name for session in sessions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise RecordingError(
            f"two sessions are named {listed(twice)}; a name stands for one in lineage and splits. Rename one of them"
            if twice else "there are no sessions to learn from. Name their files under `sessions`"
        )  # fmt: skip


def _layouts(config: Config, sessions: Sequence[Session]) -> dict[str, Layout]:
    """The first layout of each stream, from as few sessions as have all of them."""
    found: dict[str, Layout] = {}
    for session in sessions:
        found = {**session.layouts(), **found}
        if set(config.names().values()) <= found.keys():
            break
    return found


def train(
    config: Config,
    sessions: Sequence[Session],
    *,
    cache: Path | None = None,
    work: Path | None = None,
    device: str = "auto",
    resume: bool = False,
    watch: Watch | None = None,
    unlabelled: Sequence[Session] = (),
    jobs: int = 1,
) -> Trained:
    """The model that ``config`` asks for; ``unlabelled`` sessions are for its pretraining. ``cache`` keeps prepared
    steps, ``work`` checkpoints; None keeps nothing. ``jobs`` processes prepare recordings; more than one begin by
    importing the main module, so that a script must keep its work under ``if __name__ == "__main__"``. Equal sessions,
    configuration and machine give equal weights. Raises ConfigError, RecordingError, BundleError."""
    watch = watch or Silent()
    chosen = pick_device(device)
    _check_names(sessions)
    check_split(sessions, config.file.split)  # before much is prepared in vain
    with deterministic(), ExitStack() as stack:
        torch.manual_seed(config.file.seed)
        kept = cache or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sensorium-learn-")))
        ready = prepare_all(config, sessions, kept, watch, unlabelled, jobs)
        parts = split(ready.sessions, config.file.split, len(ready.labels))
        _check_parts(parts, ready.labels)
        for part, missing in parts.lacking(ready.labels).items():
            what, them = ("labels", "them") if len(missing) > 1 else ("label", "it")
            watch.note(
                f"no session {part} has the {what} {listed(missing)}: nothing is known of {them} there, and the "
                "figures are of the others alone. Record more sessions, or name others under `split`"
            )
        if longer := _longer_than_all(config, ready.sessions):
            watch.note(longer)
        hold_if_small([*ready.sessions, *ready.unlabelled])
        if not ready.sessions[0].held and cache is None:
            # The temporary folder ends here, and who exports what was trained reads held out and tested sessions again.
            raise RecordingError(
                "the prepared sessions do not fit into memory, and are read again after the training: name a folder as "
                "`cache` that keeps them until then, train(..., cache=Path(...))"
            )
        run = _Run(config, ready, parts, chosen, watch)
        checkpoints = Checkpoints(work, run.identity())
        if not resume:
            checkpoints.clear()
        run.run(checkpoints, resume)
        trained = run.trained(sessions)
        held_out = trained.dataset(parts.held_out)
        if config.file.fusion.weigh and not weigh(trained.model, held_out, torch.device("cpu")):
            watch.note(
                f"the streams are not weighed: that takes two streams or more and {LEAST} labelled windows held out. "
                "Hold out more sessions (`split`), or leave `weigh` out"
            )
        return trained


def _longer_than_all(config: Config, sessions: Sequence[Labelled]) -> str:
    """That windows reach beyond any session, in a sentence; "" if they do not."""
    window, most = config.file.window, max(len(session) for session in sessions)
    if window.steps <= most:
        return ""
    asked, there = (f"{steps} steps ({steps * window.hop_ms / 1000:,.10g} s)" for steps in (window.steps, most))
    return (
        f"a window is {asked}, and the longest session {there}: none is ever full, and the rest costs time. Set "
        f"`steps` of `window` to {most} or less, or record longer sessions"
    )


def _check_parts(parts: Split, labels: tuple[str, ...]) -> None:
    if missing := absent(parts.train, labels):
        raise RecordingError(
            f"no session to learn from has the label {listed(missing)}; they are "
            f"{listed(s.session.name for s in parts.train)}. Record it there, split otherwise, or leave it out by "
            "`ignore_labels`"
        )


def _dataset(
    config: Config, sessions: Sequence[Labelled], labels: tuple[str, ...], chunk_steps: int | None = None
) -> Dataset:
    """The sessions in chunks of ``chunk_steps``; by default long ones, of which each step is encoded but once or twice,
    since what is said of a window does not depend on its chunk. (What is learnt from a batch does.)"""
    steps = config.file.window.steps
    longest = max((len(session) for session in sessions), default=1) + steps - 1
    return Dataset(sessions, steps, min(chunk_steps or (1 if steps == 1 else 6 * steps), longest), labels)


class _Run:
    """One training, by the name ``phase``."""

    def __init__(
        self,
        config: Config,
        ready: Prepared,
        parts: Split,
        device: torch.device,
        watch: Watch,
        phase: str = "training",
    ) -> None:
        self._config, self._ready, self._parts, self._device, self._watch = config, ready, parts, device, watch
        self._name, self._teachers = phase, Teachers(())
        file = config.file
        self._train = _dataset(config, parts.train, ready.labels, file.train.chunk_steps)
        self._looked_at = _dataset(config, some_of(parts.held_out, JUDGED_ON), ready.labels)
        torch.manual_seed(file.seed)
        encoders = build_encoders(ready.recipe.streams, ready.recipe.settings)
        self._model = build_model(encoders, file.strategy, file.window.steps, len(ready.labels), file.fusion)
        counts = self._train.counts()
        self._model.fusion.set_prior(counts.tolist())
        self._weights = _class_weights(counts, file.train.class_weights).to(device)
        self._balance = Balance(file.robust.balance, file.robust.balance_noise)
        tokens = {name: self._model.encoder(name).token for name in self._model.encoders}
        step_loss = file.train.step_loss if file.teachers is None else 0.0
        heads = {name: nn.Linear(token, len(ready.labels)) for name, token in tokens.items() if step_loss}
        self._heads = nn.ModuleDict(heads).to(device)
        """What makes a label of a single token; thrown away after the training."""
        self._curves: list[dict[str, Any]] = []
        self._begun_from = {} if file.init is None else begin_from(self._model, file.init, ready.labels)

    def identity(self) -> str:
        """What a checkpoint must be of to be gone on from: configuration, sessions, parts and code."""
        parts = [[session.session.name for session in part] for part in self._parts[:3]]
        said = [self._name, self._config.file, self._ready.recipe.digest(), str(torch.__version__), parts]
        said += [session.session.sha256 for session in (*self._ready.sessions, *self._ready.unlabelled)]
        said += [self._begun_from, [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]]
        return hashlib.sha256(msgspec.json.encode(said, enc_hook=str, order="deterministic")).hexdigest()

    def run(self, checkpoints: Checkpoints, resume: bool) -> None:
        begun = {name.removeprefix("encoder of ") for name in self._begun_from}
        fit_normalisation(self._model, self._parts.train, [n for n in self._model.encoders if n not in begun])
        self._model.to(self._device)
        state = (checkpoints.load() if resume else None) or {}
        if self._config.file.pretrain is not None and "training" not in state:
            self._pretrain(self._config.file.pretrain, checkpoints, state.get("pretraining"))
        self._curves = state.get("curves", self._curves)
        if self._config.file.teachers is not None:
            self._teachers = self._taught(self._config.file.teachers, checkpoints, resume, "training" not in state)
        entry = self._config.file.train
        both = nn.ModuleDict({"model": self._model, "heads": self._heads})
        phase = self._phase(self._name, both, entry.epochs, entry.learning_rate, entry.weight_decay)
        self._go_on(phase, state.get("training"))
        earlier = list(self._curves)
        learnt: Any = phase.mean.module
        phase.run(
            self._config.file.seed, self._batches, self._loss, lambda: self._judge(learnt["model"]),
            lambda: checkpoints.save({"training": phase.state(), "curves": earlier}), self._watch, self._modulate,
        )  # fmt: skip
        self._curves = earlier + phase.curves
        self._model.load_state_dict(learnt["model"].state_dict())

    def trained(self, sources: Sequence[Session]) -> Trained:
        recipe = self._ready.recipe
        self._model.to("cpu").eval()
        return Trained(
            self._model, self._config, recipe.streams, self._ready.labels, self._ready.layouts, self._parts,
            self._curves, sources, recipe.spec(), self._begun_from,
        )  # fmt: skip

    def _phase(self, name: str, module: nn.Module, epochs: int, learning_rate: float, weight_decay: float) -> Phase:
        entry = self._config.file.train
        return Phase(
            name, module, copy.deepcopy(module), epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay,
            warm_up=entry.warm_up, ema=entry.ema, clip_norm=entry.clip_norm,
        )  # fmt: skip

    def _go_on(self, phase: Phase, state: dict[str, Any] | None) -> None:
        if state is not None:
            phase.restore(state)
            self._watch.note(f"going on after epoch {phase.done} of {phase.epochs} of {phase.name}")

    # -- teachers ------------------------------------------------------------------------------------------------------

    def _taught(self, entry: TeachersEntry, checkpoints: Checkpoints, resume: bool, curves: bool) -> Teachers:
        """Trains the teachers, each from another seed; ``curves``: whether they are not in the curves yet."""
        file = self._config.file
        models = []
        for number in range(1, entry.count + 1):
            seed = int.from_bytes(hashlib.sha256(f"{file.seed}/teacher/{number}".encode()).digest()[:4])
            own = msgspec.structs.replace(file, seed=seed, teachers=None, train=entry.train(file.train))
            config, name = msgspec.structs.replace(self._config, file=own), f"teacher {number}"
            one = _Run(config, self._ready, self._parts, self._device, self._watch, name)
            one.run(checkpoints.within(f"teacher-{number}", one.identity()), resume)
            models.append(one._model)
            self._curves += one._curves if curves else []
        return Teachers(models)

    # -- without labels ------------------------------------------------------------------------------------------------

    def _pretrain(self, entry: PretrainEntry, checkpoints: Checkpoints, state: dict[str, Any] | None) -> None:
        """Learns encoders from which moments go together; the projections are thrown away."""
        sessions = self._ready.unlabelled or self._parts.train
        data = Dataset(sessions, 1, self._train.chunk, self._ready.labels)
        size = self._config.file.train.batch_windows
        tokens = {name: self._model.encoder(name).token for name in self._model.encoders}
        contrast = Contrast(tokens, temperature=entry.temperature).to(self._device)
        both = nn.ModuleDict({"model": self._model, "contrast": contrast})
        name = "pretraining" if self._name == "training" else f"{self._name}, pretraining"
        phase = self._phase(name, both, entry.epochs, entry.learning_rate, entry.weight_decay)
        self._go_on(phase, state)

        def loss(batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, float]]:
            batch = batch.to(self._device)
            tokens = self._model.tokens(self._distorted(batch, draws), batch.present)
            out = contrast(tokens, batch.present, draws.torch)
            return out.loss, {"found": out.found}

        def batches(draws: Draws) -> tuple[int, Iterator[Batch]]:
            return data.number_of_batches(size), data.shuffled(size, draws.numpy, unlabelled=True)

        seed, save = self._config.file.seed, lambda: checkpoints.save({"pretraining": phase.state()})
        phase.run(seed, batches, loss, dict, save, self._watch)
        self._curves = phase.curves
        learnt: Any = phase.mean.module
        self._model.load_state_dict(learnt["model"].state_dict())

    # -- with labels ---------------------------------------------------------------------------------------------------

    def _batches(self, draws: Draws) -> tuple[int, Iterator[Batch]]:
        size = self._config.file.train.batch_windows
        return self._train.number_of_batches(size), self._train.shuffled(size, draws.numpy)

    def _distorted(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        encoders = {name: self._model.encoder(name) for name in batch.prepared}
        return distort(encoders, batch.prepared, batch.present, self._config.file.robust, draws.torch)

    def _loss(self, batch: Batch, draws: Draws) -> tuple[Tensor, dict[str, float]]:
        """Every window is seen twice: as it was, and with something left out. With ``agree``, in two variations."""
        entry, robust, teachers = self._config.file.train, self._config.file.robust, self._config.file.teachers
        batch = batch.to(self._device)
        batch = batch.twice() if robust.agree else batch
        given = batch._replace(prepared=self._distorted(batch, draws))
        if teachers is not None:
            encoders = {name: self._model.encoder(name) for name in given.prepared}
            given = blended(encoders, given, teachers.blend, draws.torch)
        tokens, masks, truth = cut_windows(self._model, given)
        parts = [entry.step_loss * self._of_steps(tokens, masks, truth)] if self._heads else []
        tokens, masks = views(tokens, masks, robust, draws.torch)
        out = self._model.fusion.train_step(tokens, masks)
        whole = len(truth)
        right = float((out.logits[:whole].argmax(1) == truth).float().mean())
        if teachers is not None:
            taught = missed(out, self._teachers.lesson(given, masks), masks, entry.stream_loss)
            return torch.stack([*parts, taught, *out.extra_losses.values()]).sum(), {"accuracy": right}
        truth = torch.cat([truth, truth])
        parts.append(self._cross_entropy(out.logits, truth, None))
        if out.stream_logits and entry.stream_loss:
            own = [self._cross_entropy(z, truth, masks[name].amax(1)) for name, z in out.stream_logits.items()]
            parts.append(entry.stream_loss * torch.stack(own).mean())
        if robust.distil:
            parts.append(robust.distil * distilled(out.logits, masks))
        if robust.agree:
            parts.append(robust.agree * self._apart(out, masks, whole))
        if robust.balance:
            self._balance.watch(out.stream_logits, masks, truth)
        return torch.stack([*parts, *out.extra_losses.values()]).sum(), {"accuracy": right}

    def _apart(self, out: FusionOut, masks: dict[str, Tensor], whole: int) -> Tensor:
        """How far what is said of the two variations differs, of the first ``whole`` windows, in which nothing is left
        out: all streams together, and each by itself, weighed as their losses by labels are."""
        there = {name: mask[:whole].amax(1).chunk(2)[0] for name, mask in masks.items()}
        apart = disagreement(out.logits[:whole], torch.stack([*there.values()]).amax(0))
        if not out.stream_logits:
            return apart
        own = [disagreement(z[:whole], there[name]) for name, z in out.stream_logits.items()]
        return apart + self._config.file.train.stream_loss * torch.stack(own).mean()

    def _of_steps(self, tokens: dict[str, Tensor], masks: dict[str, Tensor], truth: Tensor) -> Tensor:
        """What the newest token of each window [n, S, token] says of its label by itself, the mean over streams."""
        prior = self._model.fusion.log_prior
        said = {name: prior + self._heads[name](token[:, -1]) for name, token in tokens.items()}
        return torch.stack([self._cross_entropy(z, truth, masks[name][:, -1]) for name, z in said.items()]).mean()

    def _modulate(self, draws: Draws) -> None:
        if self._config.file.robust.balance:
            self._balance.apply({name: self._model.encoder(name) for name in self._model.encoders}, draws.torch)

    def _cross_entropy(self, logits: Tensor, truth: Tensor, weight: Tensor | None) -> Tensor:
        """The mean over windows, each weighted by its class and by ``weight``."""
        losses = functional.cross_entropy(
            logits, truth, reduction="none", label_smoothing=self._config.file.train.label_smoothing
        )
        weights = self._weights[truth] if weight is None else self._weights[truth] * weight
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)

    def _judge(self, average: Any) -> dict[str, float]:
        """What the mean of the weights makes of sessions that are held out, with all streams."""
        if not self._looked_at.sessions:
            return {}
        everything = frozenset(self._ready.recipe.streams)
        said = say(average, self._looked_at, [everything], self._device)
        return scores(said.logits[everything], said.truth, len(self._ready.labels))


def scores(logits: Array, truth: Array, labels: int) -> dict[str, float]:
    """Accuracy, macro-F1 and log loss, for the curves."""
    if not len(truth):
        return {}
    predicted = logits.argmax(1)
    lost = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(truth))
    found = {
        "held_out_windows": len(truth),
        "held_out_accuracy": accuracy(truth, predicted),
        "held_out_f1": float(macro_f1(confusion(truth, predicted, labels))),
        "held_out_loss": float(lost),
    }
    return {key: round(value, 6) for key, value in found.items()}


def _class_weights(counts: Array, kind: str) -> Tensor:
    """What a window of each label counts; 1 in the mean over windows."""
    power = {"none": 0.0, "root": 0.5, "balanced": 1.0}[kind]
    weights = (counts.sum() / np.maximum(counts, 1)) ** power
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def fit_normalisation(model: Model, sessions: Sequence[Labelled], only: Sequence[str] | None = None) -> None:
    """Gives each encoder (or ``only`` some) prepared steps from all over ``sessions`` for its normalisation."""
    for name in model.encoders if only is None else only:
        total = sum(int(session.session.present[name].sum()) for session in sessions)
        every = max(1, total // FITTED_ON)
        model.encoder(name).fit(_Some(sessions, name, every))


def some_of(sessions: Sequence[Labelled], steps: int) -> list[Labelled]:
    """Every n-th of them, such that they have ``steps`` steps or more, and are not fewer than ``FEWEST``."""
    total = sum(len(session) for session in sessions)
    every = max(1, min(total // steps, len(sessions) // FEWEST))
    return list(sessions[::every])


class _Some(Iterable[Tensor]):
    """Batches of every ``every``-th step that is present, as often as they are asked for."""

    def __init__(self, sessions: Sequence[Labelled], stream: str, every: int) -> None:
        self._sessions, self._stream, self._every = sessions, stream, every

    def __iter__(self) -> Iterator[Tensor]:
        name = self._stream
        for session in self._sessions:
            rows = np.flatnonzero(session.session.present[name])[:: self._every]
            if not len(rows):
                continue
            if session.held:
                yield torch.from_numpy(session.held[name][rows])
            else:
                yield torch.from_numpy(np.concatenate([session.read(name, r, r + 1) for r in rows.tolist()]))
