"""The deck of faults: for each kind, draws from a seed what to inject into which run."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowception.checkpoint.format import MANIFEST_NAME, checkpoint_dir, checkpoints_dir, list_steps
from tests.faults.training.hooks import STEP_PLACES, Injection
from tests.faults.training.scene import FAULTY_SAVE, SNAPSHOT_STEP, STEPS, Scene

Outcome = Literal["killed", "stopped", "complete", "unsaved"]
"""The rank of the first injection was killed by SIGKILL; all ranks exited with 85 and a good checkpoint of their last
step; with 0; with 2, because the last checkpoint could not be saved."""
Settings = Mapping[tuple[int, int], float]
"""(Ranks, ZeRO stage) to the weight of drawing it."""

ALL_SETTINGS: Settings = {(2, 3): 8, (2, 2): 1, (2, 1): 1, (2, 0): 1, (3, 3): 2, (4, 3): 1}
FEW_SETTINGS: Settings = {(2, 3): 3, (3, 3): 1}
ONE_SETTING: Settings = {(2, 3): 1}
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_EARLY = 0.7
"""Share of a run's events; a signal before it always stops the run before its last step."""


@dataclass(frozen=True)
class Attempt:
    """One start of the command with injected faults, and how it must end."""

    world_size: int
    stage: int
    injections: tuple[Injection, ...] = ()
    outcome: Outcome = "killed"
    grace_s: float = 2.0
    """Time that the other ranks get after the death of a rank."""


@dataclass(frozen=True)
class Case:
    """One fault, or a sequence of several."""

    kind: str
    place: str
    attempts: tuple[Attempt, ...]
    from_snapshot: bool = True
    """Start from the run stopped at ``SNAPSHOT_STEP`` instead of an empty folder."""
    damage: Callable[[Path], None] | None = None
    """Applied to the run directory before the first attempt."""
    expected_resume: int | None = None
    """Step at which the first attempt must resume."""
    two_jobs: Literal["", "later", "at once"] = ""
    """When a second job is started on the directory, if any."""

    @property
    def same_size(self) -> bool:
        """Whether all attempts have the same number of ranks and ZeRO stage."""
        return len({(attempt.world_size, attempt.stage) for attempt in self.attempts}) == 1


