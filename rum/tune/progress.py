"""How a search stands, in one line."""

from optuna.trial import TrialState

from rum.tune.study import Study, is_infeasible, is_sound


def describe(
    study: Study, metric: str, *, running: int, paused: int, seconds_left: float | None
) -> str:
    """Trials by state, best so far, time left.

    Args:
        study: The study.
        metric: What the trials report.
        running: Trials that a process has now.
        paused: Trials that wait at a rung.
        seconds_left: Until the study is through; None if nobody can say.
    """
    trials = study.trials()
    counts = {
        "running": running,
        "paused": paused,
        "finished": sum(t.state == TrialState.COMPLETE for t in trials),
        "stopped early": sum(
            t.state == TrialState.PRUNED and is_sound(t) and not is_infeasible(t) for t in trials
        ),
        "failed": sum(
            t.state == TrialState.FAIL or (t.state == TrialState.PRUNED and not is_sound(t))
            for t in trials
        ),
        "infeasible": sum(map(is_infeasible, trials)),
    }
    parts = [f"{len(study.ended())}/{study.target} trials"]
    parts += [f"{count} {name}" for name, count in counts.items() if count]
    values = [v for t in trials if is_sound(t) for v in t.intermediate_values.values()]
    if values:
        best = min(values) if study.mode == "min" else max(values)
        parts.append(f"best {best:.4f} {metric}")
    if seconds_left is not None:
        parts.append(f"about {_duration(seconds_left)} left")
    return " | ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
