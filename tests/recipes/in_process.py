import importlib

from benchmark.recipes import steps


def run_in_process(monkeypatch) -> list[str]:
    """A recipe's steps run in this process from now on; the names of those that ran are added to the list."""
    ran = []

    def run(step, launcher, folder):
        ran.append(step.name)
        importlib.import_module(step.module).main(step.parsed())

    monkeypatch.setattr(steps, "run_step", run)
    return ran