class Deck:
    """Draws cases of each kind."""

    def __init__(self, scene: Scene, chance: random.Random, settings: Settings) -> None:
        self._scene, self._chance, self._settings = scene, chance, settings
        self._places = self._cycle(STEP_PLACES)
        self._signal_stories = self._cycle(("once", "all ranks", "twice", "during a save", "while starting"))
        self._disk_stories = self._cycle(("continues", "then SIGKILL", "last save"))
        self._second_jobs = self._cycle(("later", "at once"))

    def _cycle(self, values: tuple[str, ...]) -> Iterator[str]:
        while True:
            yield from self._chance.sample(values, len(values))

    def _setting(self) -> tuple[int, int]:
        return self._chance.choices(list(self._settings), list(self._settings.values()))[0]

    def _grace(self) -> float:
        """Kill the other ranks at once, as when a node dies, or let them notice the death themselves."""
        return self._chance.choice((0.0, 2.0))

    def step_kill(self) -> Case:
        """SIGKILL of a random rank at a random event of a step."""
        world_size, stage = self._setting()
        place, rank = next(self._places), self._chance.randrange(world_size)
        events = self._scene.reference(world_size, stage).events[place][rank]
        injection = Injection(place, self._chance.randint(1, events), rank, "kill")
        attempt = Attempt(world_size, stage, (injection,), grace_s=self._grace())
        return Case(f"SIGKILL, {place}", f"event {injection.at} of {events}", (attempt,), from_snapshot=False)

    def load_kill(self) -> Case:
        """SIGKILL while loading a checkpoint."""
        world_size, stage = self._setting()
        rank = self._chance.randrange(world_size)
        injection = Injection("load", self._chance.randint(1, 20), rank, "kill")
        attempt = Attempt(world_size, stage, (injection,), grace_s=self._grace())
        return Case("SIGKILL, resuming", f"slice {injection.at}", (attempt,))

    def file_kill(self) -> Case:
        """SIGKILL at an operation on the run's description, lock or metrics files."""
        world_size, stage = self._setting()
        operations = self._scene.reference(world_size, stage).file_operations[0]
        at = self._chance.randint(1, len(operations))
        action = "cut" if operations[at - 1].startswith("write") and self._chance.random() < 0.5 else "kill"
        injection = Injection("files", at, 0, action, operations[at - 1], self._chance.random())
        attempt = Attempt(world_size, stage, (injection,), grace_s=self._grace())
        place = f"{operations[at - 1]} ({at} of {len(operations)}){', in the middle' if action == 'cut' else ''}"
        return Case("SIGKILL, run directory", place, (attempt,), from_snapshot=False)

    def every_save_kill(self, world_size: int, stage: int) -> list[Case]:
        """SIGKILL before every operation of a save, on every rank, and in the middle of every write."""
        cases = []
        for rank, operations in enumerate(self._scene.reference(world_size, stage).operations):
            for at, operation in enumerate(operations, start=1):
                for action in ("kill", "cut") if operation.startswith("write") else ("kill",):
                    injection = Injection(
                        f"save:{FAULTY_SAVE}", at, rank, action, operation, fraction=self._chance.random()
                    )
                    attempt = Attempt(world_size, stage, (injection,), grace_s=self._grace())
                    part = ", in the middle" if action == "cut" else ""
                    place = f"{operation} ({at} of {len(operations)} of rank {rank}){part}"
                    cases.append(Case("SIGKILL, save", place, (attempt,)))
        return cases

    def save_kill(self) -> Case:
        """SIGKILL at a random one of these operations."""
        return self._chance.choice(self.every_save_kill(*self._setting()))

    def damage(self) -> Case:
        """Truncate, change or remove a file of the newest checkpoint, or of the two newest."""
        world_size, stage = self._setting()
        depth = self._chance.choices((1, 2), (4, 1))[0]
        files = [f"rank_{rank:05d}.safetensors" for rank in range(world_size)]
        name = self._chance.choice((MANIFEST_NAME, self._chance.choice(files)))
        how = self._chance.choice(sorted(_DAMAGES))
        fraction = self._chance.random()

        def spoil(run_dir: Path) -> None:
            for step in list_steps(run_dir)[-depth:]:
                _DAMAGES[how](checkpoint_dir(run_dir, step) / name, fraction)

        steps = [0, SNAPSHOT_STEP - 2, SNAPSHOT_STEP]
        which = "the newest checkpoint" if depth == 1 else "the two newest checkpoints"
        return Case(
            "damaged checkpoint",
            f"{name} {how} in {which}",
            (Attempt(world_size, stage, outcome="complete"),),
            damage=spoil,
            expected_resume=steps[-1 - depth],
        )

    def full_disk(self) -> Case:
        """ENOSPC on one rank at an operation of a save and at some of the following ones.

        The run continues to its end; or it is killed soon after, and must find the older checkpoint; or it was the last
        save, and the run must end with an error.
        """
        world_size, stage = self._setting()
        story, rank = next(self._disk_stories), self._chance.randrange(world_size)
        operations = self._scene.reference(world_size, stage).operations[rank]
        if story == "last save":
            operations = [name.replace(str(FAULTY_SAVE), str(STEPS)) for name in operations[:4]]
        needing = [at for at, name in enumerate(operations, 1) if not name.startswith(("unlink", "rmdir"))]
        at = self._chance.choice(needing)
        events = self._chance.randint(1, min(4, len(operations) + 1 - at))
        save = STEPS if story == "last save" else FAULTY_SAVE
        full = Injection(
            f"save:{save}", at, rank, "full_disk", operations[at - 1], self._chance.random(), events=events
        )
        kill = Injection("batch", STEPS - SNAPSHOT_STEP, self._chance.randrange(world_size), "kill", after=1)
        attempt = {
            "continues": Attempt(world_size, stage, (full,), "complete"),
            "then SIGKILL": Attempt(world_size, stage, (kill, full), "killed"),
            "last save": Attempt(world_size, stage, (full,), "unsaved"),
        }[story]
        place = f"{operations[at - 1]} ({at} of {len(operations)} of rank {rank}), {events} operations long"
        return Case(f"disk full, {story}", place, (attempt,))

    def preemption(self) -> Case:
        """SIGUSR1 or SIGTERM: once, twice, to all ranks, during a save, while starting."""
        world_size, stage = self._setting()
        story, rank = next(self._signal_stories), self._chance.randrange(world_size)
        reference, number = self._scene.reference(world_size, stage), self._chance.choice(_SIGNALS)
        from_snapshot = story == "during a save"
        if story == "once":
            place = self._chance.choice(("forward", "backward", "optimizer"))
            at = self._chance.randint(1, int(_EARLY * reference.events[place][rank]))
            injections = [Injection(place, at, rank, "signal", number=number)]
        elif story == "during a save":
            at = self._chance.randint(1, len(reference.operations[rank]))
            injections = [Injection(f"save:{FAULTY_SAVE}", at, rank, "signal", number=number)]
        elif story == "while starting":
            injections = [Injection("files", self._chance.randint(1, 3), 0, "signal", number=number)]
        else:
            step = self._chance.randint(1, STEPS - 3)
            targets = range(world_size) if story == "all ranks" else (rank,)
            injections = [Injection("batch", step, target, "signal", number=number) for target in targets]
            if story == "twice":
                second = Injection(
                    f"save:{step}",
                    self._chance.randint(1, 4),
                    self._chance.randrange(world_size),
                    "signal",
                    number=self._chance.choice(_SIGNALS),
                )
                injections.append(second)
        where = ", then ".join(
            f"{signal.Signals(i.number).name} at {i.place} {i.at} of rank {i.rank}" for i in injections
        )
        attempt = Attempt(world_size, stage, tuple(injections), "stopped")
        return Case(f"preemption, {story}", where, (attempt,), from_snapshot)

    def stale(self) -> Case:
        """Leftovers of killed jobs: locks, partial folders and files, a truncated metrics line."""
        world_size, stage = self._setting()
        chosen = sorted(self._chance.sample(sorted(_LEFT_OVERS), self._chance.randint(2, len(_LEFT_OVERS))))

        def leave(run_dir: Path) -> None:
            for name in chosen:
                _LEFT_OVERS[name](run_dir)

        attempt = Attempt(world_size, stage, outcome="complete")
        return Case("left-overs", ", ".join(chosen), (attempt,), damage=leave, expected_resume=SNAPSHOT_STEP)

    def second_job(self) -> Case:
        """Two jobs on one directory: one holds it and completes, the other is refused."""
        world_size, stage = self._setting()
        which = next(self._second_jobs)
        at = self._chance.randint(1, 5) if which == "later" else 1
        pause = Injection("batch", at, 0, "pause")
        attempt = Attempt(world_size, stage, (pause,), "complete")
        kind = "second job, " + ("while the first trains" if which == "later" else "started at once")
        two: Literal["later", "at once"] = "later" if which == "later" else "at once"
        return Case(kind, f"the first is held at batch {at}", (attempt,), from_snapshot=False, two_jobs=two)

    def world_change(self) -> Case:
        """Stop or kill a run, then resume it with another number of ranks and possibly another ZeRO stage."""
        attempts: list[Attempt] = []
        for number in range(self._chance.choice((2, 2, 3))):
            sizes = [size for size in (1, 2, 3, 4) if not attempts or size != attempts[-1].world_size]
            world_size, stage = self._chance.choice(sizes), self._chance.choice((3, 3, 3, 2, 1, 0))
            outcome: Outcome = self._chance.choice(("stopped", "stopped", "killed"))
            action = "kill" if outcome == "killed" else "signal"
            at = self._chance.randint(2, 5) if number == 0 else self._chance.randint(1, 2)
            injection = Injection("batch", at, self._chance.randrange(world_size), action)
            attempts.append(Attempt(world_size, stage, (injection,), outcome))
        last = attempts.pop()
        attempts.append(Attempt(last.world_size, last.stage, (), "complete"))
        words = [f"{a.outcome} at batch {a.injections[0].at} of {a.world_size}" for a in attempts[:-1]]
        place = f"{', then '.join(words)}; finished by {last.world_size}"
        return Case("other world size", place, tuple(attempts), from_snapshot=False)

    def draw(self, faults: int) -> list[Case]:
        """Draw this many cases, of every kind; from 200 on with every operation of a save on two ranks."""
        makers = [(share, getattr(self, name)) for name, share in SHARES.items() if name != "save_kill"]
        exhaustive = self.every_save_kill(2, 3) if faults >= 200 else []
        saves = max(len(exhaustive), round(faults * SHARES["save_kill"]))
        cases = exhaustive + [self.save_kill() for _ in range(saves - len(exhaustive))]
        rest = faults - len(cases)
        total = sum(share for share, _ in makers)
        for share, make in makers:
            cases += [make() for _ in range(max(1, int(rest * share / total)))]
        while len(cases) < faults:
            cases.append(self.step_kill())
        self._chance.shuffle(cases)
        return cases


