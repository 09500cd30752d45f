"""One phase of training: epochs of batches, one cycle of the learning rate, a mean of the weights, checkpoints.

Random numbers are drawn anew from (seed, phase, epoch) when an epoch begins, and a checkpoint is written when it ends,
so that a training that was interrupted and resumed gives the same weights as one that was not.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.outside import naming

CHECKPOINT = "checkpoint.pt"


class Watch(Protocol):
    """Who is told how a training goes."""

    def begin(self, phase: str, total: int) -> None:
        """A phase of ``total`` parts begins; the one before is over."""

    def advance(self, done: int = 1) -> None:
        """So many more parts are done."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is over: its row of the curves."""

    def note(self, text: str) -> None:
        """Something that a user should know."""


class Silent:
    """Tells nobody."""

    def begin(self, phase: str, total: int) -> None: ...
    def advance(self, done: int = 1) -> None: ...
    def epoch(self, row: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


class Draws:
    """The random numbers of one epoch: numpy's for the order of the data, torch's for all that happens to them."""

    def __init__(self, seed: int, phase: str, epoch: int) -> None:
        state = int.from_bytes(hashlib.sha256(f"{seed}/{phase}/{epoch}".encode()).digest()[:7])
        self.numpy = np.random.default_rng(state)
        self.torch = torch.Generator().manual_seed(state)
        torch.manual_seed(state)  # dropout draws from the global ones


@contextmanager
def deterministic() -> Iterator[None]:
    """Within it torch uses no algorithm whose result may differ from run to run, and one thread; then all is as before,
    torch's own random numbers included."""
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with one_thread(), torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on one thread, with the same result on any machine. On several, gradients of small
    convolutions write beyond their memory (torch 2.13 where channels come last, 2.14 always), which ends the process;
    and for models of this size a second thread saves an eighth of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str) -> torch.device:
    """``auto``: a GPU if there is one. ConfigError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--device {name}: torch cannot compute there: {why}. Use `auto` or `cpu`.") from None
    return device


class Mean:
    """The mean of a module's weights over the changes, of which each newer one counts more (Polyak; as an exponential
    moving average): another module, which is what is evaluated and exported."""

    def __init__(self, module: nn.Module, average: nn.Module, keep: float) -> None:
        self.module, self._source, self._keep, self._count = average, module, keep, 0
        self.copy()

    def copy(self) -> None:
        """Begins anew with the weights as they are."""
        self.module.load_state_dict(self._source.state_dict())

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a change."""
        self._count += 1
        keep = min(self._keep, self._count / (self._count + 9))  # the first ones are far from anything
        for mine, other in zip(self.module.state_dict().values(), self._source.state_dict().values(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(other, 1 - keep)
            else:
                mine.copy_(other)

    def state(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "count": self._count}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self._count = state["count"]


def one_cycle(done: float, warm_up: float) -> float:
    """The factor of the learning rate when a share ``done`` of all changes has been made (Smith and Topin, 2018)."""
    if done < warm_up:
        return 0.04 + 0.96 * done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / max(1 - warm_up, 1e-9))) * 0.999 + 0.001


