"""`baton model`: models on this machine."""

from __future__ import annotations

from cyclopts import App

from baton.config import DEFAULT_MODEL

app = App(name="model", help="Manage the models on this machine.")


@app.command
def fetch(name: str = DEFAULT_MODEL, /) -> None:
    """Fetch a model, so that workers start without waiting for it; prints where it lies.

    Parameters
    ----------
    name
        A built-in name, a path, or a hub name.
    """
    from baton.engine.models import resolve

    print(resolve(name).path)