SHARES = {
    "save_kill": 0.25,
    "step_kill": 0.26,
    "load_kill": 0.03,
    "file_kill": 0.06,
    "damage": 0.13,
    "full_disk": 0.08,
    "preemption": 0.09,
    "stale": 0.04,
    "second_job": 0.02,
    "world_change": 0.07,
}
"""Share of the cases of each method of ``Deck``."""


def _truncate(path: Path, fraction: float) -> None:
    with path.open("r+b") as stream:
        stream.truncate(int(path.stat().st_size * fraction))


def _flip(path: Path, fraction: float) -> None:
    content = bytearray(path.read_bytes())
    bit = int(fraction * len(content) * 8)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def _empty(path: Path, _fraction: float) -> None:
    path.write_bytes(b"")


def _remove(path: Path, _fraction: float) -> None:
    path.unlink()


_DAMAGES: dict[str, Callable[[Path, float], None]] = {
    "cut short": _truncate,
    "with one bit flipped": _flip,
    "empty": _empty,
    "gone": _remove,
}


def _half_saved(run_dir: Path) -> None:
    folder = checkpoints_dir(run_dir) / f"step_{FAULTY_SAVE:08d}.0badc0de-1.tmp"
    folder.mkdir()
    (folder / "rank_00000.safetensors").write_bytes(b"\0" * 1000)
    (folder / "rank_00000.receipt").write_text('{"file": "rank_000')