def decayed(module: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The weights that learn, in two groups: matrices, which decay, and the rest, which does not."""
    learning = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]


class Phase:
    """A phase of training of ``module``; ``average`` is another such module, which becomes the mean of its weights."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        average: nn.Module,
        *,
        epochs: int,
        learning_rate: float,
        weight_decay: float,
        warm_up: float,
        ema: float,
        clip_norm: float,
    ) -> None:
        self.name, self.epochs, self.done = name, epochs, 0
        self.curves: list[dict[str, Any]] = []
        self._module, self._clip, self._rate, self._warm_up = module, clip_norm, learning_rate, warm_up
        self.mean = Mean(module, average, ema)
        self._optimiser = torch.optim.AdamW(decayed(module, weight_decay), lr=learning_rate, fused=True)

    def run(
        self,
        seed: int,
        batches: Callable[[Draws], tuple[int, Iterator[Any]]],
        loss: Callable[[Any, Draws], tuple[Tensor, dict[str, float]]],
        judge: Callable[[], dict[str, float]],
        after: Callable[[], None],
        watch: Watch,
        modulate: Callable[[Draws], None] = lambda draws: None,
    ) -> None:
        """Runs what is left of the phase. For each epoch ``batches`` gives how many batches there are, and these;
        ``loss`` what is to be minimised of a batch, and what stands in the curves; ``judge`` the rest of the epoch's
        row, from the mean of the weights. ``modulate`` is called between gradients and changes, ``after`` after every
        epoch."""
        watch.begin(self.name, self.epochs * 100)
        watch.advance(self.done * 100)
        while self.done < self.epochs:
            draws = Draws(seed, self.name, self.done)
            row = {"phase": self.name, "epoch": self.done + 1, **self._epoch(draws, batches, loss, watch, modulate)}
            row |= judge()
            self.done += 1
            self.curves.append(row)
            after()
            watch.epoch(row)  # what is told of is kept

    def _epoch(self, draws: Draws, batches: Any, loss: Any, watch: Watch, modulate: Any) -> dict[str, float]:
        self._module.train()
        total, lots = batches(draws)
        sums: dict[str, float] = {}
        told = count = 0
        for count, batch in enumerate(lots, 1):
            share = min(count - 1, total - 1) / total
            found, row = loss(batch, draws)
            self._change(found, (self.done + share) / self.epochs, lambda: modulate(draws))
            for key, value in {"loss": float(found.detach()), **row}.items():
                sums[key] = sums.get(key, 0.0) + value
            now = min(100, count * 100 // total)
            watch.advance(now - told)
            told = now
        watch.advance(100 - told)
        return {key: round(value / max(count, 1), 6) for key, value in sums.items()}

    def _change(self, loss: Tensor, done: float, modulate: Callable[[], None]) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = self._rate * one_cycle(done, self._warm_up)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        modulate()
        torch.nn.utils.clip_grad_norm_(self._module.parameters(), self._clip)
        self._optimiser.step()
        self.mean.update()

    def state(self) -> dict[str, Any]:
        """All that the rest of the phase depends on."""
        return {
            "done": self.done,
            "curves": self.curves,
            "module": self._module.state_dict(),
            "mean": self.mean.state(),
            "optimiser": self._optimiser.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from ``state``."""
        self.done, self.curves = state["done"], list(state["curves"])
        self._module.load_state_dict(state["module"])
        self.mean.restore(state["mean"])
        self._optimiser.load_state_dict(state["optimiser"])


class Checkpoints:
    """The newest state of a training in a folder, for ``identity`` alone: another training's is not taken."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._folder, self._identity = folder, identity

    def within(self, name: str, identity: str) -> Checkpoints:
        """Those of a training that this one needs, in a folder within this one's."""
        return Checkpoints(None if self._folder is None else self._folder / name, identity)

    def clear(self) -> None:
        """Forgets what an earlier training left, in folders within this one's, too."""
        if self._folder is not None:
            for file in (self._folder / CHECKPOINT, *self._folder.glob(f"*/{CHECKPOINT}")):
                file.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none. ConfigError if it is another training's."""
        file = None if self._folder is None else self._folder / CHECKPOINT
        if file is None or not file.is_file():
            return None
        try:
            found: dict[str, Any] = torch.load(file, weights_only=True)  # tensors and plain values, never code
        except Exception as error:  # torch raises all kinds for a damaged file
            why = str(error).splitlines()[0]
            raise ConfigError(f"{file} cannot be read ({why}); remove it, and begin without --resume.") from None
        if found.get("identity") != self._identity:
            raise ConfigError(
                f"{file} is of another training: the training file, --seed, --epochs, --init-from, the sessions or "
                "the code have changed since. Repeat the command as it was, begin without "
                "--resume, or name another place with -o."
            )
        return found

    def save(self, state: Mapping[str, Any]) -> None:
        """Replaces what was saved."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._folder / f"{CHECKPOINT}.part"
            whole = io.BytesIO()  # torch would hide why it cannot write to a file
            torch.save({"identity": self._identity, **state}, whole)
            try:
                with naming(self._folder / CHECKPOINT):
                    part.write_bytes(whole.getbuffer())
                    os.replace(part, self._folder / CHECKPOINT)
            finally:
                part.unlink(missing_ok=True)
                with suppress(OSError):  # an empty one would look like a training that can be gone on with
                    self._folder.rmdir()