def _half_removed(run_dir: Path) -> None:
    old = checkpoint_dir(run_dir, SNAPSHOT_STEP)
    shutil.copytree(old, old.with_name("step_00000001.pruned.tmp"))


def _half_replaced(run_dir: Path) -> None:
    """A new checkpoint was about to replace this one, but never did."""
    newest = checkpoint_dir(run_dir, SNAPSHOT_STEP)
    newest.rename(newest.with_name(f"{newest.name}.replaced.tmp"))


def _lock_of_the_dead(run_dir: Path) -> None:
    (run_dir / "run.lock").write_text("process 1 on another-node")


def _half_written_files(run_dir: Path) -> None:
    for name in (".manifest.json.partial", ".config.yaml.partial", "metrics.partial"):
        (run_dir / name).write_text("{")


def _cut_metrics(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "epoch": 0, "lo')


def _dead_heartbeats(run_dir: Path) -> None:
    folder = run_dir / "heartbeats"
    folder.mkdir(exist_ok=True)
    (folder / "rank_00000.json").write_text('{"rank": 0, "time_s": 1.0, "st')
    (folder / "report.txt").write_text("rank 1 did not come")


_LEFT_OVERS: dict[str, Callable[[Path], None]] = {
    "half a checkpoint": _half_saved,
    "half-removed checkpoint": _half_removed,
    "half-replaced checkpoint": _half_replaced,
    "lock file of a dead process": _lock_of_the_dead,
    "heartbeats of the dead": _dead_heartbeats,
    "half-written files": _half_written_files,
    "metrics line cut short": _cut_metrics,
}
